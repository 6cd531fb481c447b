"""The kernels of the video autoencoder against float64, over awkward shapes, layouts, histories and cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swifti2v_kernels import causal_conv3d, explain, fold_upsample_weight, frames_out, rms_norm_silu, upsample_conv2d
from swifti2v_kernels.conv.causal_conv3d import _causal_conv3d_op
from swifti2v_kernels.conv.frames_out import _frames_out_op
from swifti2v_kernels.conv.upsample_conv2d import _upsample_conv2d_op
from swifti2v_kernels.norm.rms_norm_silu import _rms_norm_silu_op
from tests.support.conv_oracle import convolved, normed, scattered, upsampled, weights
from tests.support.tolerances import KERNEL, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def limit(dtype: torch.dtype) -> float:
    return KERNEL[str(dtype).removeprefix("torch.")]


CONVOLUTIONS = {
    "neither channels nor columns fill their tiles": (12, 20, (3, 3, 3), (1, 1, 1), 2, (1, 1, 1, 1)),
    "a tile in a corner, one frame of history": (64, 16, (3, 3, 3), (1, 1, 1), 1, (0, 1, 1, 0)),
    "two accumulators, pixels left out": (96, 96, (3, 3, 3), (1, 1, 1), 0, (1, -1, -2, 0)),
    "half frames": (3, 160, (1, 3, 3), (1, 2, 2), 0, (0, 1, 0, 1)),
    "half rate": (24, 24, (3, 1, 1), (2, 1, 1), 1, (0, 0, 0, 0)),
    "in time": (24, 48, (3, 1, 1), (1, 1, 1), 2, (0, 0, 0, 0)),
    "several programs share a pixel": (40, 200, (1, 1, 1), (1, 1, 1), 0, (0, 0, 0, 0)),
    "even kernel": (16, 8, (2, 3, 2), (1, 1, 1), 1, (1, 1, 1, 0)),
}
#: All in bfloat16, some in the others too.
CASES = [
    *((name, torch.bfloat16) for name in CONVOLUTIONS),
    *((name, torch.float32) for name in ("a tile in a corner, one frame of history", "half frames", "half rate")),
    *((name, torch.float16) for name in ("several programs share a pixel", "even kernel")),
]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("length", [1e-15, 1e-11, 1e-8, 1e-4])
def test_pixels_of_any_length_are_normed_to_one(length: float, backend: str) -> None:
    """The floor of the length is 1e-12, in all three operators: far above it, short pixels are as long as others."""
    x = length * F.normalize(scattered((1, 1, 3, 4, 16), torch.float32), dim=-1)
    gamma = torch.rand(16) + 0.5
    weight = torch.eye(16).view(16, 16, 1, 1, 1).contiguous(memory_format=torch.channels_last_3d)
    phases = torch.zeros(4, 16, 2, 2, 16)
    for i, phase in enumerate(phases):
        phase[:, 1 - i // 2, 1 - i % 2] = torch.eye(16)
    expected = normed(x, gamma)
    assert relative_error(rms_norm_silu(x, gamma, backend=backend), expected) < KERNEL["float32"]
    y = causal_conv3d(x, weight, norm_weight=gamma, keep_sum=False, backend=backend)
    assert relative_error(y, expected) < KERNEL["float32"]
    _, y = upsample_conv2d(x, phases, norm_weight=gamma, backend=backend)
    doubled = expected.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert relative_error(y, doubled) < KERNEL["float32"]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_convolution_against_float64(name: str, dtype: torch.dtype) -> None:
    channels, columns, kernel, stride, past, padding = CONVOLUTIONS[name]
    x = scattered((2, 2, 7, 9, channels), dtype)
    history = scattered((2, past, 7, 9, channels), dtype) if past else None
    weight, bias = weights(columns, channels, kernel, dtype)
    options: dict[str, Any] = {"past": history, "stride": stride, "padding": padding}
    assert explain(causal_conv3d, x, weight, bias, **options).implementation == "implicit GEMM"
    expected = convolved(x, weight, bias, **options)
    assert relative_error(causal_conv3d(x, weight, bias, **options), expected) < limit(dtype)
    residual = scattered(expected.shape, dtype)
    gamma = torch.rand(columns).to(dtype) + 0.5
    total = convolved(x, weight, None, residual=residual, **options)
    y, z = causal_conv3d(x, weight, None, residual=residual, norm_weight=gamma, **options)
    assert relative_error(y, total) < limit(dtype)
    # The norm reads the rounded sum.
    assert relative_error(z, normed(y, gamma)) < limit(dtype)
    alone = causal_conv3d(x, weight, None, residual=residual, norm_weight=gamma, keep_sum=False, **options)
    assert torch.equal(alone, z)


def test_history_in_another_layout_and_results_in_given_memory() -> None:
    """The residual is overwritten by the result, and around the results everything stays as it was."""
    x, past = scattered((1, 2, 5, 6, 24), torch.float16), torch.randn(1, 2, 5, 6, 24).half()
    weight, bias = weights(24, 24, (3, 3, 3), torch.float16)
    residual, z = (scattered((1, 2, 4, 5, 24), torch.float16) for _ in range(2))
    buffers = [y._base for y in (residual, z)]
    before = [buffer.isnan() for buffer in buffers]
    options: dict[str, Any] = {"past": past, "padding": (0, 1, 1, 0)}
    expected = convolved(x, weight, bias, residual=residual, **options)
    gamma = torch.rand(24).half()
    results = causal_conv3d(x, weight, bias, residual=residual, norm_weight=gamma, out=residual, normed=z, **options)
    assert results[0] is residual
    assert results[1] is z
    assert relative_error(residual, expected) < limit(torch.float16)
    assert relative_error(z, normed(residual, gamma)) < limit(torch.float16)
    assert all(torch.equal(buffer.isnan(), b) for buffer, b in zip(buffers, before, strict=True))


def whole_numbers(*tensors: Tensor) -> list[Tensor]:
    """Returns the same layouts with small whole numbers: their sums are exact in float32, whatever their order.

    The interpreter leaves the order to NumPy; that a cut does not change it is proved on hardware (tests/gpu).
    """
    return [x.copy_(torch.randint(-4, 5, x.shape)) for x in tensors]


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (1, 4), (2, 3)], ids=str)
def test_any_cut_in_time_gives_the_same_numbers(pieces: tuple[int, ...]) -> None:
    clip, weight, bias = whole_numbers(torch.empty(1, 5, 4, 5, 16), *weights(16, 16, (3, 3, 3), torch.float32))
    whole, start, parts = causal_conv3d(clip, weight, bias), 0, []
    for n in pieces:
        past = clip[:, max(start - 2, 0) : start] if start else None
        parts.append(causal_conv3d(clip[:, start : start + n], weight, bias, past=past))
        start += n
    assert torch.equal(torch.cat(parts, 1), whole)


def test_any_cut_in_space_gives_the_same_numbers() -> None:
    """A tile reads its halo where it lies in the whole frame, and pads at the frame's borders only."""
    height, width = 9, 11
    frame = torch.empty(1, 1, height, width, 24)
    frame, weight, bias = whole_numbers(frame, *weights(16, 24, (1, 3, 3), torch.float32))
    phases = fold_upsample_weight(weight[:, :, 0])
    whole, big = causal_conv3d(frame, weight, bias), upsample_conv2d(frame, phases, bias)
    for y0, y1 in ((0, 4), (4, 5), (5, height)):
        for x0, x1 in ((0, 7), (7, width)):
            top, bottom, left, right = inner = (y0 > 0, y1 < height, x0 > 0, x1 < width)
            x = frame[:, :, y0 - top : y1 + bottom, x0 - left : x1 + right]
            tile = causal_conv3d(x, weight, bias, padding=[1 - halo for halo in inner])
            assert torch.equal(tile, whole[:, :, y0:y1, x0:x1])
            # A halo pixel is two upsampled ones, of which the convolution needs one: -1 leaves the other out.
            tile = upsample_conv2d(x, phases, bias, padding=[-1 if halo else 1 for halo in inner])
            assert torch.equal(tile, big[:, :, 2 * y0 : 2 * y1, 2 * x0 : 2 * x1])


