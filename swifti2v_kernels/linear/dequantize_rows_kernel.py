"""The Triton kernel of ``dequantize_rows``: a program owns a tile of elements, since no row has to be whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from ..common.configs import configured
from ..common.target import capability_of

#: The kernel's constant FORMAT for each dtype.
FORMATS = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}


@dataclass(frozen=True)
class DequantizeConfig:
    """The tile of a program: ``block_m`` rows by ``block_c`` channels, computed by ``num_warps`` warps."""

    block_m: int
    block_c: int
    num_warps: int

    SPACE: ClassVar = {"block_m": (1, 2, 4, 8, 16), "block_c": (256, 512, 1024, 2048), "num_warps": (2, 4, 8)}

    @classmethod
    def heuristic(cls) -> DequantizeConfig:
        """Returns tiles of 512 channels, 16 bytes a thread of one warp, which divide the widths of DiTs.

        A thread has 32 elements.
        """
        return cls(8, 512, 4)


@triton.jit
def _decoded(bits, FORMAT: tl.constexpr):
    """Returns 8-bit numbers as float32, which holds them exactly.

    float8 is decoded by hand, since GPUs before 8.9 cannot. The bits of an e4m3 number are moved to where float32 has
    them, whose exponents are then less by 127 - 7: a factor of 2**120 makes that good, for subnormals as well. It has
    no infinity: the largest pattern is NaN. e5m2 is the upper byte of a float16.
    """
    if FORMAT == 0:
        return bits.to(tl.float32)
    if FORMAT == 1:
        wide = bits.to(tl.uint32)
        x = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), x * 1.329227995784916e36)
    return (bits.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def dequantize_rows_fwd_kernel(
    VALUES, SCALES, OUT,  # [M, C] int8 or the bytes of float8, [M], [M, C]
    values_stride, scales_stride, out_stride,
    num_rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Computes the formula of ``dequantize_rows.py`` for BLOCK_M rows and BLOCK_C channels."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_m = tl.program_id(0) // TILES
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = (tl.program_id(0) - i_m * TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_m = o_m < num_rows
    m = m_m[:, None] & (o_c < C)[None, :]
    bits = tl.load(VALUES + o_m[:, None] * values_stride + o_c[None, :], mask=m, other=0)
    scale = tl.load(SCALES + o_m * scales_stride, mask=m_m, other=0.0)
    y = _decoded(bits, FORMAT) * scale[:, None]
    tl.store(OUT + o_m[:, None] * out_stride + o_c[None, :], y.to(OUT.dtype.element_ty), mask=m)


def launch(call: Any) -> None:
    """Writes ``out`` of a checked ``DequantizeCall``, which is not empty."""
    channels, kind = call.values.shape[-1], FORMATS[call.values.dtype]
    values, scales, out = call.values.view(-1, channels), call.scales.view(-1), call.out.view(-1, channels)
    if kind:
        values = values.view(torch.uint8)
    key = {"itemsize": out.element_size(), "format": kind}
    config = configured("dequantize_rows", capability_of(out.device), DequantizeConfig.heuristic(), **key)
    programs = triton.cdiv(out.shape[0], config.block_m) * triton.cdiv(channels, config.block_c)
    dequantize_rows_fwd_kernel[(programs,)](
        values, scales, out, values.stride(0), scales.stride(0), out.stride(0), out.shape[0],
        C=channels, BLOCK_C=config.block_c, BLOCK_M=config.block_m, FORMAT=kind,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
