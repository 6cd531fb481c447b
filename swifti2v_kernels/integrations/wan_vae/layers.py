"""The computations of a Wan VAE's layers on our operators, for hosts that hand over ``[B, C, T, h, w]`` and a cache.

The functions know no host: they are given a layer's parts. Frames are channels last inside and stay so on their way
out, as a view ``[B, C, T, h, w]``: the next layer of ours then reads them without a copy. Weights are read
and laid out, and those of an upsampling folded, at every call: offloading moves them, casting hooks change their dtype.
ComfyUI keeps weights elsewhere too, but has a function that lends them (``comfy.ops.cast_bias_weight``), which
:func:`lent` uses.

The hosts' protocol of caching is kept, so that replaced and original layers may stand side by side and change between
two chunks of a clip. ``feat_cache`` is a list of slots, ``feat_idx[0]`` the next one, and each convolution in time
takes one: None before the first chunk, then the last two frames of its input. Slots are copies of those frames alone,
read where they lie; a slot of one frame has zeros before it. After a chunk of one frame the older one is that of the
slot before, unless ``joins`` is off: ComfyUI's 2.1 forgets it.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, MutableSequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...conv.causal_conv3d import causal_conv3d
from ...conv.upsample_conv2d import fold_upsample_weight, upsample_conv2d
from ...norm.rms_norm_silu import rms_norm_silu
from ..probing import LENDING

#: Frames in a slot.
HISTORY = 2
#: The mark in the slot of an ``upsample3d`` after a clip's first frame, which it neither doubles nor remembers.
FIRST = "Rep"

FeatCache = MutableSequence[Any] | None


class ResidualBlock(NamedTuple):
    """The parts of a residual block; ``shortcut`` is None where the input itself is added."""

    norm1: nn.Module
    conv1: nn.Conv3d
    norm2: nn.Module
    conv2: nn.Conv3d
    shortcut: nn.Conv3d | None


def to_frames(x: Tensor) -> Tensor:
    """Returns ``[B, C, T, h, w]`` as ``[B, T, h, w, C]``; a view if the channels are last in memory, else a copy."""
    frames = x.permute(0, 2, 3, 4, 1)
    return frames if frames.shape[4] == 1 or frames.stride(4) == 1 else frames.contiguous()


def from_frames(frames: Tensor) -> Tensor:
    """Returns ``[B, T, h, w, C]`` as ``[B, C, T, h, w]``, a view."""
    return frames.permute(0, 4, 1, 2, 3)


def paddings(conv: nn.Conv3d) -> tuple[int, tuple[int, int, int, int]]:
    """Returns the zero frames that the host puts before a clip, and the zeros above, below, left and right of each.

    The latter ComfyUI leaves to the convolution; others keep all of them apart.
    """
    if isinstance(conv._padding, int):
        _, rows, columns = conv.padding
        return conv._padding, (rows, rows, columns, columns)
    left, right, top, bottom, before, _ = conv._padding
    return before, (top, bottom, left, right)


def residual_block(
    x: Tensor, block: ResidualBlock, feat_cache: FeatCache, feat_idx: MutableSequence[int], joins: bool = True
) -> Tensor:
    """Computes norm, SiLU and convolution twice and adds the (projected) input."""

    def cached(hidden: Tensor, conv: nn.Conv3d, **options: Any) -> Tensor:
        index = feat_idx[0]
        slot = None if feat_cache is None else feat_cache[index]
        y = convolve(hidden, conv, slot, **options)
        if feat_cache is not None:
            feat_cache[index] = _next_slot(hidden, slot if joins else None)
            feat_idx[0] += 1
        return y

    frames = to_frames(x)
    hidden = rms_norm_silu(frames, _gain(block.norm1, frames))
    hidden = cached(hidden, block.conv1, norm_weight=_gain(block.norm2, frames), keep_sum=False)
    if block.shortcut is None:
        return from_frames(cached(hidden, block.conv2, residual=frames))
    projected = convolve(frames, block.shortcut, None)
    out = None if torch.is_grad_enabled() else projected
    return from_frames(cached(hidden, block.conv2, residual=projected, out=out))


def resample(
    x: Tensor, layer: nn.Module, feat_cache: FeatCache, feat_idx: MutableSequence[int], joins: bool = True
) -> Tensor:
    """Doubles or halves frames, and with a cache, in a ``3d`` mode, the frame rate after the clip's first frame.

    Of the layer, ``mode``, the convolution ``resample[1]`` and, in a ``3d`` mode, ``time_conv`` are read.
    """
    frames, conv, slot = to_frames(x), layer.resample[1], None
    grows, in_time = layer.mode.startswith("up"), feat_cache is not None and layer.mode.endswith("3d")
    index = feat_idx[0]
    if in_time:
        slot = feat_cache[index]
        feat_idx[0] += 1
    if grows:
        if in_time and slot is None:
            feat_cache[index] = FIRST
        elif in_time:
            slot = None if isinstance(slot, str) else slot
            feat_cache[index] = _next_slot(frames, slot if joins else None)
            frames = _double_frames(frames, layer.time_conv, slot)
        with lent(conv, frames) as (weight, bias):
            return from_frames(upsample_conv2d(frames, fold_upsample_weight(weight), bias))
    with lent(conv, frames) as (weight, bias):
        frames = causal_conv3d(frames, channels_last(weight), bias, stride=(1, 2, 2), padding=(0, 1, 0, 1))
    if in_time:
        # The caller has the frames too.
        feat_cache[index] = from_frames(frames[:, -1:].clone(memory_format=torch.contiguous_format))
        if slot is not None:
            past = to_frames(slot.to(frames))[:, -1:]
            with lent(layer.time_conv, frames) as (weight, bias):
                stride = layer.time_conv.stride
                frames = causal_conv3d(frames, channels_last(weight), bias, past=past, stride=stride)
    return from_frames(frames)


def convolve(frames: Tensor, conv: nn.Conv3d, slot: Tensor | None, **options: Any) -> Tensor:
    """Computes one of the hosts' causal convolutions; ``options`` as for :func:`swifti2v_kernels.causal_conv3d`."""
    before, padding = paddings(conv)
    past = None if slot is None or before == 0 else to_frames(slot.to(frames))[:, -before:]
    with lent(conv, frames) as (weight, bias):
        options |= {"past": past, "stride": conv.stride, "padding": padding}
        return causal_conv3d(frames, channels_last(weight), bias, **options)


