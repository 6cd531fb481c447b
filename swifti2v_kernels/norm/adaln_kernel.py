"""The Triton kernel of ``norm_modulate``, ``gated_residual`` and ``gated_residual_norm_modulate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import configured
from ..common.target import capability_of
from ..linear.quantize_rows import LARGEST
from ..linear.quantize_rows_kernel import channels_of_8_bits, magnitude, rounded, row_scale

LAYER, RMS = 1, 2


@dataclass(frozen=True)
class AdalnConfig:
    """The share of a program: ``block_m`` tokens, one after the other, computed by ``num_warps`` warps."""

    block_m: int
    num_warps: int

    SPACE: ClassVar = {"block_m": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8)}

    @classmethod
    def heuristic(cls, block_c: int) -> AdalnConfig:
        """Returns the configuration for rows padded to ``block_c`` channels.

        Few warps with many channels each (up to 32 a thread, 128-bit loads) spend the fewest instructions on a row's
        two reductions: compiled for 9.0, a token of 1536 channels takes 184 issue cycles with 2 warps and 364 with 8,
        where memory needs about 620. The row's modulation is loaded once a program: over 4 tokens that is 3 bytes of
        cached traffic beside 8 bytes that must cross memory.
        """
        return cls(4, max(block_c // 1024, 1))


@triton.jit
def _row(base, row, num_rows, stride, o_c, m_c):
    """Returns one modulation row in float32; NaN for a row that is not there."""
    inside = (row >= 0) & (row < num_rows)
    row = tl.where(inside, row, 0).to(tl.int64)
    values = tl.load(base + row * stride + o_c, mask=m_c, other=0.0).to(tl.float32)
    return tl.where(inside, values, float("nan"))


@triton.jit(do_not_specialize=["num_blocks", "block_len", "num_rows"])
def adaln_fwd_kernel(
    X, UPDATE,  # [B, L, C]
    GATE, SHIFT, SCALE,  # [B, R, C] or None
    WEIGHT, BIAS,  # [C] or None
    MAP,  # [num_blocks] int32 or None: the modulation row of every block
    X_OUT, Y_OUT,  # [B, L, C] or None; Y_OUT in 8 bits with Y_SCALES
    Y_SCALES,  # [B, L] or None
    x_sb, x_sl, update_sb, update_sl, gate_sb, gate_sr, shift_sb, shift_sr, scale_sb, scale_sr,
    x_out_sb, x_out_sl, y_out_sb, y_out_sl,
    num_blocks, block_len, num_rows, eps, y_scales_sb, y_scales_sl,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, NORM: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Computes the formulas of ``adaln.py`` for BLOCK_M tokens of one block, which have the same modulation rows."""
    i_m, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(block_len, BLOCK_M)
    i_block = i_m // tiles
    first = (i_m - i_block * tiles) * BLOCK_M
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    row = i_block
    if MAP is not None:
        row = tl.load(MAP + i_block)
    if GATE is not None:
        gate = _row(GATE + b * gate_sb, row, num_rows, gate_sr, o_c, m_c)
    if SHIFT is not None:
        shift = _row(SHIFT + b * shift_sb, row, num_rows, shift_sr, o_c, m_c)
        scale = 1.0 + _row(SCALE + b * scale_sb, row, num_rows, scale_sr, o_c, m_c)
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + o_c, mask=m_c, other=0.0).to(tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + o_c, mask=m_c, other=0.0).to(tl.float32)
    for i in range(tl.minimum(BLOCK_M, block_len - first)):
        token = tl.cast(i_block, tl.int64) * block_len + first + i
        x = tl.load(X + b * x_sb + token * x_sl + o_c, mask=m_c, other=0.0).to(tl.float32)
        if UPDATE is not None:
            update = tl.load(UPDATE + b * update_sb + token * update_sl + o_c, mask=m_c, other=0.0).to(tl.float32)
            if GATE is not None:
                update *= gate
            x += update
            x_new = x.to(X_OUT.dtype.element_ty)
            tl.store(X_OUT + b * x_out_sb + token * x_out_sl + o_c, x_new, mask=m_c)
            x = x_new.to(tl.float32)
        if NORM != 0:
            if NORM == 1:
                x = tl.where(m_c, x - tl.sum(x, 0) / C, 0.0)
            y = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps)
            if WEIGHT is not None:
                y *= weight
            if BIAS is not None:
                y += bias
            if SHIFT is not None:
                y = y * scale + shift
            if Y_SCALES is not None:
                y_scale = row_scale(tl.max(magnitude(y), 0), LARGEST)
                tl.store(Y_SCALES + b * y_scales_sb + token * y_scales_sl, y_scale)
                y = rounded(y, y_scale, Y_OUT.dtype.element_ty)
                tl.store(Y_OUT + b * y_out_sb + token * y_out_sl + channels_of_8_bits(BLOCK_C), y, mask=m_c)
            else:
                tl.store(Y_OUT + b * y_out_sb + token * y_out_sl + o_c, y.to(Y_OUT.dtype.element_ty), mask=m_c)


def register_limit(channels: int, num_warps: int) -> dict[str, int]:
    """Returns the launch option for a quantised row of up to 24 channels a thread, loaded 8 at a time.

    Left alone, the compiler takes 160 registers a thread for it, with which one program of 8 warps fits on an SM; it
    needs no more than 128, with which two do. From 32 channels on it would spill.
    """
    return {"maxnreg": 128} if triton.cdiv(channels, 8 * 32 * num_warps) <= 3 else {}


def launch(call: Any) -> None:
    """Writes ``x_out`` (with an update) and ``y_out`` (with a norm) of a checked ``AdalnCall``.

    With ``y_scales`` [B, L], ``y_out`` is in 8 bits.
    """
    batch, length, channels = call.x.shape
    rows = next((m.shape[1] for m in (call.gate, call.shift) if m is not None), 1)
    num_blocks = rows if call.block_map is None else call.block_map.shape[0]
    block_len = length // num_blocks
    block_c, norm = triton.next_power_of_2(channels), {"": 0, "layer": LAYER, "rms": RMS}[call.norm]
    key = {"block_c": block_c, "itemsize": call.x.element_size(), "update": int(call.update is not None), "norm": norm}
    if call.y_scales is not None:
        # A class of its own: the entries of the others are of a kernel with a reduction less.
        key["quantize"] = 1
    config = configured("adaln", capability_of(call.x.device), AdalnConfig.heuristic(block_c), **key)
    largest, limit = None, {}
    if call.y_out is not None and call.y_scales is not None:
        largest, limit = LARGEST[call.y_out.dtype], register_limit(channels, config.num_warps)

    tensors = (*call[:8], *call[10:13])
    strided = (*call[:5], *call[10:12])
    adaln_fwd_kernel[(num_blocks * triton.cdiv(block_len, config.block_m), batch)](
        *tensors, *(s for x in strided for s in _strides(x)),
        num_blocks, block_len, rows, call.eps, *_strides(call.y_scales),
        C=channels, BLOCK_C=block_c, BLOCK_M=config.block_m, NORM=norm, LARGEST=largest,
        num_warps=config.num_warps, enable_fp_fusion=True, **limit,
    )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
