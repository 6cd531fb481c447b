"""The operators on hardware: every compiled case, and what cases cannot say of convolutions, 8-bit rows and windows.

That is bits that no cut changes, roundings of the hardware, and graphs. Shapes, layouts and offsets beyond 32 bits are
tried in ``tests/interpreter``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.operators.check import check_case
from swifti2v_kernels import (
    QuantizedRows,
    causal_conv3d,
    dequantize_rows,
    embed_window,
    explain,
    fold_upsample_weight,
    frames_out,
    project_step,
    quantize_rows,
    rms_norm_silu,
    scaled_linear,
    upsample_conv2d,
)
from swifti2v_kernels.common.case import Case, all_cases
from tests.support.conv_oracle import convolved, scattered, upsampled, weights
from tests.support.quantized_oracle import excess, multiplied, ties, true_scales
from tests.support.tolerances import ACROSS_DEVICES_TF32, KERNEL, relative_error
from tests.support.window_oracle import int32, store

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HEIGHT, WIDTH = 100, 180
KINDS = [torch.int8, torch.float8_e4m3fn]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: float32 results. Tensor cores that keep 14 bits of a sum of float8 are off by 1.2e-4 when it is moved to float32
#: every 128 channels, and by 1e-3 (1,536 channels) to 1.1e-2 (13,824) if it never is. int8 is exact up to the scales.
SUMS = {torch.float8_e4m3fn: 3e-4, torch.int8: KERNEL["float32"]}


@pytest.fixture(autouse=True)
def _no_synchronisation() -> Iterator[None]:
    """Lets operators wait for the device again after a test."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def needs(capability: int) -> None:
    """Skips a test on older GPUs, which take the reference."""
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < capability:
        pytest.skip(f"needs compute capability {capability / 10}")


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> torch.dtype:
    """A dtype of 8 bits that this device's kernels round to and multiply."""
    if request.param == torch.float8_e4m3fn:
        needs(89)
    return request.param


