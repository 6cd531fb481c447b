"""The Triton kernel of ``frames_out``: a convolution to a few columns whose epilogue writes finished pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from ..common.frames import frame_strides
from .loop import conv_product, locate, mixed, tiles


@triton.jit(do_not_specialize=["num_past", "height", "width", "out_height", "out_width", "top", "left"])
def frames_out_fwd_kernel(
    X,  # [B, T, h, w, C]
    WEIGHT, BIAS,  # [3 * P * P, KT, KH, KW, C], [3 * P * P] or None
    PAST,  # [B, num_past, h, w, C] or None
    OUT,  # [B, T, P * h', P * w', 3]
    x_strides, past_strides, out_strides,  # (batch, frame, row, column)
    num_past, height, width, out_height, out_width, top, left,
    C: tl.constexpr, P: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the formula of ``frames_out.py``, of which BLOCK_N are all columns and TAIL_N none."""
    CO: tl.constexpr = 3 * P * P
    t, b = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < out_height * out_width
    out_row, out_column = o_m // out_width, o_m % out_width
    row, column = out_row - top, out_column - left
    first = t + 1 - KT
    place = locate(X, PAST, x_strides, past_strides, b, first, row, column, num_past, MIXED)
    acc, _ = conv_product(
        place, first, tl.maximum(-num_past - first, 0), row, column, m_m, height, width, WEIGHT, 0,
        C, CO, KT, KH, KW, BLOCK_M, BLOCK_N, TAIL_N, BLOCK_K, ALIGNED, MIXED,
    )  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < CO
    if BIAS is not None:
        acc += tl.load(BIAS + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    # Columns are (colour, pixel column, pixel row) of a patch.
    colour, right, down = o_n // (P * P), (o_n // P) % P, o_n % P
    y = (out_row * P)[:, None] + down[None, :]
    x = (out_column * P)[:, None] + right[None, :]
    p_frame = OUT + b * out_strides[0] + tl.cast(t, tl.int64) * out_strides[1]
    p_out = p_frame + y.to(tl.int64) * out_strides[2] + x.to(tl.int64) * out_strides[3] + colour[None, :]
    m = m_m[:, None] & m_n[None, :]
    if OUT.dtype.element_ty == tl.uint8:
        acc = tl.minimum(tl.maximum(tl.floor(acc * 127.5 + 128.0), 0.0), 255.0)
    else:
        # A comparison with NaN is false, so that NaN stays.
        acc = tl.where(acc > 1.0, 1.0, tl.where(acc < -1.0, -1.0, acc))
    tl.store(p_out, acc.to(OUT.dtype.element_ty), mask=m)


def launch(call: Any) -> None:
    """Writes ``out`` of a checked ``FramesCall``."""
    x, past, out, p = call.x, call.past, call.out, call.patch_size
    batch, frames, height, width, channels = x.shape
    columns, _, *kernel = call.weight.shape
    out_height, out_width = out.shape[2] // p, out.shape[3] // p
    config = tiles("frames_out", x, columns)
    # One tile has all columns.
    config = replace(config, block_n=triton.next_power_of_2(max(columns, 16)), tail_n=0)
    frames_out_fwd_kernel[(triton.cdiv(out_height * out_width, config.block_m), frames, batch)](
        *call[:4], out, *frame_strides(x, past, out), 0 if past is None else past.shape[1],
        height, width, out_height, out_width, call.padding[0], call.padding[2],
        C=channels, P=p, KT=kernel[0], KH=kernel[1], KW=kernel[2], MIXED=mixed(x, past), **config.options(x, past),
    )  # fmt: skip
