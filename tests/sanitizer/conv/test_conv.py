"""Out-of-bounds accesses, races and reads of unwritten memory in the video autoencoder's kernels (see conftest.py).

Tensors are exactly as long as what they hold: one pixel, frame or channel more would be out of bounds. Tiles are small,
so that there are several of them and the last is not full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import fold_upsample_weight
from swifti2v_kernels.conv.causal_conv3d import ConvCall
from swifti2v_kernels.conv.causal_conv3d_kernel import launch as launch_causal_conv3d
from swifti2v_kernels.conv.frames_out import FramesCall
from swifti2v_kernels.conv.frames_out_kernel import launch as launch_frames_out
from swifti2v_kernels.conv.loop import ConvConfig
from swifti2v_kernels.conv.upsample_conv2d import UpsampleCall
from swifti2v_kernels.conv.upsample_conv2d_kernel import launch as launch_upsample_conv2d
from swifti2v_kernels.norm.rms_norm_silu import SiluCall
from swifti2v_kernels.norm.rms_norm_silu_kernel import launch
from tests.support.conv_oracle import convolved, normed, upsampled, weights
from tests.support.tolerances import KERNEL, relative_error

HALF = torch.float16


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes tiles of 16 pixels, 16 channels and up to 96 columns, the last 32 of these in the second accumulator."""

    def small(cls: type[ConvConfig], capability: int | None, channels: int, columns: int, *rest: Any) -> ConvConfig:
        return cls(16, 64, 32, 16, 4, 1) if columns > 64 else cls(16, 16, 0, 16, 4, 1)

    monkeypatch.setattr(ConvConfig, "heuristic", classmethod(small))


def randn(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape).to("cuda", dtype)


def parameters(columns: int, channels: int, kernel: Sequence[int]) -> list[Tensor]:
    return [x.to("cuda") for x in weights(columns, channels, kernel, HALF)]


@pytest.mark.parametrize(
    ("columns", "kernel", "past", "stride", "padding"),
    [
        (20, (3, 3, 3), 2, (1, 1, 1), (1, 1, 1, 1)),  # two programs share a pixel, columns do not fill them
        (16, (3, 3, 3), 1, (1, 1, 1), (0, 0, 0, 0)),  # every pixel is inside
        (16, (3, 3, 3), 0, (1, 1, 1), (-1, 1, 0, -2)),
        (16, (1, 3, 3), 0, (1, 2, 2), (0, 1, 0, 1)),
        (16, (3, 1, 1), 1, (2, 1, 1), (0, 0, 0, 0)),
    ],
)
def test_convolution_stays_inside(
    columns: int, kernel: tuple[int, int, int], past: int, stride: tuple[int, int, int], padding: tuple[int, ...]
) -> None:
    """A convolution stays inside where neither its 12 channels nor its frames fill tiles, and nothing is aligned."""
    x, history = randn(1, 3, 5, 7, 12), randn(1, past, 5, 7, 12) if past else None
    weight, bias = parameters(columns, 12, kernel)
    expected = convolved(x, weight, bias, history, stride, padding)
    out = torch.empty(expected.shape, device="cuda", dtype=HALF)
    launch_causal_conv3d(ConvCall(x, weight, bias, history, stride, padding, None, None, out, None))
    assert relative_error(out, expected) < KERNEL["float16"]


@pytest.mark.parametrize("columns", [96, 82])
def test_two_accumulators_and_a_residual_in_place_stay_inside(columns: int) -> None:
    """A tile within larger frames stays inside.

    Its history lies elsewhere; the sum is written over the residual, and the norm beside it.
    """
    x, past = randn(1, 2, 7, 8, 16)[:, :, 1:6, 2:], randn(1, 2, 5, 6, 16)
    (weight, bias), gamma = parameters(columns, 16, (3, 3, 3)), torch.rand(columns).to("cuda", HALF)
    residual, z = randn(1, 2, 6, 6, columns)[:, :, 1:5, 1:6], randn(1, 2, 4, 5, columns)
    padding = (0, 1, 1, 0)
    expected = convolved(x, weight, bias, past, padding=padding, residual=residual)
    launch_causal_conv3d(ConvCall(x, weight, bias, past, (1, 1, 1), padding, residual, gamma, residual, z))
    assert relative_error(residual, expected) < KERNEL["float16"]
    assert relative_error(z, normed(residual, gamma)) < KERNEL["float16"]


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (1, 0, 0, 0), (-2, -1, -3, 1)], ids=str)
def test_upsampling_stays_inside(padding: tuple[int, int, int, int]) -> None:
    """Odd sizes, of which the phases have unequal shares, stay inside.

    The residual is in place, and the norm is of both accumulators.
    """
    x, (weight, bias) = randn(1, 1, 3, 4, 12), parameters(96, 12, (1, 3, 3))
    weight = ((weight[:, :, 0].float() * 32).round() / 32).to(HALF)  # of which sums are exact
    phases, gamma = fold_upsample_weight(weight), torch.rand(96).to("cuda", HALF)
    expected = upsampled(x, weight, bias, padding)
    residual, z = (randn(*expected.shape) for _ in range(2))
    expected = expected + residual.double()
    launch_upsample_conv2d(UpsampleCall(x, phases, bias, residual, gamma, padding, residual, z))
    assert relative_error(residual, expected) < KERNEL["float16"]
    assert relative_error(z, normed(residual, gamma)) < KERNEL["float16"]


@pytest.mark.parametrize("patch", [1, 2])
def test_frames_stay_inside(patch: int) -> None:
    """Bytes in the last corner of the frames, and clamped numbers in frames of exactly this size, stay inside."""
    x, past = randn(1, 2, 4, 5, 12), randn(1, 1, 4, 5, 12)
    weight, bias = parameters(3 * patch * patch, 12, (3, 3, 3))
    padding = (1, 0, 0, 1)
    v = convolved(x, weight, bias, past, padding=padding)
    v = v.unflatten(4, (3, patch, patch)).permute(0, 1, 2, 6, 3, 5, 4).flatten(2, 3).flatten(3, 4)
    height, width = v.shape[2:4]
    frames = torch.full((1, 3, height + 2, width + 1, 3), 7, dtype=torch.uint8).to("cuda")
    out = frames[:, 1:, 2:, 1:]
    launch_frames_out(FramesCall(x, weight, bias, past, padding, patch, out))
    expected = (v * 127.5 + 128).floor().clamp(0, 255)
    assert ((out.double() - expected).abs() <= 1).all()
    assert (frames == 7).sum() - (out == 7).sum() == frames.numel() - out.numel()
    clamped = torch.empty(v.shape, dtype=HALF, device="cuda")
    launch_frames_out(FramesCall(x, weight, bias, past, padding, patch, clamped))
    assert relative_error(clamped, v.clamp(-1, 1)) < KERNEL["float16"]


@pytest.mark.parametrize("channels", [10, 384])
def test_norm_stays_inside(channels: int) -> None:
    x, gamma = randn(1, 2, 5, 6, channels)[:, :, 1:, 2:], torch.rand(channels).to("cuda", HALF)
    expected = normed(x, gamma)
    launch(SiluCall(x, gamma, x))
    assert relative_error(x, expected) < KERNEL["float16"]
