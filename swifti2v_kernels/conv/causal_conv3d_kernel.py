"""The Triton kernel of ``causal_conv3d``: an implicit GEMM, then bias, residual and the next norm.

* **No input is assembled.** The history and the clip stay where they are: a tap in time chooses a base address; a tap
  in space that leaves the input is masked. What is before the clip is not computed at all.
* **The norm of the result** needs all channels of a pixel, which one program owns up to 192 channels. As a prologue of
  the next convolution it would be computed once for each of its 27 taps.
* **Programs of one pixel tile are neighbours**, so that what one has fetched is in L2 for the next.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from ..common.frames import frame_strides
from .loop import conv_product, conv_store, locate, mixed, tiles


@triton.jit(do_not_specialize=["num_past", "height", "width", "out_height", "out_width", "top", "left"])
def causal_conv3d_fwd_kernel(
    X,  # [B, T, h, w, C]
    WEIGHT, BIAS,  # [CO, KT, KH, KW, C], [CO] or None
    PAST,  # [B, num_past, h, w, C] or None
    RESIDUAL, NORM,  # [B, T', h', w', CO] or None, [CO] or None
    OUT, NORMED,  # [B, T', h', w', CO], one of them may be None
    x_strides, past_strides, residual_strides, out_strides, normed_strides,  # (batch, frame, row, column)
    num_past, height, width, out_height, out_width, top, left,
    C: tl.constexpr, CO: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the formula of ``causal_conv3d.py``."""
    TILES_N: tl.constexpr = (CO + BLOCK_N + TAIL_N - 1) // (BLOCK_N + TAIL_N)
    i_m, i_n = tl.program_id(0) // TILES_N, tl.program_id(0) % TILES_N
    t, b = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < out_height * out_width
    out_row, out_column = o_m // out_width, o_m % out_width
    row, column = out_row * SH - top, out_column * SW - left
    first = ST * (t + 1) - KT
    place = locate(X, PAST, x_strides, past_strides, b, first, row, column, num_past, MIXED)
    acc, tail = conv_product(
        place, first, tl.maximum(-num_past - first, 0), row, column, m_m, height, width,
        WEIGHT, i_n * (BLOCK_N + TAIL_N), C, CO, KT, KH, KW, BLOCK_M, BLOCK_N, TAIL_N, BLOCK_K, ALIGNED, MIXED,
    )  # fmt: skip
    conv_store(
        acc, tail, i_n * (BLOCK_N + TAIL_N), m_m, b, t, out_row, out_column, BIAS, RESIDUAL, NORM, OUT, NORMED,
        residual_strides, out_strides, normed_strides, X.dtype.element_ty, CO, BLOCK_N, TAIL_N,
    )  # fmt: skip


def launch(call: Any) -> None:
    """Writes ``out`` and ``normed`` of a checked ``ConvCall``, of which at least one is given."""
    x, weight, past, out, normed = call.x, call.weight, call.past, call.out, call.normed
    batch, _, height, width, channels = x.shape
    columns, _, *kernel = weight.shape
    _, frames, out_height, out_width, _ = out.shape if out is not None else normed.shape
    config = tiles("causal_conv3d", x, columns, normed is not None, taps=math.prod(kernel))
    programs = triton.cdiv(out_height * out_width, config.block_m) * triton.cdiv(columns, config.columns)
    causal_conv3d_fwd_kernel[(programs, frames, batch)](
        *call[:4], *call[6:10], *frame_strides(x, past, call.residual, out, normed),
        0 if past is None else past.shape[1], height, width, out_height, out_width, call.padding[0], call.padding[2],
        C=channels, CO=columns, KT=kernel[0], KH=kernel[1], KW=kernel[2],
        ST=call.stride[0], SH=call.stride[1], SW=call.stride[2], MIXED=mixed(x, past), **config.options(x, past),
    )  # fmt: skip
