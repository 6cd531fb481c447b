"""A video autoencoder's operators on hardware: every compiled case, real widths, cuts, long offsets, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swifti2v_kernels import causal_conv3d, explain, fold_upsample_weight, frames_out, rms_norm_silu, upsample_conv2d
from tests.support.conv_oracle import convolved, normed, upsampled, weights
from tests.support.operator_cases import cases_of
from tests.support.tolerances import ACROSS_DEVICES_TF32, KERNEL, relative_error

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float16, torch.bfloat16]
HEIGHT, WIDTH = 100, 180


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes memory that a kernel leaves unwritten show as NaN."""
    stock = Tensor.new_empty

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = stock(self, *args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


@pytest.fixture(autouse=True)
def _no_synchronisation() -> Iterator[None]:
    """Switches this mode off after a test; tests switch it on around what must not wait, and compare afterwards."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Checks that a result is close and has no NaN; ``dtype`` is the coarsest that was computed with."""
    assert torch.isfinite(actual).all()
    assert relative_error(actual, expected) < KERNEL[str(dtype or actual.dtype).removeprefix("torch.")]


def view(*shape: int, dtype: torch.dtype) -> Tensor:
    """Returns normal numbers ``[B, T, h, w, C]`` as a slice of a larger buffer that is NaN everywhere else."""
    batch, frames, height, width, channels = shape
    buffer = torch.full((batch, frames + 2, height + 3, width + 3, channels), float("nan"), device=DEVICE, dtype=dtype)
    inner = buffer[:, 1:-1, 1:-2, 2:-1]
    return inner.normal_()


def parameters(columns: int, channels: int, kernel: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns weight, bias and norm weight."""
    weight, bias = weights(columns, channels, kernel, dtype)
    return weight.to(DEVICE), bias.to(DEVICE), (torch.rand(columns) + 0.5).to(DEVICE, dtype)


def pixels_of(v: Tensor, patch: int) -> Tensor:
    """Returns features (colour, column, row) as pixels."""
    return v.unflatten(4, (3, patch, patch)).permute(0, 1, 2, 6, 3, 5, 4).flatten(2, 3).flatten(3, 4)


def bytes_of(v: Tensor) -> Tensor:
    return (v * 127.5 + 128).floor().clamp(0, 255)


def randomised(case: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a case's arguments with random numbers; the weight is the second argument of every operator."""
    arguments, options = case.inputs(torch.device(DEVICE))
    for x in (*arguments, *options.values()):
        if isinstance(x, Tensor) and x.is_floating_point():
            x.normal_(0.1, 0.8)
    weight = arguments[1]
    if weight.ndim > 1:
        columns = 4 * weight.shape[1] if case.operator is upsample_conv2d else weight.shape[0]
        weight.mul_((columns / weight.numel()) ** 0.5)
    return arguments, options


@pytest.mark.parametrize("case", cases_of(causal_conv3d), ids=lambda case: case.name)
def test_every_convolution_of_the_compile_report_runs(case: Any) -> None:
    (x, weight, bias), options = randomised(case)
    gamma, residual = options.get("norm_weight"), options.get("residual")
    keywords = {name: options[name] for name in ("past", "stride", "padding")}
    total = convolved(x, weight, bias, residual=residual, **keywords)
    result = causal_conv3d(x, weight, bias, **options)
    if gamma is None:
        check(result, total)
    elif options["keep_sum"]:
        assert result[0] is residual
        check(result[0], total)
        check(result[1], normed(result[0], gamma))
    else:
        check(result, normed(total.to(x.dtype), gamma))


@pytest.mark.parametrize("case", cases_of(upsample_conv2d), ids=lambda case: case.name)
def test_every_upsampling_of_the_compile_report_runs(case: Any) -> None:
    """Every case equals its phases as they are: even and odd rows and columns by convolutions of their own."""
    (x, phases, bias), options = randomised(case)
    gamma, residual, (top, bottom, left, right) = (options.get(k) for k in ("norm_weight", "residual", "padding"))
    batch, frames, height, width, _ = x.shape
    total = torch.empty(batch, frames, 2 * height, 2 * width, phases.shape[1], dtype=torch.float64, device=DEVICE)
    for i, phase in enumerate(phases):
        down, aside = divmod(i, 2)
        part = convolved(x, phase.permute(0, 3, 1, 2).unsqueeze(2), bias, padding=(1 - down, down, 1 - aside, aside))
        total[:, :, down::2, aside::2] = part
    total = total[:, :, 1 - top : 2 * height - 1 + bottom, 1 - left : 2 * width - 1 + right]
    total = total if residual is None else total + residual.double()
    result = upsample_conv2d(x, phases, bias, **options)
    if gamma is None:
        check(result, total)
    else:
        check(result[0], total)
        check(result[1], normed(result[0], gamma))


@pytest.mark.parametrize("case", cases_of(frames_out), ids=lambda case: case.name)
def test_every_head_of_the_compile_report_runs(case: Any) -> None:
    (x, weight, bias, out), options = randomised(case)
    v = pixels_of(convolved(x, weight, bias, options["past"], padding=options["padding"]), options["patch_size"])
    assert frames_out(x, weight, bias, out, **options) is out
    if out.dtype == torch.uint8:
        assert ((out.double() - bytes_of(v)).abs() <= 1).all()
    else:
        check(out, v.clamp(-1, 1), x.dtype)


@pytest.mark.parametrize("case", cases_of(rms_norm_silu), ids=lambda case: case.name)
def test_every_norm_of_the_compile_report_runs(case: Any) -> None:
    (x, gamma), options = randomised(case)
    check(rms_norm_silu(x, gamma, **options), normed(x, gamma))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "columns", "kernel", "stride"),
    [
        (96, 96, (3, 3, 3), (1, 1, 1)),
        (160, 160, (3, 3, 3), (1, 1, 1)),
        (192, 192, (3, 3, 3), (1, 1, 1)),
        (384, 384, (3, 3, 3), (1, 1, 1)),
        (1024, 1024, (3, 3, 3), (1, 1, 1)),
        (3, 96, (3, 3, 3), (1, 1, 1)),
        (192, 384, (1, 1, 1), (1, 1, 1)),
        (160, 160, (1, 3, 3), (1, 2, 2)),
        (384, 384, (3, 1, 1), (2, 1, 1)),
    ],
)
def test_convolution_at_real_widths(
    channels: int, columns: int, kernel: tuple[int, int, int], stride: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """A tile with a halo on two sides and its history is convolved, the residual in place, in poisoned surroundings."""
    x = view(1, 2, HEIGHT, WIDTH, channels, dtype=dtype)
    past = view(1, 2, HEIGHT, WIDTH, channels, dtype=dtype) if kernel[0] == 3 else None
    weight, bias, gamma = parameters(columns, channels, kernel, dtype)
    padding = (0, 1, 1, 0) if kernel[1] == 3 else (0, 0, 0, 0)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "past": past}
    y = causal_conv3d(x, weight, bias, backend="triton", **options)
    residual, z = (view(*y.shape, dtype=dtype) for _ in range(2))
    before, intact = residual.double(), [t._base.isnan() for t in (residual, z)]
    options |= {"norm_weight": gamma, "residual": residual, "backend": "triton"}
    alone = causal_conv3d(x, weight, bias, keep_sum=False, **options)
    causal_conv3d(x, weight, bias, out=residual, normed=z, **options)
    check(z, normed(residual, gamma))
    assert torch.equal(alone, z)
    assert all(torch.equal(t._base.isnan(), nan) for t, nan in zip((residual, z), intact, strict=True))
    # In float64 all rows of narrow convolutions, and of wide ones the first, the last and some between.
    rows = y.shape[2]
    bands = [(0, rows)] if channels < 384 else [(0, 3), (rows // 2, rows // 2 + 3), (rows - 3, rows)]
    assert torch.isfinite(y).all()
    for a, b in bands:
        start, end = a * stride[1] - padding[0], (b - 1) * stride[1] - padding[0] + kernel[1]
        sides = (max(-start, 0), max(end - HEIGHT, 0), *padding[2:])
        band = slice(max(start, 0), min(end, HEIGHT))
        history = None if past is None else past[:, :, band]
        expected = convolved(x[:, :, band], weight, bias, history, stride, sides)
        check(y[:, :, a:b], expected)
        check(residual[:, :, a:b], expected + before[:, :, a:b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "columns"), [(192, 96), (384, 192), (160, 160), (384, 384)])
def test_upsampling_at_real_widths(channels: int, columns: int, dtype: torch.dtype) -> None:
    """Upsampling equals that with the weight before folding, also where padding leaves out more than a halo."""
    x = view(1, 2, HEIGHT // 2, WIDTH // 2, channels, dtype=dtype)
    weight, bias, gamma = parameters(columns, channels, (1, 3, 3), dtype)
    phases = fold_upsample_weight(weight[:, :, 0])
    for padding in ((1, 1, 1, 1), (1, -1, 0, -2), (-2, 0, -3, 1)):
        expected = upsampled(x, weight[:, :, 0], bias, padding)
        residual, z = (view(*expected.shape, dtype=dtype) for _ in range(2))
        before, intact = residual.double(), [t._base.isnan() for t in (residual, z)]
        check(upsample_conv2d(x, phases, bias, padding=padding, backend="triton"), expected)
        options: dict[str, Any] = {"residual": residual, "norm_weight": gamma, "backend": "triton"}
        upsample_conv2d(x, phases, bias, padding=padding, out=residual, normed=z, **options)
        check(residual, expected + before)
        check(z, normed(residual, gamma))
        assert all(torch.equal(t._base.isnan(), nan) for t, nan in zip((residual, z), intact, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "patch"), [(96, 1), (160, 2), (256, 2)])
def test_frames_at_real_widths(channels: int, patch: int, dtype: torch.dtype) -> None:
    """Frames are written into a part of larger frames, of which the rest stays."""
    x, past = (view(1, 2, HEIGHT, WIDTH, channels, dtype=dtype) for _ in range(2))
    weight, bias, _ = parameters(3 * patch * patch, channels, (3, 3, 3), dtype)
    options: dict[str, Any] = {"past": past, "padding": (1, 0, 0, 1), "patch_size": patch, "backend": "triton"}
    v = pixels_of(convolved(x, weight, bias, past, padding=(1, 0, 0, 1)), patch)
    height, width = v.shape[2:4]

    def target(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        frames = torch.full((1, 4, height + 3, width + 5, 3), 7, dtype=kind, device=DEVICE)
        return frames, frames[:, 1:-1, 2:-1, 1:-4]

    frames, out = target(torch.uint8)
    frames_out(x, weight, bias, out, **options)
    assert ((out.double() - bytes_of(v)).abs() <= 1).all()
    assert (frames == 7).sum() - (out == 7).sum() == frames.numel() - out.numel()
    for kind in (torch.float32, dtype):
        frames, out = target(kind)
        check(frames_out(x, weight, bias, out, **options), v.clamp(-1, 1), dtype)
        assert (frames == 7).sum() - (out == 7).sum() == frames.numel() - out.numel()


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("channels", [10, 96, 160, 192, 384, 1024])
def test_norm_at_real_widths(channels: int, dtype: torch.dtype) -> None:
    x, gamma = view(1, 2, HEIGHT, WIDTH, channels, dtype=dtype), torch.rand(channels, device=DEVICE).to(dtype)
    x[:, :, 3, 5] = 0
    expected, intact = normed(x, gamma), x._base.isnan()
    y = rms_norm_silu(x, gamma, backend="triton")
    check(y, expected)
    assert torch.equal(rms_norm_silu(x, gamma, out=x, backend="triton"), y)
    assert torch.equal(x._base.isnan(), intact)


@pytest.mark.parametrize("channels", [96, 192, 384])
def test_any_cut_in_time_gives_the_same_bits(channels: int) -> None:
    clip = torch.randn(1, 7, HEIGHT // 2, WIDTH // 2, channels, device=DEVICE).bfloat16()
    weight, bias, gamma = parameters(channels, channels, (3, 3, 3), torch.bfloat16)
    options: dict[str, Any] = {"norm_weight": gamma, "backend": "triton"}
    whole = causal_conv3d(clip, weight, bias, **options)
    for pieces in ((1,) * 7, (1, 4, 2), (3, 4)):
        start = 0
        for n in pieces:
            past = clip[:, max(start - 2, 0) : start] if start else None
            if start > 2:  # history that lies elsewhere, with other strides
                past = F.pad(past, (0, 0, 2, 1))[:, :, :, 2:-1]
            part = causal_conv3d(clip[:, start : start + n], weight, bias, past=past, **options)
            assert all(torch.equal(a, b[:, start : start + n]) for a, b in zip(part, whole, strict=True))
            start += n


@pytest.mark.parametrize("channels", [96, 192, 384])
def test_any_cut_in_space_gives_the_same_bits(channels: int) -> None:
    """A tile reads its halo where it lies in the whole frame, and pads at the frame's borders only."""
    frame = torch.randn(1, 1, HEIGHT, WIDTH, channels, device=DEVICE).bfloat16()
    weight, bias, gamma = parameters(channels, channels, (1, 3, 3), torch.bfloat16)
    phases, options = fold_upsample_weight(weight[:, :, 0]), {"norm_weight": gamma, "backend": "triton"}
    whole, big = causal_conv3d(frame, weight, bias, **options), upsample_conv2d(frame, phases, bias, **options)
    for y0, y1 in ((0, HEIGHT // 3), (HEIGHT // 3, HEIGHT)):
        for x0, x1 in ((0, 7), (7, WIDTH // 2), (WIDTH // 2, WIDTH)):
            top, bottom, left, right = inner = (y0 > 0, y1 < HEIGHT, x0 > 0, x1 < WIDTH)
            x = frame[:, :, y0 - top : y1 + bottom, x0 - left : x1 + right]
            tile = causal_conv3d(x, weight, bias, padding=[1 - halo for halo in inner], **options)
            assert all(torch.equal(a, b[:, :, y0:y1, x0:x1]) for a, b in zip(tile, whole, strict=True))
            tile = upsample_conv2d(x, phases, bias, padding=[-1 if halo else 1 for halo in inner], **options)
            for a, b in zip(tile, big, strict=True):
                assert torch.equal(a, b[:, :, 2 * y0 : 2 * y1, 2 * x0 : 2 * x1])


def test_frames_beyond_two_to_the_31_elements() -> None:
    """One frame of 2.2e9 elements is convolved, normed in place, and made by upsampling; its ends equal float64."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    height, width, channels = 4800, 4704, 96
    x = torch.empty(1, 1, height, width, channels, device=DEVICE, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x.normal_()
    weight, bias, gamma = parameters(channels, channels, (1, 3, 3), torch.bfloat16)
    y, z = causal_conv3d(x, weight, bias, norm_weight=gamma, backend="triton")
    for rows, halo, sides in ((slice(0, 4), slice(0, 5), (1, 0)), (slice(-4, None), slice(-5, None), (0, 1))):
        check(y[:, :, rows], convolved(x[:, :, halo], weight, bias, padding=(*sides, 1, 1)))
        check(z[:, :, rows], normed(y[:, :, rows], gamma))
    ends = [z[:, :, rows].double() for rows in (slice(0, 4), slice(-4, None))]
    rms_norm_silu(z, gamma, out=z, backend="triton")
    for rows, before in zip((slice(0, 4), slice(-4, None)), ends, strict=True):
        check(z[:, :, rows], normed(before, gamma))
    del x, z
    small = torch.randn(1, 1, height // 2, width // 2, channels, device=DEVICE).bfloat16()
    upsample_conv2d(small, fold_upsample_weight(weight[:, :, 0]), bias, out=y.fill_(float("nan")), backend="triton")
    check(y[:, :, :4], upsampled(small[:, :, :3], weight[:, :, 0], bias, (1, -1, 1, 1)))
    check(y[:, :, -4:], upsampled(small[:, :, -3:], weight[:, :, 0], bias, (-1, 1, 1, 1)))


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """History and written frames may reach beyond 2**31 elements along columns."""
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free device memory")
    far = torch.empty(5 * 2**29 + 4096, device=DEVICE, dtype=torch.bfloat16)
    past = far.as_strided((1, 1, 4, 6, 16), (0, 0, 16, 2**29, 1)).copy_(torch.randn(1, 1, 4, 6, 16))
    x, (weight, bias, _) = (
        torch.randn(1, 1, 4, 6, 16).to(DEVICE).bfloat16(),
        parameters(16, 16, (2, 1, 3), torch.bfloat16),
    )
    y = causal_conv3d(x, weight, bias, past=past, backend="triton")
    check(y, convolved(x, weight, bias, past))
    frames = torch.zeros(5 * 2**29 + 4096, device=DEVICE, dtype=torch.uint8)
    out = frames.as_strided((1, 1, 4, 6, 3), (0, 0, 3, 2**29, 1))
    weight, bias, _ = parameters(3, 16, (1, 3, 3), torch.bfloat16)
    frames_out(x, weight, bias, out, backend="triton")
    assert ((out.double() - bytes_of(convolved(x, weight, bias))).abs() <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_cudnn_behind_the_same_calls(dtype: torch.dtype) -> None:
    """cuDNN computes the same calls, also where its 3D convolutions are known not to work; float32 may be TF32."""
    limit = ACROSS_DEVICES_TF32 if dtype == torch.float32 else KERNEL[str(dtype).removeprefix("torch.")]
    x, past = (view(1, 4, HEIGHT // 2, WIDTH // 2, 96, dtype=dtype) for _ in range(2))
    for kernel, stride, padding in (
        ((3, 3, 3), (1, 1, 1), (0, 1, 1, 0)),
        ((3, 3, 3), (1, 1, 1), (-1, 1, 1, -2)),
        ((1, 3, 3), (1, 2, 2), (0, 1, 0, 1)),
        ((3, 1, 1), (2, 1, 1), (0, 0, 0, 0)),
    ):
        weight, bias, gamma = parameters(160, 96, kernel, dtype)
        options: dict[str, Any] = {"stride": stride, "padding": padding}
        options["past"] = past[:, :2] if kernel[0] == 3 else None
        assert explain(causal_conv3d, x, weight, bias, backend="torch", **options).implementation == "cudnn"
        y, z = causal_conv3d(x, weight, bias, norm_weight=gamma, backend="torch", **options)
        assert relative_error(y, convolved(x, weight, bias, **options)) < limit
        assert relative_error(z, normed(y, gamma)) < limit
    weight, bias, gamma = parameters(96, 96, (1, 3, 3), dtype)
    y = upsample_conv2d(x, fold_upsample_weight(weight[:, :, 0]), bias, padding=(1, -2, 0, 1), backend="torch")
    assert relative_error(y, upsampled(x, weight[:, :, 0], bias, (1, -2, 0, 1))) < limit
    weight, bias, _ = parameters(3, 96, (3, 3, 3), dtype)
    expected = convolved(x, weight, bias, past[:, :2]).clamp(-1, 1)
    out = torch.zeros(expected.shape, device=DEVICE)
    frames_out(x, weight, bias, out, past=past[:, :2], backend="torch")
    assert relative_error(out, expected) < limit


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_graph_without_waiting_for_the_device(backend: str) -> None:
    """A captured piece of a decoder is replayed with other frames."""
    x, past = (view(1, 2, HEIGHT // 2, WIDTH // 2, 192, dtype=torch.bfloat16) for _ in range(2))
    weight, bias, gamma = parameters(192, 192, (3, 3, 3), torch.bfloat16)
    head, head_bias, _ = parameters(3, 192, (3, 3, 3), torch.bfloat16)
    phases = fold_upsample_weight(weight[:, :, 1])
    frames = torch.zeros(1, 2, 2 * (HEIGHT // 2), 2 * (WIDTH // 2), 3, device=DEVICE, dtype=torch.uint8)

    def run() -> Tensor:
        y, z = causal_conv3d(x, weight, bias, past=past, residual=x, norm_weight=gamma, backend=backend)
        y = causal_conv3d(z, weight, bias, past=past, residual=y, backend=backend)
        big = upsample_conv2d(y, phases, backend=backend)
        rms_norm_silu(big, gamma, out=big, backend=backend)
        frames_out(big, head, head_bias, frames, backend=backend)
        return big

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        x.normal_(), past.normal_()
        frames.zero_(), captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        replayed = frames.clone()
        expected = run()
        assert torch.isfinite(expected).all()
        if backend == "triton":
            assert torch.equal(captured, expected)
            assert torch.equal(replayed, frames)
        else:  # cuDNN may choose otherwise
            assert relative_error(captured, expected) < KERNEL["bfloat16"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_compiled_model_equals_an_eager_one(dtype: torch.dtype) -> None:
    weight, bias, gamma = parameters(96, 96, (3, 3, 3), dtype)
    phases, (head, head_bias, _) = fold_upsample_weight(weight[:, :, 1]), parameters(3, 96, (3, 3, 3), dtype)

    def foreign(x: Tensor, out: Tensor) -> Tensor:
        y, z = causal_conv3d(2 * x, weight, bias, residual=x, norm_weight=gamma, past=x[:, :1])
        y = causal_conv3d(z, weight, bias, residual=y)
        big = rms_norm_silu(upsample_conv2d(y, phases), gamma)
        frames_out(big, head, head_bias, out)
        return big + 1

    x = torch.randn(1, 2, HEIGHT // 2, WIDTH // 2, 96, device=DEVICE).to(dtype)
    frames = torch.zeros(2, 1, 2, 2 * (HEIGHT // 2), 2 * (WIDTH // 2), 3, device=DEVICE)
    eager = foreign(x, frames[0])
    compiled = torch.compile(foreign, fullgraph=True)(x, frames[1])
    limit = ACROSS_DEVICES_TF32 if dtype == torch.float32 else KERNEL["bfloat16"]
    assert relative_error(compiled, eager) < limit
    assert relative_error(frames[1], frames[0]) < limit


def test_the_choice_is_this_card_s() -> None:
    """Kernels take 16 bits unless cuDNN was measured to be faster; cuDNN takes float32."""
    for dtype in (torch.bfloat16, torch.float32):
        x, (weight, bias, _) = view(1, 2, 8, 8, 96, dtype=dtype), parameters(96, 96, (3, 3, 3), dtype)
        choice = explain(causal_conv3d, x, weight, bias)
        assert choice.implementation in (("implicit GEMM", "cudnn") if dtype == torch.bfloat16 else ("cudnn",))
        assert "measured" in choice.reason or "cover" in choice.reason or "float32" in choice.reason
