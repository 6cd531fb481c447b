"""The operators of a video autoencoder in float64 by plain torch: whole padded inputs, nothing folded or in place.

And what holds of any cut of a clip, in the interpreter and on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swifti2v_kernels import causal_conv3d, fold_upsample_weight, upsample_conv2d


def scattered(shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0, device: str = "cpu") -> Tensor:
    """Returns normal numbers ``[B, T, h, w, C]`` as a slice of a larger buffer that is NaN everywhere else."""
    batch, frames, height, width, channels = shape
    wider = (batch, frames + 2, height + 3, width + 3, channels)
    view = torch.full(wider, float("nan"), dtype=dtype, device=device)[:, 1:-1, 1:-2, 2:-1]
    return view.copy_(scale * torch.randn(view.shape, device=device))


def weights(columns: int, channels: int, kernel: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns a kernel of variance 1 / fan_in with channels last in memory, and a bias."""
    weight = torch.randn(columns, channels, *kernel) / (channels * kernel[0] * kernel[1] * kernel[2]) ** 0.5
    return weight.to(dtype).to(memory_format=torch.channels_last_3d), torch.randn(columns).to(dtype)


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolves zeros, history and clip as one tensor, padded or cropped, through ``F.conv3d``."""
    kt, kh, kw = weight.shape[2:]
    top, bottom, left, right = (kh // 2, kh // 2, kw // 2, kw // 2) if padding is None else padding
    frames = x.double() if past is None else torch.cat((past.double(), x.double()), 1)
    number = x.shape[1] // stride[0]
    needed = kt + (number - 1) * stride[0]
    end = frames.shape[1] - x.shape[1] + number * stride[0]
    frames = F.pad(frames[:, :end], (0, 0, left, right, top, bottom, needed, 0))[:, -needed:]
    y = F.conv3d(frames.permute(0, 4, 1, 2, 3), weight.double(), None if bias is None else bias.double(), tuple(stride))
    y = y.permute(0, 2, 3, 4, 1)
    return y if residual is None else y + residual.double()


def upsampled(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int] = (1, 1, 1, 1)) -> Tensor:
    """Upsamples through ``F.interpolate`` and a 3x3 convolution of ``[C', C, 3, 3]``."""
    flat = F.interpolate(x.double().flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest-exact")
    top, bottom, left, right = padding
    y = F.conv2d(F.pad(flat, (left, right, top, bottom)), weight.double(), None if bias is None else bias.double())
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def normed(y: Tensor, gamma: Tensor) -> Tensor:
    """Computes RMSNorm over the channels, then SiLU."""
    return F.silu(F.normalize(y.double(), dim=-1) * gamma.double() * y.shape[-1] ** 0.5)


def joined(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Returns the results of a call side by side in the channels."""
    return results if isinstance(results, Tensor) else torch.cat(results, -1)


def check_pieces(clip: Tensor, pieces: Sequence[int], call: Callable[..., Any]) -> None:
    """Checks that pieces, each with the last frames of the one before as its past, have the bits of the whole clip."""
    start, parts = 0, []
    for n in pieces:
        past = clip[:, max(start - 2, 0) : start] if start else None
        if start > 2:  # history that lies elsewhere, with other strides
            past = F.pad(past, (0, 0, 2, 1))[:, :, :, 2:-1]
        parts.append(joined(call(clip[:, start : start + n], past=past)))
        start += n
    assert torch.equal(torch.cat(parts, 1), joined(call(clip)))


def check_tiles(
    frame: Tensor, weight: Tensor, bias: Tensor, rows: Sequence[int], columns: Sequence[int], **options: Any
) -> None:
    """Checks that tiles have the bits of the whole frame, by a convolution and with upsampling.

    A tile reads its halo where it lies in the whole frame, and pads at the frame's borders only.
    """
    phases = fold_upsample_weight(weight[:, :, 0])
    whole = joined(causal_conv3d(frame, weight, bias, **options))
    big = joined(upsample_conv2d(frame, phases, bias, **options))
    for y0, y1 in itertools.pairwise((0, *rows, frame.shape[2])):
        for x0, x1 in itertools.pairwise((0, *columns, frame.shape[3])):
            top, bottom, left, right = inner = (y0 > 0, y1 < frame.shape[2], x0 > 0, x1 < frame.shape[3])
            x = frame[:, :, y0 - top : y1 + bottom, x0 - left : x1 + right]
            tile = causal_conv3d(x, weight, bias, padding=[1 - halo for halo in inner], **options)
            assert torch.equal(joined(tile), whole[:, :, y0:y1, x0:x1])
            # A halo pixel is two upsampled ones, of which the convolution needs one: -1 leaves the other out.
            tile = upsample_conv2d(x, phases, bias, padding=[-1 if halo else 1 for halo in inner], **options)
            assert torch.equal(joined(tile), big[:, :, 2 * y0 : 2 * y1, 2 * x0 : 2 * x1])