def _gain(norm: nn.Module, like: Tensor) -> Tensor:
    return norm.gamma.flatten().to(like.dtype)


def _next_slot(frames: Tensor, slot: Tensor | None) -> Tensor:
    """Returns the last frames of a clip so far, without keeping alive what else is in their memory."""
    if frames.shape[1] < HISTORY and slot is not None:
        last = frames.new_empty(frames.shape[0], HISTORY, *frames.shape[2:])
        last[:, :1] = to_frames(slot)[:, -1:]
        last[:, 1:] = frames
    else:
        last = frames[:, -HISTORY:].clone(memory_format=torch.contiguous_format)
    return from_frames(last)


def _double_frames(frames: Tensor, conv: nn.Conv3d, slot: Tensor | None) -> Tensor:
    past = None if slot is None else to_frames(slot.to(frames))[:, -HISTORY:]
    batch, count, height, width, channels = frames.shape
    out = frames.new_empty(batch, 2 * count, height, width, channels)
    with lent(conv, frames) as (weight, bias):
        biases = (None, None) if bias is None else bias.chunk(2)
        for i, half in enumerate(channels_last(weight).chunk(2)):
            # Each half of the features is every second frame and is written there.
            causal_conv3d(frames, half, biases[i], past=past, out=out[:, i::2])
    return out


def unreadable(x: Tensor, module: nn.Module) -> str | None:
    """Returns why the module's own parameters cannot be used with ``x`` as they are, or after its host's cast.

    None if they can: they are on the device of ``x`` in its dtype, or in another that autocast casts.
    """
    casts = torch.is_autocast_enabled(x.device.type)
    if _is_lent(module):
        if _lender() is None:
            return "this version of ComfyUI does not lend its weights"
        return "autocast, and ComfyUI casts too" if casts else None
    for p in module._parameters.values():
        if p is None:
            continue
        if type(p) not in (Tensor, nn.Parameter):
            return f"quantised weights, {type(p).__name__}"
        if p.device != x.device or (p.dtype != x.dtype and not casts):
            return f"weights in {p.dtype} on {p.device} for frames in {x.dtype} on {x.device}"
    return None


@contextlib.contextmanager
def lent(conv: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Lends the weight and bias of a convolution, in the dtype of ``x``, while the block runs."""
    lender = _lender() if _is_lent(conv) else None
    loan = (conv.weight, conv.bias) if lender is None else lender.cast_bias_weight(conv, x, offloadable=True)
    weight, bias = loan[:2]
    try:
        yield weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    finally:
        if lender is not None:
            lender.uncast_bias_weight(conv, *loan)


def channels_last(weight: Tensor) -> Tensor:
    """Returns ``[C', C, kt, kh, kw]`` as the operators read it; a ``[C', C, kh, kw]`` one gets one tap in time.

    It is copied unless it lies so already; that is small beside the convolution, which reads every weight once a pixel.
    """
    weight = weight if weight.ndim == 5 else weight.unsqueeze(2)
    return weight.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def _is_lent(module: nn.Module) -> bool:
    """Returns whether ComfyUI casts, moves or patches this module's weights at every call."""
    return any(getattr(module, name, None) for name in LENDING)


def _lender() -> ModuleType | None:
    """Returns ComfyUI's module of operators if it lends weights, else None: with older versions the host computes."""
    ops = sys.modules.get("comfy.ops")
    lend = getattr(ops, "cast_bias_weight", None)
    if lend is None or not hasattr(ops, "uncast_bias_weight"):
        return None
    return ops if "offloadable" in inspect.signature(lend).parameters else None
