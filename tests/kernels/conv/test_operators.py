"""The contract of a video autoencoder's operators on their torch path: numbers, gradients, graphs, costs.

Within ``pretend_gpu`` the CPU takes the path that cuDNN takes on a GPU, so that its slices and paddings are compared
too; there only the sums are another library's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swifti2v_kernels import (
    causal_conv3d,
    explain,
    fold_upsample_weight,
    frames_out,
    pretend_gpu,
    rms_norm_silu,
    upsample_conv2d,
)
from swifti2v_kernels.conv import by_torch
from swifti2v_kernels.conv.causal_conv3d import cost as conv_cost
from swifti2v_kernels.conv.frames_out import cost as frames_cost
from swifti2v_kernels.conv.upsample_conv2d import cost as upsample_cost
from swifti2v_kernels.norm.rms_norm_silu import cost as norm_cost
from tests.support.conv_oracle import convolved, normed, scattered, upsampled, weights
from tests.support.tolerances import EXACT, OPERATOR, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
#: Who computes: the sums of 2D convolutions that stand for the CPU, and what a GPU would be given.
PATHS = ["cpu", "cudnn", "cudnn without 3D"]


def tolerance(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float64 else OPERATOR[str(dtype).removeprefix("torch.")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Runs tests on one thread, since on tensors this small threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Returns the options of a call that takes the path of this name."""
    if request.param == "cudnn without 3D":
        monkeypatch.setattr(by_torch, "_conv3d_works", lambda dtype: False)
    within: AbstractContextManager[object] = nullcontext() if request.param == "cpu" else pretend_gpu(90)
    with within:
        yield {"backend": "torch"}


def untouched(views: Sequence[Tensor]) -> Callable[[], bool]:
    """Returns whether what surrounds the views of ``scattered`` is still NaN, and nothing else is."""
    before = [view._base.isnan() for view in views]
    return lambda: all(torch.equal(view._base.isnan(), b) for view, b in zip(views, before, strict=True))


def check_in_place(call: Callable[..., Any], x: Tensor, residual: Tensor, expected: Tensor, gamma: Tensor) -> Tensor:
    """Checks that the sum goes into the residual and the norm of what was stored into given memory, which is returned.

    What is around them stays.
    """
    given = scattered(expected.shape, x.dtype)
    intact = untouched((x, residual, given))
    results = call(out=residual, normed=given)
    assert results[0] is residual
    assert results[1] is given
    assert intact()
    assert relative_error(residual, expected) < tolerance(x.dtype)
    assert relative_error(given, normed(residual, gamma)) < tolerance(x.dtype)
    return given


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "columns", "kernel", "stride", "past", "padding"),
    [
        (12, 20, (3, 3, 3), (1, 1, 1), 2, (1, 1, 1, 1)),
        (8, 8, (3, 3, 3), (1, 1, 1), 1, (0, 1, 1, 0)),  # a tile in a corner, one frame of history
        (8, 16, (3, 3, 3), (1, 1, 1), 0, (1, -1, -2, 0)),  # pixels left out
        (8, 4, (3, 3, 3), (1, 1, 1), 2, (-2, 3, 0, 2)),  # more zeros than the kernel reaches
        (3, 16, (1, 3, 3), (1, 2, 2), 0, (0, 1, 0, 1)),  # half frames
        (3, 16, (1, 3, 3), (1, 2, 1), 0, (1, 1, 0, 1)),
        (8, 8, (3, 1, 1), (2, 1, 1), 1, (0, 0, 0, 0)),  # half rate; of five frames the last is no result's
        (8, 8, (3, 3, 1), (3, 2, 3), 2, (-1, 0, 2, -1)),
        (8, 8, (2, 3, 2), (3, 1, 1), 1, (1, 1, 1, 0)),  # frames that no tap sees
        (8, 8, (4, 1, 1), (1, 1, 1), 3, (0, 0, 0, 0)),  # more taps in time than a kernel has
        (4, 200, (1, 1, 1), (1, 1, 1), 0, (0, 0, 0, 0)),
    ],
)
def test_convolution_against_float64(
    channels: int,
    columns: int,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    past: int,
    padding: tuple[int, int, int, int],
    dtype: torch.dtype,
    path: dict[str, Any],
) -> None:
    x = scattered((2, 5, 7, 9, channels), dtype)
    history = scattered((2, past, 7, 9, channels), dtype) if past else None
    weight, bias = weights(columns, channels, kernel, dtype)
    options: dict[str, Any] = {"past": history, "stride": stride, "padding": padding}
    expected = convolved(x, weight, bias, **options)
    y = causal_conv3d(x, weight, bias, **options, **path)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_error(y, expected) < tolerance(dtype)
    residual, gamma = scattered(expected.shape, dtype), torch.rand(columns).to(dtype) + 0.5
    expected = convolved(x, weight, None, residual=residual, **options)
    options |= {"residual": residual, "norm_weight": gamma, **path}
    alone = causal_conv3d(x, weight, keep_sum=False, **options)
    given = check_in_place(functools.partial(causal_conv3d, x, weight, **options), x, residual, expected, gamma)
    assert torch.equal(alone, given)


