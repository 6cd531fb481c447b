"""The operators of a video autoencoder in float64 by plain torch: whole padded inputs, nothing folded or in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
