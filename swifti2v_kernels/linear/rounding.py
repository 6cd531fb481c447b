"""Rounding of rows to 8 bits inside a kernel: the formulas of ``rows.py`` on float32 in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude(x):
    """Returns |x| as int32, which has the order of the numbers; a NaN is above an infinity, so a maximum keeps it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scale(largest, LARGEST: tl.constexpr):
    """Returns the scale of rows whose largest :func:`magnitude` is given."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), LARGEST)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)  # LEAST_SCALE
    return tl.where(largest < 0x7F800000, scale, float("nan"))


@triton.jit
def channels_of_8_bits(BLOCK_C: tl.constexpr):
    """Returns ``0 .. BLOCK_C - 1`` for a store of 8-bit numbers made from 16-bit ones.

    The compiler gives all of a kernel's rows the layout of its widest access. That would be 16 numbers a thread here,
    so that 16-bit rows are read in two parts, and fewer threads have nothing to do where C is not a power of two.
    """
    return tl.max_contiguous(tl.arange(0, BLOCK_C), 8)


@triton.jit
def rounded(x, scale, element: tl.constexpr):
    """Returns ``x / scale`` rounded to the type ``element``, int8 or float8; ``scale`` is broadcast.

    Nothing has to be clamped: no |x| is above LARGEST * scale by more than float32's rounding, which is far less than
    half of a step.
    """
    y = x * tl.div_rn(1.0, scale)
    if element == tl.int8:
        # A sum with 1.5 * 2**23 has no room for a fraction, so float32 rounds it; its low byte is the number's.
        return (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return y.to(element)
