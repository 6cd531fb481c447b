"""RMSNorm over the channels of every pixel, then SiLU: the step before each convolution of a video autoencoder.

    y = x / max(|x|, 1e-12) * sqrt(C) * weight                                      (|.| over the channels of a pixel)
    out = y * sigmoid(y)

| tensor | shape           | dtype                          | layout                                             |
|--------|-----------------|--------------------------------|----------------------------------------------------|
| x, out | [B, T, h, w, C] | fp32, fp16, bf16 (fp64: torch) | any strides but channels contiguous                |
| weight | [C]             | as x                           | contiguous                                         |

It is computed in float32 and rounded once. Where one program of ``causal_conv3d`` owns all channels this is part of its
epilogue and costs nothing but the store; this operator is for all else: many channels, and convolutions by cuDNN.

What fusing saves, and the limits, are in docs/operators/norm.md. FLOPs: about 8 an element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import Spec, check_tensor, check_tensors, check_written
from ..common.dispatch import compute, kernel_obstacle, public_operator
from ..common.registration import kernel_operator

#: A pixel is held in registers.
MAX_CHANNELS = 4096


class SiluCall(NamedTuple):
    """The arguments of the registered operator."""

    x: Tensor
    weight: Tensor
    out: Tensor | None

    def check(self) -> None:
        x = self.x
        check_tensor("x", x, Spec(("B", "T", "h", "w", "C")))
        check_tensor("weight", self.weight, Spec(x.shape[4:], x.dtype, whole=True), x.device)
        check_tensors(self, x.device, out=Spec(x.shape, x.dtype))

    def check_written(self) -> None:
        """Checks that ``out`` overlaps nothing that is still to be read; a program reads its pixels first."""
        check_written(self, ("out",), rows=("x",))

    def obstacle(self) -> str | None:
        channels = self.x.shape[4]
        too_many = f"kernels exist for up to {MAX_CHANNELS} channels, got {channels}"
        return kernel_obstacle(self) or (too_many if channels > MAX_CHANNELS else None)

    def by_torch(self) -> Tensor:
        self.check_written()
        wide = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        # Clamped before the root, whose gradient at 0 is infinite.
        length = wide.square().sum(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()
        y = wide / length * (self.x.shape[-1] ** 0.5 * self.weight.to(wide.dtype))
        y = F.silu(y).to(self.x.dtype)
        return y if self.out is None else self.out.copy_(y)

    def by_kernel(self) -> Tensor:
        out = self.x.new_empty(self.x.shape) if self.out is None else self.out
        _rms_norm_silu_op(self.x, self.weight, out)
        return out


_rms_norm_silu_op = kernel_operator("rms_norm_silu", "(Tensor x, Tensor weight, Tensor(a!) out)", SiluCall)


@public_operator
def rms_norm_silu(x: Tensor, weight: Tensor, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Norms every pixel over its channels, scales it and applies SiLU.

    The result is ``y * sigmoid(y)`` with ``y = x / max(|x|, 1e-12) * sqrt(C) * weight``, where ``|.|`` is over the
    channels of a pixel.

    Args:
        x: frames ``[B, T, h, w, C]``, channels contiguous.
        weight: ``[C]`` in the dtype of ``x``.
        out: where to write, shaped as ``x``: ``x`` itself, or memory that overlaps no input.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        ``[B, T, h, w, C]`` in the dtype of ``x``; ``out`` if it was given.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Examples:
        >>> frames = torch.randn(1, 2, 8, 12, 96)
        >>> rms_norm_silu(frames, torch.ones(96), out=frames) is frames
        True

    Source: ``RMS_norm`` and SiLU of the Wan VAE (diffusers ``WanRMS_norm``).
    """
    return compute(SiluCall(x, weight, out), backend)