def test_a_frame_that_needs_64_bits() -> None:
    """A column stride of 2**29 elements puts the fifth column beyond 2**31; untouched pages cost no memory."""
    buffer = torch.empty(2**31 + 2**29 + 64, dtype=torch.float16)
    x = buffer.as_strided((1, 1, 1, 6, 8), (0, 0, 0, 2**29, 1))
    x.copy_(torch.randn(x.shape))
    weight, bias = weights(8, 8, (1, 1, 3), torch.float16)
    assert relative_error(causal_conv3d(x, weight, bias), convolved(x, weight, bias)) < limit(torch.float16)


@pytest.mark.parametrize(
    ("channels", "columns", "padding", "dtype"),
    [
        (12, 20, (1, 1, 1, 1), torch.float32),
        (32, 96, (0, 1, 1, 0), torch.bfloat16),
        (8, 16, (-1, -2, -2, -3), torch.float16),
        (64, 200, (1, 0, 0, 1), torch.bfloat16),
    ],
    ids=str,
)
def test_upsampling_against_float64(channels: int, columns: int, padding: tuple[int, ...], dtype: torch.dtype) -> None:
    x = scattered((2, 2, 4, 5, channels), dtype)
    weight, bias = weights(columns, channels, (1, 3, 3), dtype)
    # Sums of two or four weights that are multiples of 2**-5: exact in 16 bits, so that only the products are compared.
    weight = ((weight[:, :, 0].float() * 32).round().clamp(-8, 8) / 32).to(dtype)
    phases, gamma = fold_upsample_weight(weight), torch.rand(columns).to(dtype) + 0.5
    expected = upsampled(x, weight, bias, padding)
    y = upsample_conv2d(x, phases, bias, padding=padding)
    assert relative_error(y, expected) < limit(dtype)
    residual = scattered(expected.shape, dtype)
    total = upsampled(x, weight, None, padding) + residual.double()
    sums, z = upsample_conv2d(x, phases, padding=padding, residual=residual, norm_weight=gamma, out=residual)
    assert sums is residual
    assert relative_error(sums, total) < limit(dtype)
    assert relative_error(z, normed(sums, gamma)) < limit(dtype)