def test_defaults_keep_the_size() -> None:
    x, (weight, _) = torch.randn(1, 2, 4, 5, 8), weights(8, 8, (3, 3, 5), torch.float32)
    assert relative_error(causal_conv3d(x, weight), convolved(x, weight, None)) < OPERATOR["float32"]
    frames = torch.zeros(1, 2, 4, 5, 3)
    assert frames_out(x, weights(3, 8, (1, 5, 3), torch.float32)[0], None, frames).any()


@pytest.mark.parametrize(("stride", "pieces"), [(1, (1, 1, 1, 3)), (1, (1, 5)), (2, (2, 4)), (2, (4, 2))], ids=str)
def test_a_clip_in_pieces_is_the_clip(stride: int, pieces: tuple[int, ...]) -> None:
    clip, (weight, bias) = torch.randn(1, 6, 4, 5, 8), weights(8, 8, (3, 3, 3), torch.float32)
    whole, start, parts = causal_conv3d(clip, weight, bias, stride=(stride, 1, 1)), 0, []
    for n in pieces:
        past = clip[:, max(start - 2, 0) : start] if start else None
        parts.append(causal_conv3d(clip[:, start : start + n], weight, bias, past=past, stride=(stride, 1, 1)))
        start += n
    assert relative_error(torch.cat(parts, 1), whole) < OPERATOR["float32"]


@pytest.mark.parametrize("path", PATHS[:2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "columns", "padding"),
    [
        (12, 20, (1, 1, 1, 1)),
        (8, 16, (0, 1, 1, 0)),
        (8, 16, (-1, -2, 0, -3)),
        (8, 8, (-2, 1, -3, 1)),
        (4, 200, (1, 0, -4, 1)),
    ],
)
def test_upsampling_against_float64(
    channels: int, columns: int, padding: tuple[int, int, int, int], dtype: torch.dtype, path: dict[str, Any]
) -> None:
    x = scattered((2, 2, 4, 5, channels), dtype)
    weight, bias = weights(columns, channels, (1, 3, 3), dtype)
    # Multiples of 2**-5, of which sums are exact in 16 bits: the operator alone is compared, not the folding.
    weight = ((weight[:, :, 0].double() * 32).round().clamp(-8, 8) / 32).to(dtype)
    phases, gamma = fold_upsample_weight(weight), torch.rand(columns).to(dtype) + 0.5
    y = upsample_conv2d(x, phases, bias, padding=padding, **path)
    assert y.dtype == dtype
    assert relative_error(y, upsampled(x, weight, bias, padding)) < tolerance(dtype)
    residual = scattered(y.shape, dtype)
    expected = upsampled(x, weight, None, padding) + residual.double()
    options: dict[str, Any] = {"padding": padding, "residual": residual, "norm_weight": gamma, **path}
    check_in_place(functools.partial(upsample_conv2d, x, phases, **options), x, residual, expected, gamma)


def test_phases_share_out_the_nine_taps() -> None:
    weight = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    phases = fold_upsample_weight(weight)
    assert phases.shape == (4, 8, 2, 2, 6)
    assert relative_error(phases.sum((2, 3)), weight.sum((2, 3)).expand(4, 8, 6)) < EXACT
    # Even rows: one row of taps above, two on the pixel's own; odd rows: two and one below. Columns likewise.
    assert torch.equal(phases[0, :, 0, 0], weight[:, :, 0, 0])
    assert torch.equal(phases[1, :, 0, 1], weight[:, :, 0, 2])
    assert torch.equal(phases[0, :, 1, 0], weight[:, :, 1, 0] + weight[:, :, 2, 0])
    assert torch.equal(phases[2, :, 1, 0], weight[:, :, 2, 0])
    assert torch.equal(phases[2, :, 0, 0], weight[:, :, 0, 0] + weight[:, :, 1, 0])
    assert relative_error(phases[3, :, 0, 0], weight[:, :, :2, :2].sum((2, 3))) < EXACT


