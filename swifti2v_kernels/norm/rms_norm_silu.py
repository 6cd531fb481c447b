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

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import check_frames, check_targets, check_vector
from ..common.cost import Cost
from ..common.dispatch import Choice, kernel_obstacle, pick_backend, public_operator
from ..common.registration import add_op_namespace_prefix
from ..common.target import on_device

#: A pixel is held in registers.
MAX_CHANNELS = 4096


def rms_norm_silu_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Computes the formula above in PyTorch, differentiable."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Clamped before the root, whose gradient at 0 is infinite.
    length = wide.square().sum(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()
    y = wide / length * (x.shape[-1] ** 0.5 * weight.to(wide.dtype))
    return F.silu(y).to(x.dtype)


@torch.library.custom_op(
    add_op_namespace_prefix("rms_norm_silu"),
    mutates_args=("out",),
    schema="(Tensor x, Tensor weight, Tensor(a!) out) -> ()",
)
def _rms_norm_silu_op(x: Tensor, weight: Tensor, out: Tensor) -> None:
    check_targets({"out": out}, {"x": x, "weight": weight}, ("x",))
    from .rms_norm_silu_kernel import launch_rms_norm_silu

    with on_device(x.device):
        launch_rms_norm_silu(x, weight, out)


@_rms_norm_silu_op.register_fake
def _(x, weight, out):  # type: ignore[no-untyped-def]
    return None


def _choose(x: Tensor, weight: Tensor, out: Tensor | None, backend: str) -> Choice:
    _check(x, weight, out)
    chosen, reason = pick_backend(backend, _obstacle(x, weight, out))
    return Choice(chosen, "reference" if chosen == "torch" else "fused kernel", reason)


@public_operator(_choose)
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
    _check(x, weight, out)
    chosen, _ = pick_backend(backend, _obstacle(x, weight, out))
    if chosen == "torch":
        y = rms_norm_silu_reference(x, weight)
        if out is None:
            return y
        check_targets({"out": out}, {"x": x, "weight": weight}, ("x",))
        return out.copy_(y)
    out = x.new_empty(x.shape) if out is None else out
    _rms_norm_silu_op(x, weight, out)
    return out


def _check(x: Tensor, weight: Tensor, out: Tensor | None) -> None:
    check_frames("x", x)
    check_vector("weight", weight, x.shape[4], x)
    if weight is None:
        raise TypeError("weight: expected a tensor, got None")
    if out is not None:
        check_frames("out", out, tuple(x.shape), (x.dtype,), x.device)


def _obstacle(x: Tensor, weight: Tensor, out: Tensor | None) -> str | None:
    if (reason := kernel_obstacle((x, weight, out))) is not None:
        return reason
    if x.shape[4] > MAX_CHANNELS:
        return f"kernels exist for up to {MAX_CHANNELS} channels, got {x.shape[4]}"
    return None


def cost(pixels: int, channels: int, itemsize: int = 2) -> Cost:
    """Returns the least cost of one call; the weight is negligible."""
    return Cost(8 * pixels * channels, pixels * channels * itemsize, pixels * channels * itemsize)