def parameters(columns: int, channels: int, kernel: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """Returns weight, bias and norm weight."""
    return [x.to(DEVICE, dtype) for x in (*weights(columns, channels, kernel, dtype), torch.rand(columns) + 0.5)]


def frames(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns normal numbers ``[B, T, h, w, C]`` as a slice of a larger buffer that is NaN everywhere else."""
    return scattered(shape, dtype, device=DEVICE)


def rows(count: int, channels: int, kind: torch.dtype, gap: int = 0) -> QuantizedRows:
    """Returns rows of different sizes, a part of a buffer whose other bytes are NaN, or -1."""
    made = quantize_rows(torch.randn(count, channels, device=DEVICE) * torch.rand(count, 1, device=DEVICE), kind)
    buffer = torch.full((count, channels + gap), -1, dtype=torch.int8, device=DEVICE).view(kind)
    buffer[:, :channels].copy_(made.values)
    return made._replace(values=buffer[:, :channels])


def last(part: int, x: QuantizedRows) -> QuantizedRows:
    return QuantizedRows(x.values[-part:], x.scales[-part:])


@pytest.mark.parametrize("case", list(all_cases()), ids=lambda case: case.name)
def test_every_case_of_the_compile_report_is_right(case: Case) -> None:
    needs(case.least_capability)
    row = check_case(case, torch.device(DEVICE))
    assert row["status"] == "ok", row


@pytest.mark.parametrize("channels", [96, 192, 384])
def test_any_cut_in_time_gives_the_same_bits(channels: int) -> None:
    clip = torch.randn(1, 7, HEIGHT // 2, WIDTH // 2, channels, device=DEVICE).bfloat16()
    weight, bias, gamma = parameters(channels, channels, (3, 3, 3))
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
    weight, bias, gamma = parameters(channels, channels, (1, 3, 3))
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cudnn_behind_the_same_calls(dtype: torch.dtype) -> None:
    """cuDNN computes the same calls, also where its 3D convolutions are known not to work; float32 may be TF32."""
    limit = ACROSS_DEVICES_TF32 if dtype == torch.float32 else KERNEL[str(dtype).removeprefix("torch.")]
    x, past = (frames(1, 4, HEIGHT // 2, WIDTH // 2, 96, dtype=dtype) for _ in range(2))
    for kernel, stride, padding in (
        ((3, 3, 3), (1, 1, 1), (-1, 1, 1, -2)),
        ((1, 3, 3), (1, 2, 2), (0, 1, 0, 1)),
        ((3, 1, 1), (2, 1, 1), (0, 0, 0, 0)),
    ):
        weight, bias, _ = parameters(160, 96, kernel, dtype)
        options: dict[str, Any] = {"stride": stride, "padding": padding}
        options["past"] = past[:, :2] if kernel[0] == 3 else None
        assert explain(causal_conv3d, x, weight, bias, backend="torch", **options).implementation == "cudnn"
        y = causal_conv3d(x, weight, bias, backend="torch", **options)
        assert relative_error(y, convolved(x, weight, bias, **options)) < limit
    weight, bias, _ = parameters(96, 96, (1, 3, 3), dtype)
    y = upsample_conv2d(x, fold_upsample_weight(weight[:, :, 0]), bias, padding=(1, -2, 0, 1), backend="torch")
    assert relative_error(y, upsampled(x, weight[:, :, 0], bias, (1, -2, 0, 1))) < limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7, 10), (1, 3001, 1536), (1, 1000, 13824), (1, 64, 16384)])
def test_rows_are_rounded_to_the_nearest_codes(shape: tuple[int, ...], dtype: torch.dtype, kind: torch.dtype) -> None:
    """The middle between two codes goes to the even one, and rows that are not ordinary are those of the CPU."""
    x = (3 * torch.randn(shape, device=DEVICE) + 1).to(dtype)
    found = quantize_rows(x, kind, backend="triton")
    assert relative_error(found.scales, true_scales(x, kind)) < 1e-7
    assert excess(*found, x) < 4e-7
    middle, expected = ties(kind)
    assert torch.equal(quantize_rows(middle.to(DEVICE), kind).values.double().cpu(), expected)
    odd = torch.randn(9, 50)
    odd[0], odd[1], odd[2, 7], odd[3], odd[7] = 0.0, 1e-38, 1e30, 3.4e38, 1e-45
    odd[4, 3], odd[5, 0], odd[6, 49] = float("nan"), float("inf"), -float("inf")
    actual, known = QuantizedRows(*(part.cpu() for part in quantize_rows(odd.to(DEVICE), kind))), [0, 1, 2, 3, 7, 8]
    for a, b in zip(actual, quantize_rows(odd, kind), strict=True):
        assert torch.equal(a.float()[known], b.float()[known])
    assert actual.scales[4:7].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [*KINDS, torch.float8_e5m2], ids=str)
def test_every_code_is_decoded_bit_for_bit(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Every code is decoded bit for bit on every GPU, also where Triton has no float8."""
    values = torch.arange(256, dtype=torch.uint8).view(stored).expand(8, 256).contiguous()
    scales = torch.tensor([1.0, 0.37, -3e-5, 2e-39, 1e36, 0.0, float("inf"), float("nan")])
    expected = (values.float() * scales[:, None]).to(dtype)
    actual = dequantize_rows(values.to(DEVICE), scales.to(DEVICE), dtype=dtype, backend="triton").cpu()
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.view(bits)[~actual.isnan()], expected.view(bits)[~expected.isnan()])


@pytest.mark.parametrize(("channels", "columns"), [(1536, 8960), (3072, 3072), (13824, 5120), (1552, 48)])
def test_sums_of_8_bits_keep_their_precision(channels: int, columns: int, kind: torch.dtype) -> None:
    """Any number of tokens gives full tiles and ragged ones; what float8 loses in its sums shows in float32."""
    weight, bias = rows(columns, channels, kind), torch.randn(columns, device=DEVICE)
    for tokens in (1, 77, 2900):
        x = rows(tokens, channels, kind, gap=32)
        out = scaled_linear(x, weight, bias, dtype=torch.float32, backend="triton")
        assert torch.isfinite(out).all()
        assert relative_error(out[-64:], multiplied(last(64, x), weight, bias)) < SUMS[kind]
        y = scaled_linear(x, weight, bias, activation="gelu_tanh", backend="triton")
        assert relative_error(y[-64:], multiplied(last(64, x), weight, bias, "gelu_tanh")) < KERNEL["bfloat16"]


def decoder(backend: str) -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
    """Returns frames, and a piece of a decoder that makes others of them, some of them in place."""
    x, past = (frames(1, 2, HEIGHT // 2, WIDTH // 2, 192) for _ in range(2))
    (weight, bias, gamma), (head, head_bias, _) = parameters(192, 192, (3, 3, 3)), parameters(3, 192, (3, 3, 3))
    phases, by = fold_upsample_weight(weight[:, :, 1]), {"backend": backend}

    def piece(x: Tensor, past: Tensor) -> list[Tensor]:
        y, z = causal_conv3d(x, weight, bias, past=past, residual=x, norm_weight=gamma, **by)
        y = causal_conv3d(z, weight, bias, past=past, residual=y, **by)
        big = upsample_conv2d(y, phases, **by)
        rms_norm_silu(big, gamma, out=big, **by)
        bytes_ = x.new_empty(1, 2, *big.shape[2:4], 3, dtype=torch.uint8)
        return [big, frames_out(big, head, head_bias, bytes_, **by)]

    return [x, past], piece


def window(backend: str) -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
    """Returns latents, a step and tokens, and a window's beginning and end, which remember nothing else."""
    latents = store(16, 7, (16, 24), torch.float32, device=DEVICE)
    weight, head = (torch.randn(s, device=DEVICE).bfloat16() / 12 for s in ((1536, 16, 1, 2, 2), (64, 1536)))
    shift, scale = torch.randn(2, 3, 2, 1536, device=DEVICE).unbind(2)
    index, row = int32(6, -1, 0, 3, device=DEVICE), int32(0, 1, 2, 2, device=DEVICE)

    def ends(latents: Tensor, step: Tensor, x: Tensor) -> list[Tensor]:
        options = {"latent_index": index, "backend": backend}
        tokens = embed_window(latents, weight, reference=latents, reference_index=row, **options)
        store, options = latents.clone(), options | {"block_map": row, "step": step}
        return [tokens, project_step(tokens + x, head, None, shift, scale, store, **options)]

    return [latents, torch.full((1,), -0.5, device=DEVICE), torch.randn(2, 384, 1536, device=DEVICE).bfloat16()], ends


def layer(backend: str) -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
    """Returns tokens, and a linear layer of them in 8 bits."""
    weight, bias = rows(1536, 1536, torch.int8), torch.randn(1536, device=DEVICE)

    def linear(x: Tensor) -> list[Tensor]:
        made = quantize_rows(x, torch.int8, backend=backend)
        y = scaled_linear(made, weight, bias, activation="gelu_tanh", backend=backend)
        return [y, dequantize_rows(*made, backend=backend)]

    return [torch.randn(2, 300, 1536, device=DEVICE).bfloat16()], linear


@pytest.mark.parametrize(
    ("part", "backend"), [(decoder, "triton"), (decoder, "torch"), (window, "triton"), (layer, "triton")]
)
def test_one_graph_takes_the_numbers_of_the_moment(part: Callable[..., Any], backend: str) -> None:
    """Nothing waits for the device, and a captured graph is replayed with other numbers."""
    inputs, run = part(backend)
    run(*inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run(*inputs)
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*inputs)
    for _ in range(2):
        for x in inputs:
            x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip([x.clone() for x in captured], run(*inputs), strict=True):
            if backend == "triton":
                assert torch.equal(a, b)
            else:  # cuDNN may choose otherwise
                assert relative_error(a, b) < KERNEL["bfloat16"]


@pytest.mark.parametrize("part", [decoder, window, layer])
def test_compiled_functions_equal_eager_ones(part: Callable[..., Any]) -> None:
    inputs, run = part("auto")
    for a, b in zip(torch.compile(run, fullgraph=True)(*inputs), run(*inputs), strict=True):
        assert relative_error(a, b) < KERNEL["bfloat16"]
