"""The Triton kernel of ``upsample_conv2d``: a program owns pixels of one phase, two apart in rows and columns.

The four phases of the same input pixels are neighbours in the order of programs, so that three of them find these in
L2. Timed on an NVIDIA H200 only. What the compiler made of it: ``python -m bench compile --cases upsample_conv2d``.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import configured
from ..common.frames import frame_strides
from ..common.target import capability_of
from .loop import ConvConfig, aligned, conv_product, conv_store, locate


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


def launch_upsample_conv2d(
    x: Tensor,
    phases: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    out: Tensor | None,
    normed: Tensor | None,
    padding: Sequence[int],
    config: ConvConfig | None = None,
) -> None:
    """Writes ``out`` and ``normed``, of which at least one is given; arguments are checked by the caller."""
    batch, frames, height, width, channels = x.shape
    columns = phases.shape[1]
    target = out if out is not None else normed
    assert target is not None
    _, _, out_height, out_width, _ = target.shape
    if config is None:
        owned, capability, itemsize = normed is not None, capability_of(x.device), x.element_size()
        config = configured(
            "upsample_conv2d", capability, ConvConfig.heuristic(capability, channels, columns, itemsize, owned),
            channels=channels, columns=columns, itemsize=itemsize, owned=int(owned),
        )  # fmt: skip
    tiles = triton.cdiv(((out_height + 1) // 2) * ((out_width + 1) // 2), config.block_m)
    upsample_conv2d_fwd_kernel[(tiles * 4 * triton.cdiv(columns, config.columns), frames, batch)](
        x, phases, bias, residual, norm_weight, out, normed, *frame_strides(x, residual, out, normed),
        height, width, out_height, out_width, padding[0], padding[2],
        C=channels, CO=columns,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, TAIL_N=config.tail_n, BLOCK_K=config.block_k,
        ALIGNED=aligned(x),
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers,
        enable_fp_fusion=True,
    )  # fmt: skip
