"""Causal convolutions of channels-last frames by torch: the references' sums, and cuDNN's on a GPU.

On the CPU torch sends 3D convolutions of few channels to a naive loop. 2D convolutions stand in for them. Where the
weight is small, one convolution has the taps in time as further channels: calls, not sums, take the time of a toy.
Where it is large, every tap is a convolution of the frames where they lie, and no history is concatenated: it is up to
20 times faster than 3D (2-core AMD EPYC). The same serves GPUs whose torch and cuDNN are known to fail at 3D
convolutions.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import transform
from ..common.target import constant_when_traced, for_gpu

HALVES = (torch.float16, torch.bfloat16)
#: The most numbers of a weight whose taps in time are channels: 3 x 3 x 3 taps of 32 channels. Up to there it is 1.5 to
#: 5 times faster in float32 (2-core AMD EPYC), and as fast in float64.
SMALL_WEIGHT = 1 << 15


def conv_sums(call: Any, stride: Sequence[int] = (1, 1, 1)) -> Tensor:
    """Returns the convolution ``[B, T', h', w', C']`` in float32 at least, but by cuDNN in the dtype of ``x``.

    ``call`` has ``x``, ``past``, ``weight``, ``bias`` and ``padding``, as :func:`swifti2v_kernels.causal_conv3d` has.
    """
    on_gpu = for_gpu(call.x.device)
    if on_gpu and _conv3d_works(call.x.dtype):
        return _by_cudnn(call, stride)
    # Taps are summed in place, which ``torch.func.linearize`` gets wrong and ``vmap`` may refuse.
    if transform() is not None or (not on_gpu and call.weight.numel() <= SMALL_WEIGHT):
        return _by_channels(call, stride)
    return _by_taps(call, stride)


def _by_channels(call: Any, stride: Sequence[int]) -> Tensor:
    taps, wide = call.weight.shape[2], torch.promote_types(call.x.dtype, torch.float32)
    frames, last = _with_past(call, stride[0]).to(wide), stride[0] * (call.x.shape[1] // stride[0])
    frames = torch.cat([frames[:, tap : last + tap : stride[0]] for tap in range(taps)], dim=-1)
    sums = _conv2d(frames, call.weight.transpose(1, 2).flatten(1, 2).to(wide), stride, call.padding)
    return sums if call.bias is None else sums + call.bias.to(wide)


def _by_taps(call: Any, stride: Sequence[int]) -> Tensor:
    x, past, step = call.x, call.past, stride[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = x.dtype if for_gpu(x.device) else wide
    taps, frames = call.weight.shape[2], x.shape[1] // step

    def product(frames: Tensor, lag: int) -> Tensor:
        kernel = call.weight[:, :, taps - 1 - lag].to(dtype)
        return _conv2d(frames.to(dtype), kernel, stride, call.padding).to(wide)

    # Result t has frame ``step * (t + 1) - 1 - lag`` under a tap: every result one of x under the last, of lag 0.
    sums = product(x[:, step - 1 :: step][:, :frames], 0)
    if call.bias is not None:
        sums = sums + call.bias.to(wide)
    for lag in range(1, taps):
        start = min(max(-(-(lag + 1) // step) - 1, 0), frames)
        if start < frames:
            source = step * (start + 1) - 1 - lag
            sums[:, start:] += product(x[:, source::step][:, : frames - start], lag)
        for t in range(start) if past is not None else ():
            source = past.shape[1] + step * (t + 1) - 1 - lag
            if source >= 0:
                sums[:, t : t + 1] += product(past[:, source : source + 1], lag)
    return sums


def _conv2d(x: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Returns each frame convolved by itself: [B, T, h, w, C] -> [B, T, h', w', C']."""
    frames, surplus = _symmetric(x, stride, padding)
    y = F.conv2d(frames.flatten(0, 1).permute(0, 3, 1, 2), kernel, None, tuple(stride[1:]), surplus[::2])
    return _without(y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]), padding, surplus)


def _by_cudnn(call: Any, stride: Sequence[int]) -> Tensor:
    x, surplus = _symmetric(_with_past(call, stride[0]), stride, call.padding)
    # Channels last: the same memory, seen with the channels first.
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), call.weight, call.bias, tuple(stride), (0, *surplus[::2]))
    return _without(y.permute(0, 2, 3, 4, 1), call.padding, surplus)


def _with_past(call: Any, stride: int) -> Tensor:
    """Returns the frames under the taps of all results: those of the past, or zeros, and those of the input."""
    x, past = call.x, call.past
    frames = x.shape[1] // stride
    last = stride * frames
    missing = call.weight.shape[2] + stride * (frames - 1) - last
    if missing <= 0:
        return x[:, -missing:last]
    parts = [] if past is None else [past[:, max(past.shape[1] - missing, 0) :]]
    absent = missing - sum(part.shape[1] for part in parts)
    zeros = [x.new_zeros(x.shape[0], absent, *x.shape[2:])] if absent else []
    return torch.cat((*zeros, *parts, x[:, :last]), dim=1)


def _symmetric(x: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Returns the input and a padding equal on both sides, which torch makes itself.

    That costs a row or column that is thrown away and no copy. Under a stride, unequal sides are padded here instead.
    """
    top, bottom, left, right = padding
    if min(padding) < 0:
        x = x[:, :, max(-top, 0) : x.shape[2] - max(-bottom, 0), max(-left, 0) : x.shape[3] - max(-right, 0)]
        top, bottom, left, right = (max(p, 0) for p in padding)
    if (stride[1] == 1 or top == bottom) and (stride[2] == 1 or left == right):
        return x, (max(top, bottom), max(top, bottom), max(left, right), max(left, right))
    return F.pad(x, (0, 0, left, right, top, bottom)), (0, 0, 0, 0)


def _without(y: Tensor, padding: Sequence[int], surplus: tuple[int, int, int, int]) -> Tensor:
    """Returns the result without the rows and columns that only a symmetric padding has made."""
    if surplus == (0, 0, 0, 0):
        return y
    top, bottom, left, right = (s - max(p, 0) for s, p in zip(surplus, padding, strict=True))
    return y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right]


# Constant for one process, as ``load_table``.
@functools.cache
@constant_when_traced
def _conv3d_works(dtype: torch.dtype) -> bool:
    """Returns whether nothing is known to be wrong with 3D convolutions of this torch and cuDNN; else it warns.

    Sources: pytorch/pytorch issues 163539 (cuDNN 9.8 to 9.12: wrong results in bfloat16) and 166643 (torch 2.9.0, and
    torch from 2.9.1 on with cuDNN before 9.15: cuDNN is bypassed for an unfolding of three times the memory).
    """
    version = torch.backends.cudnn.version()  # 91002 is 9.10.2
    if dtype not in HALVES or version is None:
        return True
    if not 90800 <= version < 91500 and re.match(r"2\.9\.0(?!\d)", torch.__version__) is None:
        return True
    name = f"torch {torch.__version__} with cuDNN {version // 10000}.{version // 100 % 100}"
    warnings.warn(
        f"{name} does 3D convolutions in 16 bits wrongly on some GPUs, or slowly and in three times the memory; 2D"
        " convolutions stand in for them. cuDNN 9.15 cures it.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
