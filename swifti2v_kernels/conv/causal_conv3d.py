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

| tensor                | shape                | layout                                                             |
|-----------------------|----------------------|--------------------------------------------------------------------|
| x                     | [B, T, h, w, C]      | any strides but channels contiguous: slices of larger frames too   |
| past                  | [B, P, h, w, C]      | the same, P < kt; None for the beginning of the clip               |
| weight                | [C', C, kt, kh, kw]  | channels last in memory (``torch.channels_last_3d``)               |
| bias, norm_weight     | [C']                 | contiguous                                                         |
| residual, out, normed | [B, T', h', w', C']  | as x; T' = T // st                                                 |

All in one dtype: float16, bfloat16 or float32 (float64: torch). Sums are float32; the sum with bias and residual is
rounded once, and the norm reads the rounded value. Every result pixel is summed in the same order wherever it lies in a
tile, so the kernel's result does not depend on how a frame is cut.

Why fused: eager PyTorch concatenates history and clip, pads a copy of that, convolves, adds the residual, and norms in
float32 by seven operators. Here a pixel is read once for all (taps come from cache), and what is written is what the
next layer reads. FLOPs: 2 * B * T' * h' * w' * C' * C * kt * kh * kw. Least traffic, in elements a pixel: C read and
C' written, one C' more for each of residual and second result.

Limits: the kernel takes up to 3 taps in time on NVIDIA GPUs of compute capability 8.0 or newer, and has the norm in it
for up to 192 output channels (beyond, ``rms_norm_silu`` follows). It has no derivative: PyTorch (on a GPU: cuDNN)
computes the calls whose inputs need gradients, and those that ``configs/conv3d.json`` measured as faster there. Neither
groups nor dilation. Timed on an NVIDIA H200 only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..common.checks import check_frames, check_targets, check_vector
from ..common.cost import Cost
from ..common.dispatch import Choice, kernel_obstacle, pick_backend, public_operator
from ..common.registration import add_op_namespace_prefix, registered
from ..common.target import for_gpu, on_device
from ..norm.rms_norm_silu import rms_norm_silu, rms_norm_silu_reference
from .by_torch import conv_sums, cudnn_preference
from .checks import (
    MAX_OWNED_CHANNELS,
    check_kernel,
    check_padding,
    check_past,
    check_stride,
    output_size,
    same_padding,
    stride_obstacle,
)

#: Frames under the taps in time that the kernel can address.
MAX_TAPS = 3


def causal_conv3d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    residual: Tensor | None,
    norm_weight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns ``out`` and ``normed`` of the formula above, differentiable; arguments as in :func:`causal_conv3d`."""
    y = conv_sums(x, past, weight, bias, stride, padding)
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = y.to(x.dtype).contiguous()
    return y, None if norm_weight is None else rms_norm_silu_reference(y, norm_weight)


@torch.library.custom_op(
    add_op_namespace_prefix("causal_conv3d"),
    mutates_args=("out", "normed"),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? past, SymInt[] stride, SymInt[] padding, Tensor? residual,"
    " Tensor? norm_weight, Tensor(a!)? out, Tensor(b!)? normed) -> ()",
)
def _causal_conv3d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    residual: Tensor | None,
    norm_weight: Tensor | None,
    out: Tensor | None,
    normed: Tensor | None,
) -> None:
    _check_outputs(x, weight, bias, past, residual, norm_weight, out, normed)
    from .causal_conv3d_kernel import launch_causal_conv3d

    with on_device(x.device):
        launch_causal_conv3d(x, past, weight, bias, residual, norm_weight, out, normed, stride, padding)


@_causal_conv3d_op.register_fake
def _(x, weight, bias, past, stride, padding, residual, norm_weight, out, normed):  # type: ignore[no-untyped-def]
    return None


@register_flop_formula(registered("causal_conv3d"))
def _flops(x, weight, bias, past, stride, padding, residual, norm_weight, out, normed, *args, **kwargs):  # type: ignore[no-untyped-def]
    batch, frames, height, width, columns = out if out is not None else normed
    return cost(batch * frames * height * width, weight[1], columns, weight[2] * weight[3] * weight[4]).flops


def _choose(*, backend: str, **arguments: Any) -> Choice:
    _check(**arguments)
    chosen, reason = _backend(backend, arguments)
    x = arguments["x"]
    kind = "implicit GEMM" if chosen == "triton" else "cudnn" if for_gpu(x.device) else "reference"
    fused = chosen == "triton" and arguments["weight"].shape[0] <= MAX_OWNED_CHANNELS
    apart = arguments["norm_weight"] is not None and not fused
    return Choice(chosen, f"{kind}, then rms_norm_silu" if apart else kind, reason)


@public_operator(_choose)
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
        x: frames ``[B, T, h, w, C]``, channels contiguous.
        weight: ``[C', C, kt, kh, kw]`` in ``torch.channels_last_3d`` memory. ``kt = 1`` is a 2D convolution of every
            frame; of a ``[C', C, kh, kw]`` one, in ``torch.channels_last`` memory, pass ``weight.unsqueeze(2)``.
        bias: ``[C']`` or None.
        past: the frames before ``x``, at most ``kt - 1`` and the newest last; fewer, or None, at a clip's beginning.
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
        ``out`` ``[B, T', h', w', C']``; with ``norm_weight`` the pair ``(out, normed)``, or ``normed`` alone without
        ``keep_sum``.

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
    padding = same_padding(weight) if padding is None and isinstance(weight, Tensor) and weight.ndim == 5 else padding
    arguments: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "past": past, "stride": stride}
    arguments |= {"padding": padding, "residual": residual, "norm_weight": norm_weight}
    _check(**arguments, keep_sum=keep_sum, out=out, normed=normed)
    chosen, _ = _backend(backend, arguments | {"out": out, "normed": normed})
    if chosen == "torch":
        _check_outputs(x, weight, bias, past, residual, norm_weight, out, normed)
        y, _ = causal_conv3d_reference(**{**arguments, "norm_weight": None})
        y = y if out is None else out.copy_(y)
        # Whoever computes the sum, the norm has its own kernel.
        z = None if norm_weight is None else rms_norm_silu(y, norm_weight, out=normed, backend=backend)
    else:
        y, z = _by_kernel(arguments, keep_sum, out, normed)
    if norm_weight is None:
        return y
    return (y, z) if keep_sum else z


def _by_kernel(arguments: Mapping[str, Any], keep_sum: bool, out: Tensor | None, normed: Tensor | None) -> Any:
    x, weight, norm_weight = (arguments[name] for name in ("x", "weight", "norm_weight"))
    size = output_size(x, weight, arguments["stride"], arguments["padding"])
    shape = (x.shape[0], *size, weight.shape[0])
    fused = norm_weight is not None and weight.shape[0] <= MAX_OWNED_CHANNELS
    if norm_weight is not None and normed is None:
        normed = x.new_empty(shape)
    if not fused and not keep_sum:
        out = normed  # the norm then overwrites the sum
    elif keep_sum and out is None:
        out = x.new_empty(shape)
    values = [arguments[name] for name in ("x", "weight", "bias", "past", "stride", "padding", "residual")]
    _causal_conv3d_op(*values, norm_weight if fused else None, out if keep_sum or not fused else None,
                      normed if fused else None)  # fmt: skip
    if norm_weight is not None and not fused:
        assert out is not None
        rms_norm_silu(out, norm_weight, out=normed, backend="triton")
    return out, normed


def _backend(requested: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
    weight, x = arguments["weight"], arguments["x"]
    obstacle = kernel_obstacle(tensors) or stride_obstacle(x, arguments["past"])
    if obstacle is None and weight.shape[2] > MAX_TAPS:
        obstacle = f"kernels exist for up to {MAX_TAPS} taps in time, got {weight.shape[2]}"
    if obstacle is None and requested == "auto" and (reason := cudnn_preference(x, weight.shape[0], weight.shape[2:])):
        return "torch", reason
    return pick_backend(requested, obstacle)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    keep_sum: bool,
    out: Tensor | None,
    normed: Tensor | None,
) -> None:
    """Checks what can be known of a call without addresses."""
    check_frames("x", x)
    check_kernel("weight", weight, x)
    columns = weight.shape[0]
    check_vector("bias", bias, columns, x)
    check_past(past, x, weight.shape[2])
    check_stride(stride)
    padding = same_padding(weight) if padding is None else padding
    check_padding(padding)
    shape = (x.shape[0], *output_size(x, weight, stride, padding), columns)
    check_vector("norm_weight", norm_weight, columns, x)
    if norm_weight is None and (normed is not None or not keep_sum):
        raise ValueError("norm_weight: expected a tensor, since the normed sum is asked for")
    if not keep_sum and out is not None:
        raise ValueError("out: expected None without keep_sum, since the sum is not stored")
    for name, y in (("residual", residual), ("out", out), ("normed", normed)):
        if y is not None:
            check_frames(name, y, shape, (x.dtype,), x.device)


def _check_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    out: Tensor | None,
    normed: Tensor | None,
) -> None:
    """Checks that outputs overlap nothing that is still to be read.

    A program reads its residual before it writes its sum; others read x and the parameters meanwhile.
    """
    inputs = {"x": x, "weight": weight, "bias": bias, "past": past, "norm_weight": norm_weight}
    check_targets({"out": out}, {**inputs, "residual": residual}, ("residual",))
    check_targets({"normed": normed}, {**inputs, "residual": residual, "out": out}, ())


def cost(
    pixels: int, channels: int, columns: int, taps: int, *, residual: bool = False, results: int = 1, itemsize: int = 2
) -> Cost:
    """Returns the least cost of one call.

    Args:
        pixels: pixels of the result in all frames; those read are taken to be as many.
        channels: C, input channels.
        columns: C', output channels.
        taps: kt * kh * kw.
        residual: whether one is added.
        results: tensors written, 1 or 2.
        itemsize: bytes of an element.
    """
    read = (pixels * (channels + residual * columns) + columns * channels * taps) * itemsize
    return Cost(2 * pixels * channels * columns * taps, read, results * pixels * columns * itemsize)