def test_upsampling_one_pixel_to_one() -> None:
    """Three of the four phases have nothing to do when one pixel becomes one."""
    x, (weight, bias) = torch.randn(1, 1, 1, 1, 8), weights(16, 8, (1, 3, 3), torch.float32)
    y = upsample_conv2d(x, fold_upsample_weight(weight[:, :, 0]), bias, padding=(1, 0, 0, 1))
    assert relative_error(y, upsampled(x, weight[:, :, 0], bias, (1, 0, 0, 1))) < limit(torch.float32)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frames_against_float64(patch: int, dtype: torch.dtype) -> None:
    """Frames are written as bytes and as clamped numbers into a part of larger frames; the rest stays."""
    x, past = scattered((2, 2, 5, 7, 24), dtype, 2.0), scattered((2, 1, 5, 7, 24), dtype, 2.0)
    weight, bias = weights(3 * patch * patch, 24, (3, 3, 3), dtype)
    padding = (1, 0, 0, 1)
    v = convolved(x, weight, bias, past, padding=padding)
    v = v.unflatten(4, (3, patch, patch)).permute(0, 1, 2, 6, 3, 5, 4).flatten(2, 3).flatten(3, 4)
    assert (v.abs() > 1).any()
    height, width = v.shape[2:4]

    def target(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frames = torch.full((2, 3, height + 3, width + 2, 3), 7, dtype=dtype)
        return frames, frames[:, 1:, 1:-2, 2:]

    options: dict[str, Any] = {"past": past, "padding": padding, "patch_size": patch}
    frames, out = target(torch.uint8)
    assert frames_out(x, weight, bias, out, **options) is out
    expected = (v * 127.5 + 128).floor().clamp(0, 255)
    # A byte differs where rounding in front of it moves it over a boundary.
    assert ((out.double() - expected).abs() <= 1).all()
    assert (out.double() != expected).float().mean() < {2: 0.2, 4: 1e-3}[dtype.itemsize]
    assert (frames == 7).sum() >= frames.numel() - out.numel()
    frames, out = target(torch.float32)
    frames_out(x, weight, bias, out, **options)
    assert relative_error(out, v.clamp(-1, 1)) < limit(dtype)


def test_nan_stays_nan_in_floating_frames() -> None:
    x, (weight, bias) = torch.zeros(1, 1, 3, 3, 8), weights(3, 8, (1, 1, 1), torch.float32)
    x[0, 0, 1, 1, 0] = float("nan")
    out = torch.zeros(1, 1, 3, 3, 3)
    frames_out(x, weight, bias, out)
    assert out.isnan().sum() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 12, 96, 384])