@pytest.mark.parametrize(("dtype", "claimed"), [(torch.bfloat16, 1.7e-3), (torch.float32, 4e-8)], ids=str)
def test_folding_costs_what_its_file_says(dtype: torch.dtype, claimed: float) -> None:
    """Folded weights cost what the file says: sums rounded once, everything else in float64."""
    weight, x = torch.randn(192, 192, 3, 3).to(dtype), torch.randn(1, 1, 16, 16, 192).double()
    expected = upsampled(x, weight, None)
    moved = relative_error(upsample_conv2d(x, fold_upsample_weight(weight).double()), expected)
    assert claimed / 2 < moved < claimed
    assert moved < 1.5 * relative_error(expected.to(dtype), expected)  # as much as the result's own rounding


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch", [1, 2])
def test_frames_against_float64(patch: int, dtype: torch.dtype, path: dict[str, Any]) -> None:
    """Frames are written as bytes and as clamped numbers into a part of larger frames; the rest stays."""
    x, past = scattered((2, 2, 5, 7, 12), dtype, 2.0), scattered((2, 1, 5, 7, 12), dtype, 2.0)
    weight, bias = weights(3 * patch * patch, 12, (3, 3, 3), dtype)
    options: dict[str, Any] = {"past": past, "padding": (1, 0, -1, 1)}
    v = convolved(x, weight, bias, **options)
    # Features are (colour, column, row).
    v = v.unflatten(4, (3, patch, patch)).permute(0, 1, 2, 6, 3, 5, 4).flatten(2, 3).flatten(3, 4)
    assert (v.abs() > 1).any()
    options |= {"patch_size": patch, **path}

    def target(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frames = torch.full((2, 4, v.shape[2] + 3, v.shape[3] + 2, 3), 7, dtype=dtype)
        return frames, frames[:, 1:-1, 1:-2, 2:]

    frames, out = target(torch.uint8)
    assert frames_out(x, weight, bias, out, **options) is out
    expected = (v * 127.5 + 128).floor().clamp(0, 255)
    # A byte differs where rounding in front of it moves it over a boundary; 2D convolutions round each tap's sum.
    assert ((out.double() - expected).abs() <= (2 if dtype == torch.bfloat16 else 1)).all()
    assert (out.double() != expected).float().mean() < {2: 0.25, 4: 2e-3, 8: 2e-3}[dtype.itemsize]
    assert (frames == 7).sum() >= frames.numel() - out.numel()
    for kind in (torch.float32, torch.bfloat16):
        limit = max(tolerance(dtype), tolerance(kind))
        frames, out = target(kind)
        frames_out(x, weight, bias, out, **options)
        assert relative_error(out, v.clamp(-1, 1)) < limit


def test_numbers_become_the_bytes_of_their_pixels() -> None:
    """-1 becomes 0, 1 becomes 255, and what is beyond or between goes to the nearest end or the byte below."""
    values = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0])
    x, out = values.view(1, 1, 1, 7, 1), torch.empty(1, 1, 1, 7, 3, dtype=torch.uint8)
    weight = torch.ones(3, 1, 1, 1, 1).to(memory_format=torch.channels_last_3d)
    frames_out(x, weight, None, out)
    assert out[0, 0, 0, :, 2].tolist() == [0, 0, 64, 128, 191, 255, 255]
    wide = torch.empty(1, 1, 1, 7, 3)
    x[..., 0, 0] = float("nan")
    assert frames_out(x, weight, None, wide)[..., 0, :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 12, 384])
def test_norm_against_float64(channels: int, dtype: torch.dtype) -> None:
    x, gamma = scattered((2, 2, 3, 5, channels), dtype), torch.rand(channels).to(dtype) + 0.5
    x[:, :, 1, 2] = 0
    expected = normed(x, gamma)
    y, given = rms_norm_silu(x, gamma), scattered(x.shape, dtype)
    assert relative_error(y, expected) < tolerance(dtype)
    intact = untouched((x, given))
    assert rms_norm_silu(x, gamma, out=given) is given
    assert rms_norm_silu(x, gamma, out=x) is x
    assert intact()
    assert torch.equal(given, y)
    assert torch.equal(x, y)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_gradients_are_those_of_the_formula(path: dict[str, Any]) -> None:
    x, past, residual = double(1, 4, 5, 4, 3), double(1, 2, 5, 4, 3), double(1, 2, 3, 4, 5)
    weight, bias = weights(5, 3, (3, 3, 3), torch.float64)
    options: dict[str, Any] = {"stride": (2, 2, 1), "padding": (1, 1, 2, 0)}
    gamma = double(5)
    inputs = (x, past, residual, weight.requires_grad_(), bias.requires_grad_(), gamma)
    y, z = causal_conv3d(x, weight, bias, past=past, residual=residual, norm_weight=gamma, **options, **path)
    a, b = torch.randn_like(y), torch.randn_like(z)
    total = convolved(x, weight, bias, past, residual=residual, **options)
    expected = torch.autograd.grad((total, normed(total, gamma)), inputs, (a, b))
    for actual, wanted in zip(torch.autograd.grad((y, z), inputs, (a, b)), expected, strict=True):
        assert relative_error(actual, wanted) < EXACT
    assert "gradients" in explain(causal_conv3d, x, weight).reason


