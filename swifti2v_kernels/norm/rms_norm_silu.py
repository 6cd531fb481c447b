"""RMSNorm over the channels of every pixel, then SiLU: the step before each convolution of a video autoencoder.

    y = x / max(|x|, 1e-12) * sqrt(C) * weight                                      (|.| over the channels of a pixel)
    out = y * sigmoid(y)

| tensor | shape           | dtype                          | layout                                             |
|--------|-----------------|--------------------------------|----------------------------------------------------|
| x, out | [B, T, h, w, C] | fp32, fp16, bf16 (fp64: torch) | any strides but channels contiguous                |
| weight | [C]             | as x                           | contiguous                                         |

It is computed in float32 and rounded once. Where one program of ``causal_conv3d`` owns all channels this is part of its
epilogue and costs nothing but the store; this operator is for all else: many channels, and convolutions by cuDNN.

Why fused: each element is read and written once; eager PyTorch (``F.normalize``, two multiplications, SiLU, float32
copies) moves 20 times an element of 16 bits. FLOPs: about 8 an element.

Limits: the kernel takes up to 4,096 channels on NVIDIA GPUs of compute capability 8.0 or newer and has no derivative:
the PyTorch reference, which has one, computes all other calls. Timed on an NVIDIA H200 only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import Spec, check_tensor, check_tensors, check_written
from ..common.cost import Cost
from ..common.dispatch import compute, kernel_obstacle, public_operator
from ..common.registration import kernel_operator

#: A pixel is held in registers.
MAX_CHANNELS = 4096


def rms_norm_silu_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Computes the formula above in PyTorch, differentiable."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Clamped before the root, whose gradient at 0 is infinite.
    length = wide.square().sum(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()
    y = wide / length * (x.shape[-1] ** 0.5 * weight.to(wide.dtype))
    return F.silu(y).to(x.dtype)


class SiluCall(NamedTuple):
    """The arguments of the registered operator."""

    x: Tensor
    weight: Tensor
    out: Tensor | None

    def check(self) -> None:
        """Checks what can be known of the call without addresses."""
        x = self.x
        check_tensor("x", x, Spec(("B", "T", "h", "w", "C")))
        check_tensor("weight", self.weight, Spec(x.shape[4:], x.dtype, whole=True), x.device)
        check_tensors(self, x.device, out=Spec(x.shape, x.dtype))

    def check_written(self) -> None:
        """Checks that ``out`` overlaps nothing that is still to be read; a program reads its pixels first."""
        check_written(self, ("out",), rows=("x",))

    def obstacle(self) -> str | None:
        """Returns why the kernel cannot take the call, or None if it can."""
        if (reason := kernel_obstacle(self)) is not None:
            return reason
        channels = self.x.shape[4]
        return f"kernels exist for up to {MAX_CHANNELS} channels, got {channels}" if channels > MAX_CHANNELS else None

    def by_torch(self) -> Tensor:
        """Computes the call in PyTorch, differentiable."""
        y = rms_norm_silu_reference(self.x, self.weight)
        if self.out is None:
            return y
        self.check_written()
        return self.out.copy_(y)

    def by_kernel(self) -> Tensor:
        """Computes the call by the fused kernel."""
        out = self.x.new_empty(self.x.shape) if self.out is None else self.out
        _rms_norm_silu_op(self.x, self.weight, out)
        return out


_rms_norm_silu_op = kernel_operator("rms_norm_silu", "(Tensor x, Tensor weight, Tensor(a!) out)", SiluCall)


@public_operator()
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


def cost(pixels: int, channels: int, itemsize: int = 2) -> Cost:
    """Returns the least cost of one call; the weight is negligible."""
    return Cost(8 * pixels * channels, pixels * channels * itemsize, pixels * channels * itemsize)
