"""The Triton kernel of ``upsample_conv2d``: a program owns pixels of one phase, two apart in rows and columns.

The four phases of the same input pixels are neighbours in the order of programs, so that three of them find these in
L2.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common.frames import frame_strides
from .loop import conv_product, conv_store, locate, tiles


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "top", "left"])
def upsample_conv2d_fwd_kernel(
    X,  # [B, T, h, w, C]
    WEIGHT, BIAS,  # [4, CO, 2, 2, C], [CO] or None
    RESIDUAL, NORM,  # [B, T, h', w', CO] or None, [CO] or None
    OUT, NORMED,  # [B, T, h', w', CO], one of them may be None
    x_strides, residual_strides, out_strides, normed_strides,  # (batch, frame, row, column)
    height, width, out_height, out_width, top, left,
    C: tl.constexpr, CO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Computes one tile of one phase of the formula of ``upsample_conv2d.py``."""
    TILES_N: tl.constexpr = (CO + BLOCK_N + TAIL_N - 1) // (BLOCK_N + TAIL_N)
    i = tl.program_id(0)
    i_n, phase, i_m = i % TILES_N, (i // TILES_N) % 4, i // (TILES_N * 4)
    t, b = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    # Row i of the result is row i + 1 - top of the upsampled frame; a phase has every second one from ``start_h`` on.
    down, right = phase // 2, phase % 2
    # (Not by % 2, which is negative for a negative number.)
    start_h, start_w = (down + 1 + top) & 1, (right + 1 + left) & 1
    rows, columns = (out_height - start_h + 1) // 2, (out_width - start_w + 1) // 2
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows * columns
    step = tl.maximum(columns, 1)
    row, column = o_m // step, o_m % step
    # Under the first of the two taps: the input row above for phase 0, the row itself for phase 1.
    row_in = row + (start_h + 1 - top - down) // 2 - 1 + down
    column_in = column + (start_w + 1 - left - right) // 2 - 1 + right
    place = locate(X, None, x_strides, x_strides, b, t, row_in, column_in, 0, False)
    acc, tail = conv_product(
        place, t, 0, row_in, column_in, m_m, height, width, WEIGHT + phase * (CO * 4 * C), i_n * (BLOCK_N + TAIL_N),
        C, CO, 1, 2, 2, BLOCK_M, BLOCK_N, TAIL_N, BLOCK_K, ALIGNED, False,
    )  # fmt: skip
    conv_store(
        acc, tail, i_n * (BLOCK_N + TAIL_N), m_m, b, t, 2 * row + start_h, 2 * column + start_w,
        BIAS, RESIDUAL, NORM, OUT, NORMED, residual_strides, out_strides, normed_strides,
        X.dtype.element_ty, CO, BLOCK_N, TAIL_N,
    )  # fmt: skip


def launch(call: Any) -> None:
    """Writes ``out`` and ``normed`` of a checked ``UpsampleCall``, of which at least one is given."""
    x, out, normed = call.x, call.out, call.normed
    batch, frames, height, width, channels = x.shape
    columns = call.phases.shape[1]
    _, _, out_height, out_width, _ = out.shape if out is not None else normed.shape
    config = tiles("upsample_conv2d", x, columns, normed is not None)
    programs = triton.cdiv(((out_height + 1) // 2) * ((out_width + 1) // 2), config.block_m)
    upsample_conv2d_fwd_kernel[(programs * 4 * triton.cdiv(columns, config.columns), frames, batch)](
        *call[:5], *call[6:8], *frame_strides(x, call.residual, out, normed),
        height, width, out_height, out_width, call.padding[0], call.padding[2],
        C=channels, CO=columns, **config.options(x),
    )  # fmt: skip