@pytest.mark.parametrize("path", PATHS[:2], indirect=True)
def test_gradients_of_upsampling_are_those_of_the_formula(path: dict[str, Any]) -> None:
    """Gradients pass through the folding too, up to the weight that a model holds."""
    x, weight, bias, gamma = double(1, 2, 3, 2, 3), double(5, 3, 3, 3), double(5), double(5)
    inputs, padding = (x, weight, bias, gamma), (1, 0, -1, 1)
    y, z = upsample_conv2d(x, fold_upsample_weight(weight), bias, padding=padding, norm_weight=gamma, **path)
    a, b = torch.randn_like(y), torch.randn_like(z)
    total = upsampled(x, weight, bias, padding)
    expected = torch.autograd.grad((total, normed(total, gamma)), inputs, (a, b))
    for actual, wanted in zip(torch.autograd.grad((y, z), inputs, (a, b)), expected, strict=True):
        assert relative_error(actual, wanted) < EXACT
    assert "gradients" in explain(upsample_conv2d, x, fold_upsample_weight(weight)).reason


def test_gradients_against_differences() -> None:
    x, past, gamma = double(1, 2, 2, 3, 2), double(1, 1, 2, 3, 2), double(3)
    weight, bias = (t.requires_grad_() for t in weights(3, 2, (3, 1, 3), torch.float64))

    def conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Any:
        return causal_conv3d(x, weight, bias, past=past, padding=(0, 0, 1, -1), norm_weight=gamma)

    assert torch.autograd.gradcheck(conv, (x, past, weight, bias, gamma))
    phases, bias = double(4, 3, 2, 2, 2), double(3)
    assert torch.autograd.gradcheck(
        lambda x, phases, bias, gamma: upsample_conv2d(x, phases, bias, padding=(1, 0, 1, 1), norm_weight=gamma),
        (x, phases, bias, gamma),
    )
    assert torch.autograd.gradcheck(rms_norm_silu, (x, double(2)))


def test_gradients_of_a_pixel_of_zeros_are_not_nan() -> None:
    x, gamma = torch.randn(1, 1, 2, 3, 4, dtype=torch.float64), double(4)
    x[:, :, 0, 0] = 0
    x.requires_grad_()
    actual, expected = (torch.autograd.grad(f(x, gamma).sum(), x)[0] for f in (rms_norm_silu, normed))
    assert relative_error(actual[:, :, 0, :1], expected[:, :, 0, :1]) < EXACT
    assert relative_error(actual[:, :, :, 1:], expected[:, :, :, 1:]) < EXACT


