"""The Triton kernel of ``causal_conv3d``: an implicit GEMM, then bias, residual and the next norm.

* **No input is assembled.** The history and the clip stay where they are: a tap in time chooses a base address; a tap
  in space that leaves the input is masked. What is before the clip is not computed at all.
* **The norm of the result** needs all channels of a pixel, which one program owns up to 192 channels. As a prologue of
  the next convolution it would be computed once for each of its 27 taps.
* **Programs of one pixel tile are neighbours**, so that what one has fetched is in L2 for the next.

Timed on an NVIDIA H200 only. What the compiler made of it: ``python -m bench compile --cases causal_conv3d``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import configured
from ..common.frames import frame_strides
from ..common.target import capability_of
from .loop import ConvConfig, aligned, conv_product, conv_store, locate


@triton.jit(do_not_specialize=["num_past", "height", "width", "out_height", "out_width", "top", "left"])
def causal_conv3d_fwd_kernel(
    X, PAST,  # [B, T, h, w, C], [B, num_past, h, w, C] or None
    WEIGHT, BIAS,  # [CO, KT, KH, KW, C], [CO] or None
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


def launch_causal_conv3d(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    out: Tensor | None,
    normed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    config: ConvConfig | None = None,
) -> None:
    """Writes ``out`` and ``normed``, of which at least one is given; arguments are checked by the caller."""
    batch, _, height, width, channels = x.shape
    columns, _, *kernel = weight.shape
    target = out if out is not None else normed
    assert target is not None
    _, frames, out_height, out_width, _ = target.shape
    if config is None:
        owned, capability, itemsize = normed is not None, capability_of(x.device), x.element_size()
        config = configured(
            "causal_conv3d", capability, ConvConfig.heuristic(capability, channels, columns, itemsize, owned),
            channels=channels, columns=columns, taps=math.prod(kernel), itemsize=itemsize, owned=int(owned),
        )  # fmt: skip
    num_past = 0 if past is None else past.shape[1]
    mixed = past is not None and past.stride()[2:4] != x.stride()[2:4]
    programs = triton.cdiv(out_height * out_width, config.block_m) * triton.cdiv(columns, config.columns)
    causal_conv3d_fwd_kernel[(programs, frames, batch)](
        x, past, weight, bias, residual, norm_weight, out, normed,
        *frame_strides(x, past, residual, out, normed),
        num_past, height, width, out_height, out_width, padding[0], padding[2],
        C=channels, CO=columns, KT=kernel[0], KH=kernel[1], KW=kernel[2], ST=stride[0], SH=stride[1], SW=stride[2],
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, TAIL_N=config.tail_n, BLOCK_K=config.block_k,
        ALIGNED=aligned(x, past), MIXED=mixed,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers,
        enable_fp_fusion=True,
    )  # fmt: skip
