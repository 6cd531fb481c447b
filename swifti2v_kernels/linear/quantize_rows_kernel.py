"""The Triton kernel of ``quantize_rows``: a program owns a few whole rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from ..common.configs import configured
from ..common.target import capability_of
from .rounding import channels_of_8_bits, magnitude, rounded, row_scale
from .rows import LARGEST


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


def launch_quantize_rows(call: Any) -> None:
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
