"""Causal 3D convolution of a video autoencoder, with the residual and the norm that follow it.

    y[t, i, j] = bias + sum over taps (a, b, c) of
                 weight[:, :, a, b, c] @ frames[st*(t+1)-kt+a, sh*i-top+b, sw*j-left+c]
    out = y + residual
    normed = SiLU(out / max(|out|, 1e-12) * sqrt(C') * norm_weight)                  (|.| over the channels of a pixel)

``frames`` are the clip ``x`` with its history before it: frame -1 is the last of ``past``, and what is before that, or
outside of a frame, is zero. Result t therefore depends on frames up to ``st*(t+1)-1`` only, and a clip in pieces, each
with the last frames of the piece before as its ``past``, gives what the whole clip gives. ``padding`` is the zeros
beyond each side of ``x``: a tile whose neighbours' pixels (its halo) are in ``x`` has none there, and a negative
padding leaves out pixels of ``x`` that only other layers need.

All in one dtype: float16, bfloat16 or float32 (float64: torch). Sums are float32; the sum with bias and residual is
rounded once, and the norm reads the rounded value. Every result pixel is summed in the same order wherever it lies in a
tile, so the kernel's result does not depend on how a frame is cut.

Why fused: eager PyTorch concatenates history and clip, pads a copy of that, convolves, adds the residual, and norms in
float32 by seven operators. Here a pixel is read once for all (taps come from cache), and what is written is what the
next layer reads. FLOPs: 2 * B * T' * h' * w' * C' * C * kt * kh * kw. Least traffic, in elements a pixel: C read and
C' written, one C' more for each of residual and second result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..common.checks import Spec, check_tensors
from ..common.dispatch import public_operator
from ..common.registration import kernel_operator
from . import calls
from .by_torch import conv_sums


class ConvCall(NamedTuple):
    """The arguments of a call: those of the registered operator, then what decides about the results."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    past: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    residual: Tensor | None
    norm_weight: Tensor | None
    out: Tensor | None
    normed: Tensor | None
    keep_sum: bool = True
    backend: str = "auto"

    def shape(self) -> tuple[int, ...]:
        size = calls.output_size(self.x, self.weight, self.stride, self.padding)
        return (self.x.shape[0], *size, self.weight.shape[0])

    def check(self) -> None:
        calls.check_convolution(self)
        check_tensors(self, self.x.device, norm_weight=Spec(self.weight.shape[:1], self.x.dtype, whole=True))
        expected = "three positive numbers (time, rows, columns)"
        calls.check_integers("stride", self.stride, expected, 3)
        if min(self.stride) < 1:
            raise ValueError(f"stride: expected {expected}, got {tuple(self.stride)}")
        calls.check_results(self)

    def summed(self) -> Tensor:
        y = conv_sums(self, self.stride)
        if self.residual is not None:
            y = y + self.residual.to(y.dtype)
        return y.to(self.x.dtype).contiguous()

    def by_kernel(self) -> Any:
        return calls.by_kernel(self, lambda *results: _causal_conv3d_op(*self[:7], *results))

    def flops(self) -> int:
        return 2 * math.prod(self.out or self.normed) * math.prod(self.weight[1:])

    obstacle = calls.obstacle
    by_torch = calls.by_torch
    check_written = calls.check_written


_causal_conv3d_op = kernel_operator(
    "causal_conv3d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? past, SymInt[] stride, SymInt[] padding, Tensor? residual,"
    " Tensor? norm_weight, Tensor(a!)? out, Tensor(b!)? normed)",
    ConvCall,
)


@public_operator
def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    past: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    keep_sum: bool = True,
    out: Tensor | None = None,
    normed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves frames causally, adds a residual, and norms and activates the sum for the next layer.

    ``out`` is the convolution plus ``bias`` and ``residual``, and ``normed`` is
    ``SiLU(out / max(|out|, 1e-12) * sqrt(C') * norm_weight)`` with ``|.|`` over the channels of a pixel.

    Args:
        x: frames ``[B, T, h, w, C]``: any strides but channels contiguous, as of slices of larger frames.
        weight: ``[C', C, kt, kh, kw]`` in ``torch.channels_last_3d`` memory. ``kt = 1`` is a 2D convolution of every
            frame; of a ``[C', C, kh, kw]`` one, in ``torch.channels_last`` memory, pass ``weight.unsqueeze(2)``.
        bias: ``[C']`` or None.
        past: the frames ``[B, P, h, w, C]`` before ``x``, at most ``kt - 1`` and the newest last; fewer, or None, at a
            clip's beginning. Its strides are its own.
        stride: in time, rows and columns. In time, results end at frames ``st - 1, 2 st - 1, ...``.
        padding: zeros beyond the top, bottom, left and right of ``x``; negative ones leave out pixels. Default: half of
            the kernel on all sides.
        residual: ``[B, T', h', w', C']``, added to the result.
        norm_weight: ``[C']``; with it, the normed and activated sum is computed too.
        keep_sum: False, with ``norm_weight``, returns the normed sum alone and does not store the sum itself.
        out: where the sum is written: ``residual`` itself, or memory that overlaps no input.
        normed: where the normed sum is written: memory that overlaps no input.
        backend: ``auto``, ``torch`` (on a GPU: cuDNN) or ``triton``; see :mod:`swifti2v_kernels.common.dispatch`.
            ``auto`` takes what ``configs/conv3d.json`` measured as faster, and without a measurement the kernel for
            16 bits and cuDNN for float32, which our kernel computes without tensor cores.

    Returns:
        ``out`` ``[B, T', h', w', C']`` with ``T' = T // st``; with ``norm_weight`` the pair ``(out, normed)``, or
        ``normed`` alone without ``keep_sum``.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it, with what was given and allowed.

    Examples:
        >>> weight = torch.randn(32, 16, 3, 3, 3).to(memory_format=torch.channels_last_3d)
        >>> clip = torch.randn(1, 5, 8, 12, 16)
        >>> first = causal_conv3d(clip[:, :2], weight)
        >>> rest = causal_conv3d(clip[:, 2:], weight, past=clip[:, :2])
        >>> torch.allclose(torch.cat((first, rest), 1), causal_conv3d(clip, weight), atol=1e-5)
        True

    Source: causal convolutions, residual blocks and RMSNorm of the Wan VAE (diffusers ``AutoencoderKLWan``).
    """
    padding = calls.same_padding(weight) if padding is None else padding
    call = ConvCall(x, weight, bias, past, stride, padding, residual, norm_weight, out, normed, keep_sum, backend)
    return calls.computed(call, backend)
