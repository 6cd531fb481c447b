"""The Triton kernel of ``quantize_rows``: a program owns a few whole rows.

Its functions on float32 in registers are shared with the norms that quantise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from ..common.configs import configured
from ..common.target import capability_of
from .quantize_rows import LARGEST


@dataclass(frozen=True)
class QuantizeConfig:
    """The share of a program: ``block_m`` rows, computed by ``num_warps`` warps."""

    block_m: int
    num_warps: int

    SPACE: ClassVar = {"block_m": (1, 2, 4, 8, 16, 32), "num_warps": (2, 4, 8, 16)}

    @classmethod
    def heuristic(cls, block_c: int) -> QuantizeConfig:
        """Returns the configuration for rows padded to ``block_c`` channels, with 32 values a thread.

        They are read once and stay in registers until the row's scale is known.
        """
        return cls(max(4096 // block_c, 1), min(max(block_c // 1024, 4), 16))


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


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_fwd_kernel(
    X, VALUES, SCALES,  # [M, C], [M, C], [M]
    x_stride, values_stride, scales_stride,
    num_rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Computes the formula of ``quantize_rows.py`` for BLOCK_M rows."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    m_m = o_m < num_rows
    m = m_m[:, None] & (o_c < C)[None, :]
    x = tl.load(X + o_m[:, None] * x_stride + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    scale = row_scale(tl.max(magnitude(x), 1), LARGEST)
    values = rounded(x, scale[:, None], VALUES.dtype.element_ty)
    tl.store(VALUES + o_m[:, None] * values_stride + channels_of_8_bits(BLOCK_C)[None, :], values, mask=m)
    tl.store(SCALES + o_m * scales_stride, scale, mask=m_m)


def launch(call: Any) -> None:
    """Writes ``values`` and ``scales`` of a checked ``QuantizeCall``, which are not empty."""
    channels = call.x.shape[-1]
    x, values, scales = call.x.view(-1, channels), call.values.view(-1, channels), call.scales.view(-1)
    block_c = triton.next_power_of_2(channels)
    key = {"block_c": block_c, "itemsize": x.element_size()}
    config = configured("quantize_rows", capability_of(x.device), QuantizeConfig.heuristic(block_c), **key)
    quantize_rows_fwd_kernel[(triton.cdiv(x.shape[0], config.block_m),)](
        x, values, scales, x.stride(0), values.stride(0), scales.stride(0), x.shape[0],
        C=channels, BLOCK_C=block_c, BLOCK_M=config.block_m, LARGEST=LARGEST[values.dtype],
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
