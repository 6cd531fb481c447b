"""Frames ``[B, T, h, w, C]`` as kernels see them: their strides, and the addresses of pixels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def frame_strides(*views: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """Returns the (batch, frame, row, column) strides of [B, T, h, w, C] views; zeros for None."""
    return tuple((0, 0, 0, 0) if x is None else x.stride()[:4] for x in views)


@triton.jit
def pixels(base, strides, b, t, row, column):
    """Returns the [BLOCK_M] addresses of channel 0 of a frame's pixels."""
    p = base + b * strides[0] + tl.cast(t, tl.int64) * strides[1]
    return p + (row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3])
