"""Nearest-neighbour upsampling by two, then a 3x3 convolution, without the upsampled frame.

    up[i, j] = x[i // 2, j // 2]
    y[i, j] = bias + sum over taps (b, c) of weight[:, :, b, c] @ up[i-top+b, j-left+c]
    out = y + residual
    normed = SiLU(out / max(|out|, 1e-12) * sqrt(C') * norm_weight)                  (|.| over the channels of a pixel)

Of the three rows under a result two are copies of one, so their weights can be added up beforehand: a result is a 2x2
convolution of x, with other weights for even and odd rows and columns (four *phases*, made once by
:func:`fold_upsample_weight`). Four results take 16 multiplications a channel instead of 36, and the largest tensor of a
decoder, the upsampled frame, is neither written nor read. Sums of weights are made in float32 and rounded once: on
random weights of a standard normal that moves a bfloat16 result by 1.7e-3 (relative L2), as much as the rounding of the
result itself does (1.7e-3); in float32 by 4e-8.

All in one dtype: float16, bfloat16 or float32 (float64: torch); sums as in ``causal_conv3d``, which see for ``padding``
(here in pixels of the upsampled frame), for the norm and for why any cut of a frame gives the same pixels.

FLOPs: 2 * B * T * h' * w' * C' * C * 4. Least traffic: x read, results written, residual read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..common.checks import Spec, check_tensor, check_tensors
from ..common.dispatch import public_operator, transform
from ..common.registration import kernel_operator
from ..common.target import for_gpu
from . import calls


def fold_upsample_weight(weight: Tensor) -> Tensor:
    """Returns the four phases of a 3x3 convolution, which :func:`upsample_conv2d` takes in place of its weight.

    A result pixel of even or odd row and column sees two copies of the same input pixels; the weights of copies are
    added up in float32 and rounded once. Do it once, when a model is loaded.

    Args:
        weight: the convolution after the upsampling, ``[C', C, 3, 3]``.

    Returns:
        Phases ``[4, C', 2, 2, C]`` in the dtype of ``weight``, contiguous: of even, even, odd and odd rows and of even,
        odd, even and odd columns.

    Raises:
        ValueError: the weight is not ``[C', C, 3, 3]``.

    Examples:
        >>> fold_upsample_weight(torch.randn(8, 16, 3, 3)).shape
        torch.Size([4, 8, 2, 2, 16])

    Source: the sub-pixel identity of nearest-neighbour upsampling.
    """
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight: expected [C', C, 3, 3], got {list(weight.shape)}")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).permute(0, 2, 3, 1)  # [C', 3, 3, C]
    phases = [phase for rows in _without_copies(wide, 1) for phase in _without_copies(rows, 2)]
    return torch.stack(phases).to(weight.dtype)


def _without_copies(taps: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns the two taps of an even row or column of the result, and those of an odd one."""
    before, at, after = taps.unbind(dim)
    return torch.stack((before, at + after), dim), torch.stack((before + at, after), dim)


class UpsampleCall(NamedTuple):
    """The arguments of a call: those of the registered operator, then what decides about the results."""

    x: Tensor
    phases: Tensor
    bias: Tensor | None
    residual: Tensor | None
    norm_weight: Tensor | None
    padding: Sequence[int]
    out: Tensor | None
    normed: Tensor | None
    keep_sum: bool = True
    backend: str = "auto"

    def shape(self) -> tuple[int, ...]:
        (batch, frames, height, width, _), (top, bottom, left, right) = self.x.shape, self.padding
        return batch, frames, 2 * height + top + bottom - 2, 2 * width + left + right - 2, self.phases.shape[1]

    def check(self) -> None:
        x, padding = self.x, self.padding
        check_tensor("x", x, calls.FRAMES)
        check_tensor("phases", self.phases, Spec((4, "C'", 2, 2, x.shape[4]), x.dtype, whole=True), x.device)
        vector = Spec(self.phases.shape[1:2], x.dtype, whole=True)
        check_tensors(self, x.device, bias=vector, norm_weight=vector)
        calls.check_integers("padding", padding, calls.PADDING, 4)
        if max(padding) > 1:
            raise ValueError(f"padding: expected at most 1 on each side, got {tuple(padding)}")
        if min(self.shape()[2:4]) < 1:
            raise ValueError(f"padding: {tuple(padding)} leaves nothing of {2 * x.shape[2]} x {2 * x.shape[3]} pixels")
        calls.check_results(self)

    def summed(self) -> Tensor:
        x, phases = self.x, self.phases
        wide = torch.promote_types(x.dtype, torch.float32)
        dtype = x.dtype if for_gpu(x.device) else wide  # cuDNN sums in float32 itself
        batch, frames, height, width, _ = x.shape
        flat = x.to(dtype).flatten(0, 1).permute(0, 3, 1, 2)

        def part(i: int) -> Tensor:
            down, right = divmod(i, 2)
            # Padded on both sides: of the row too many the last (even) or the first (odd) is left out.
            y = F.conv2d(flat, phases[i].to(dtype).permute(0, 3, 1, 2), padding=1)
            return y[:, :, down : down + height, right : right + width].permute(0, 2, 3, 1)

        if transform() is None:
            y = flat.new_empty(batch * frames, 2 * height, 2 * width, phases.shape[1], dtype=wide)
            for i in range(4):
                y[:, i // 2 :: 2, i % 2 :: 2] = part(i)
        else:  # ``torch.func.linearize`` gets what is written in place wrong, and ``vmap`` may refuse it
            y = rearrange([part(i).to(wide) for i in range(4)], "(p q) n h w c -> n (h p) (w q) c", p=2)
        top, bottom, left, right = self.padding
        y = y.unflatten(0, (batch, frames))
        y = y[:, :, 1 - top : y.shape[2] - 1 + bottom, 1 - left : y.shape[3] - 1 + right]
        for more in (self.bias, self.residual):
            y = y if more is None else y + more.to(wide)
        return y.to(x.dtype).contiguous()

    def by_kernel(self) -> Any:
        return calls.by_kernel(self, lambda norm, *out: _upsample_conv2d_op(*self[:4], norm, self.padding, *out))

    def flops(self) -> int:
        return 2 * math.prod(self.out or self.normed) * math.prod(self.phases[2:])

    obstacle = calls.obstacle
    by_torch = calls.by_torch
    check_written = calls.check_written


_upsample_conv2d_op = kernel_operator(
    "upsample_conv2d",
    "(Tensor x, Tensor phases, Tensor? bias, Tensor? residual, Tensor? norm_weight, SymInt[] padding,"
    " Tensor(a!)? out, Tensor(b!)? normed)",
    UpsampleCall,
)


@public_operator
def upsample_conv2d(
    x: Tensor,
    phases: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Sequence[int] = (1, 1, 1, 1),
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    out: Tensor | None = None,
    normed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Doubles the rows and columns of frames by nearest neighbours and convolves them 3x3, without the doubled frame.

    ``out`` is that convolution plus ``bias`` and ``residual``, and ``normed`` is
    ``SiLU(out / max(|out|, 1e-12) * sqrt(C') * norm_weight)`` with ``|.|`` over the channels of a pixel.

    Args:
        x: frames ``[B, T, h, w, C]``: any strides but channels contiguous.
        phases: the weight ``[4, C', 2, 2, C]`` as :func:`fold_upsample_weight` makes it, in the dtype of ``x``.
        bias: ``[C']`` or None.
        padding: zeros beyond the top, bottom, left and right of the upsampled frame, at most 1; negative ones leave out
            its pixels.
        residual: ``[B, T, h', w', C']``, added to the result.
        norm_weight: ``[C']``; with it, the normed and activated sum is computed too.
        out: where the sum is written: ``residual`` itself, or memory that overlaps no input.
        normed: where the normed sum is written: memory that overlaps no input.
        backend: ``auto``, ``torch`` (on a GPU: cuDNN) or ``triton``, as for :func:`swifti2v_kernels.causal_conv3d`.

    Returns:
        ``out`` ``[B, T, h', w', C']`` with ``h' = 2h + top + bottom - 2``; with ``norm_weight`` the pair
        ``(out, normed)``.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it, with what was given and allowed.

    Examples:
        >>> frames, weight = torch.randn(1, 2, 8, 12, 16), torch.randn(8, 16, 3, 3)
        >>> upsample_conv2d(frames, fold_upsample_weight(weight)).shape
        torch.Size([1, 2, 16, 24, 8])

    Source: upsampling of the Wan VAE (diffusers ``WanResample``); the phases are the sub-pixel identity of
    nearest-neighbour upsampling.
    """
    call = UpsampleCall(x, phases, bias, residual, norm_weight, padding, out, normed, backend=backend)
    return calls.computed(call, backend, "upsample")