def test_norm_against_float64(channels: int, dtype: torch.dtype) -> None:
    x, gamma = scattered((2, 2, 3, 5, channels), dtype), torch.rand(channels).to(dtype) + 0.5
    x[:, :, 1, 2] = 0
    expected = normed(x, gamma)
    assert relative_error(rms_norm_silu(x, gamma), expected) < limit(dtype)
    assert rms_norm_silu(x, gamma, out=x) is x
    assert relative_error(x, expected) < limit(dtype)


def test_schemas_and_fakes_hold() -> None:
    x, past = torch.randn(2, 1, 2, 4, 5, 16).unbind()
    (weight, bias), gamma = weights(16, 16, (3, 3, 3), torch.float32), torch.rand(16)
    y, z = torch.empty(2, 1, 2, 4, 5, 16).unbind()
    y, z = y.clone(), z.clone()
    rest = ([1, 1, 1], [1, 1, 1, 1])
    torch.library.opcheck(_causal_conv3d_op, (x.clone(), weight, bias, past.clone(), *rest, None, gamma, y, z))
    torch.library.opcheck(_causal_conv3d_op, (x.clone(), weight, None, None, *rest, y, None, z, None))
    phases, big = fold_upsample_weight(weight[:, :, 0]), torch.empty(1, 2, 8, 10, 16)
    torch.library.opcheck(_upsample_conv2d_op, (x.clone(), phases, bias, None, None, [1, 1, 1, 1], big, None))
    kernel, frames = weight[:3].contiguous(memory_format=torch.channels_last_3d), torch.zeros(1, 2, 4, 5, 3)
    arguments = (x.clone(), kernel, None, None, [1, 1, 1, 1], 1, frames)
    torch.library.opcheck(_frames_out_op, arguments)
    torch.library.opcheck(_rms_norm_silu_op, (x.clone(), gamma, y))


def test_they_compile_as_one_graph_within_a_foreign_module() -> None:
    (weight, bias), gamma = weights(16, 16, (3, 3, 3), torch.float32), torch.rand(16)
    phases = fold_upsample_weight(weight[:, :, 0])
    head = weight[:3].contiguous(memory_format=torch.channels_last_3d)

    def foreign(x: Tensor, frames: Tensor) -> list[Tensor]:
        y, z = causal_conv3d(x + 1, weight, bias, residual=x, norm_weight=gamma, past=x[:, :1])
        z = causal_conv3d(z[:, :, 1:], weight, padding=(0, 1, 1, 1), norm_weight=gamma, keep_sum=False)
        big = rms_norm_silu(upsample_conv2d(z, phases, bias), gamma)
        frames_out(big, head, None, frames)
        return [y, big, frames + 1]

    x = torch.randn(1, 2, 4, 5, 16)
    expected = foreign(x, torch.zeros(1, 2, 4, 10, 3))
    actual = torch.compile(foreign, fullgraph=True, backend="aot_eager")(x, torch.zeros(1, 2, 4, 10, 3))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_what_has_no_kernel_takes_the_reference() -> None:
    x, (weight, bias) = torch.randn(1, 5, 3, 3, 8), weights(8, 8, (4, 1, 1), torch.float32)
    choice = explain(causal_conv3d, x, weight, bias)
    assert str(choice) == "torch: reference (kernels exist for up to 3 taps in time, got 4)"
    assert relative_error(causal_conv3d(x, weight, bias), convolved(x, weight, bias)) < 1e-6
    reason = explain(rms_norm_silu, torch.zeros(1, 1, 1, 1, 5000), torch.zeros(5000)).reason
    assert reason == "kernels exist for up to 4096 channels, got 5000"
    frames, kernel = torch.zeros(1, 1, 14, 14, 3), weights(3 * 49, 8, (1, 1, 1), torch.float32)[0]
    reason = explain(frames_out, torch.zeros(1, 1, 2, 2, 8), kernel, None, frames, patch_size=7).reason
    assert reason == "kernels exist for up to 128 features, got 147"
    with pytest.raises(ValueError, match="backend: 'triton' cannot take this call: kernels exist for up to 3 taps"):
        causal_conv3d(x, weight, bias, backend="triton")