def modules(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Returns a model of someone else's that calls every operator, with history, halo, residual and norms."""
    (weight, bias), gamma = weights(16, 16, (3, 3, 3), dtype), torch.rand(16).to(dtype)
    phases = fold_upsample_weight(weight[:, :, 0]).to(device)
    head = weight[:3].contiguous(memory_format=torch.channels_last_3d).to(device)
    weight, bias, gamma = weight.to(device), bias.to(device), gamma.to(device)

    def foreign(x: Tensor, frames: Tensor) -> list[Tensor]:
        y, z = causal_conv3d(x + 1, weight, bias, residual=x, norm_weight=gamma, past=x[:, :1])
        z = causal_conv3d(z[:, :, 1:], weight, padding=(0, 1, 1, 1), norm_weight=gamma, keep_sum=False)
        big = upsample_conv2d(z, phases, bias)
        rms_norm_silu(big, gamma, out=big)
        frames_out(big, head, None, frames)
        return [y, big, frames + 1]

    return foreign


def test_they_compile_as_one_graph_within_a_foreign_module() -> None:
    x, foreign = torch.randn(1, 2, 4, 5, 16), modules()
    frames, expected_frames = torch.zeros(1, 2, 4, 10, 3), torch.zeros(1, 2, 4, 10, 3)
    expected = foreign(x, expected_frames)
    actual = torch.compile(foreign, fullgraph=True, backend="aot_eager")(x, frames)
    for a, e in zip((*actual, frames), (*expected, expected_frames), strict=True):
        assert relative_error(a, e) < OPERATOR["float32"]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.")
def test_the_choice_of_a_gpu_is_made_while_tracing() -> None:
    """Tensors without contents suffice: the table is read, and the kernels' operators stand in the one graph."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def compiled(dtype: torch.dtype) -> list[str]:
        x, frames = torch.empty(1, 2, 4, 5, 16, dtype=dtype, device="meta"), torch.empty(1, 2, 4, 10, 3, device="meta")
        results = torch.compile(modules(dtype, "meta"), fullgraph=True, backend=backend)(x, frames)
        assert [tuple(y.shape[2:]) for y in results] == [(4, 5, 16), (4, 10, 16), (4, 10, 3)]
        return graphs[-1]

    torch._dynamo.reset()
    with pretend_gpu(90):
        kernels = [name.split(".")[1] for name in compiled(torch.bfloat16) if name.startswith("swifti2v.")]
        assert kernels == ["causal_conv3d", "causal_conv3d", "upsample_conv2d", "rms_norm_silu", "frames_out"]
        kernels = [name.split(".")[1] for name in compiled(torch.float32) if name.startswith("swifti2v.")]
        # cuDNN's sums, and the norms after two of them by their own kernel.
        assert kernels == ["rms_norm_silu"] * 3
    assert len(graphs) == 2


def test_costs_count_what_must_move() -> None:
    plain, full = conv_cost(1000, 96, 192, 27), conv_cost(1000, 96, 192, 27, residual=True, results=2)
    assert plain.flops == full.flops == 2 * 1000 * 96 * 192 * 27
    assert plain.bytes_read == (1000 * 96 + 96 * 192 * 27) * 2
    assert plain.bytes_written == 1000 * 192 * 2
    assert full.bytes_read == plain.bytes_read + plain.bytes_written
    assert full.bytes_written == 2 * plain.bytes_written
    big = upsample_cost(4000, 192, 96, results=2, itemsize=4)
    assert big.flops == 2 * 4000 * 192 * 96 * 4
    assert big.bytes_read == (1000 * 192 + 4 * 96 * 4 * 192) * 4
    assert big.bytes_written == 2 * 4000 * 96 * 4
    assert upsample_cost(4000, 192, 96, residual=True).bytes_read == (1000 * 192 + 4000 * 96 + 16 * 96 * 192) * 2
    head = frames_cost(1000, 256, 27, 2)
    assert head.flops == 2 * 1000 * 256 * 12 * 27
    assert head.bytes_read == (1000 * 256 + 12 * 256 * 27) * 2
    assert head.bytes_written == 4000 * 3
    norm = norm_cost(1000, 384)
    assert norm.flops == 8 * 384_000
    assert norm.bytes_read == norm.bytes_written == 768_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_counts_their_operations(dtype: torch.dtype) -> None:
    """torch counts operations of tensors without contents as on a GPU: by the kernels in 16 bits, by cuDNN in 32."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def counted(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    x, weight = empty(2, 4, 10, 12, 96), empty(160, 3, 3, 3, 96).permute(0, 4, 1, 2, 3)
    gamma, wide, gammas = empty(160), empty(384, 1, 3, 3, 96).permute(0, 4, 1, 2, 3), empty(384)
    products = 96 * 160 * 27
    with pretend_gpu(90):
        assert counted(lambda: causal_conv3d(x, weight, past=x[:, :2])) == 2 * (2 * 4 * 120) * products
        options: dict[str, Any] = {"stride": (2, 1, 1), "padding": (0, 0, 1, 1), "norm_weight": gamma}
        assert counted(lambda: causal_conv3d(x, weight, keep_sum=False, **options)) == 2 * (2 * 2 * 8 * 12) * products
        # The norm of so many channels is an operator of its own, without products.
        assert counted(lambda: causal_conv3d(x, wide, norm_weight=gammas)) == 2 * (2 * 4 * 120) * 96 * 384 * 9
        y, z = causal_conv3d(x, wide, norm_weight=gammas, keep_sum=True)
        assert y.shape == z.shape == (2, 4, 10, 12, 384)
        out = empty(2, 4, 10, 12, 3, dtype=torch.uint8)
        head = weight[:3]
        assert counted(lambda: frames_out(x, head, None, out)) == 2 * (2 * 4 * 120) * 96 * 3 * 27
        if dtype == torch.bfloat16:  # cuDNN's paddings are more pixels of each phase
            phases = empty(4, 160, 2, 2, 96)
            expected = 2 * (2 * 4 * 19 * 24) * 96 * 160 * 4
            assert counted(lambda: upsample_conv2d(x, phases, padding=(0, 1, 1, 1), norm_weight=gamma)) == expected
