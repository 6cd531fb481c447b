"""The Triton kernel of ``scaled_linear``: a matmul of 8-bit rows on the tensor cores, all the rest in its epilogue.

* **Two tiles of columns a step, side by side.** A program owns two neighbouring tiles of columns and multiplies the
  same rows with both: rows are fetched once for both; what float8 sums are added up from (below) is half as large; and
  for GPUs of 8.x Triton does not carry a step's first operands around the loop, which in 8 bits took four times as many
  instructions as the multiplications themselves, or eight times.
* **float8 sums are added up in float32 step by step** where tensor cores do not keep float32: on 8.9 and 9.0 a running
  sum has 14 bits, and the rest is cut off with every 32 channels (arXiv 2411.10958, 2412.19437; of 12.0 it is not known
  here). Simulated, a sum over 13,824 channels is 1.1 % off, most of it a shrinkage, where rounding both operands to
  float8 costs 3.7 % of noise; with a new sum every 128 channels it is 1e-4 off. On 10.0 they keep float32, and int8 is
  exact everywhere.
* **Nothing is masked in the loop.** Rows and columns beyond the last are read as the last and not written. Only a
  number of channels that is no multiple of ``block_k`` costs masks.
* **Programs go through groups of ``GROUP_M`` tiles of rows** column by column, so that both operands stay in L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from ..common.configs import configured
from ..common.target import capability_of

#: Tiles of rows that share the columns which L2 holds.
GROUP_M = 8


@dataclass(frozen=True)
class ScaledConfig:
    """Tile sizes and launch options of one shape class on one capability."""

    block_m: int
    #: Columns of one tile; a program owns two.
    block_n: int
    #: Channels of one step.
    block_k: int
    num_warps: int
    num_stages: int

    SPACE: ClassVar = {
        "block_m": (64, 128),
        "block_n": (64, 128),
        "block_k": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }

    @classmethod
    def heuristic(cls, capability: int | None, float8: bool) -> ScaledConfig:
        """Returns what is launched where nothing was measured."""
        if capability is None:
            return cls(16, 16, 64, 4, 1)
        if capability // 10 == 10:
            # L2 is the limit: the largest tile that does not spill. Triton 3.6 has int8 in mma.sync only.
            return cls(128, 128, 128, 8, 3) if float8 else cls(128, 64, 128, 8, 3)
        if capability // 10 == 9 and float8:
            # Two programs on an SM, of which one multiplies while the other adds up; larger tiles leave room for one.
            return cls(128, 64, 128, 4, 3)
        if capability // 10 == 9:
            return cls(128, 128, 128, 8, 3)
        # mma.sync: 128 registers a thread, so that two programs fit on an SM. Warps divide the columns, and each reads
        # all rows; 128 rows by 64 columns would read shared memory 1.5 times as often, more than an A100 can.
        return cls(64, 128, 64, 8, 3)


@triton.jit
def _multiply(
    x, p_weight, o_weight, o_k, left, acc,
    WHOLE: tl.constexpr, ADD_UP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns ``acc`` plus ``x`` [rows, channels] times one tile of weights, of which ``left`` channels are there."""
    # [BLOCK_K, BLOCK_N]
    w = tl.load(p_weight + o_weight) if WHOLE else tl.load(p_weight + o_weight, mask=o_k[:, None] < left, other=0.0)
    if ADD_UP:
        # A limit on inexact sums keeps the compiler from folding the addition into the multiplication.
        acc += tl.dot(x, w, max_num_imprecise_acc=BLOCK_K)
    else:
        acc = tl.dot(x, w, acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _write(
    acc, x_scale, p_out, o_m, m_m, o_n, WEIGHT_SCALES, BIAS,
    N: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Writes columns ``o_n`` of rows ``o_m``, counted from ``p_out``."""
    m_n = o_n < N
    y = acc.to(tl.float32) * x_scale[:, None] * tl.load(WEIGHT_SCALES + o_n, mask=m_n, other=0.0)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        # (1 + tanh(u)) / 2 is sigmoid(2 u); the factor is 2 sqrt(2 / pi).
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    tl.store(p_out + o_m[:, None] * N + o_n[None, :], y.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def scaled_linear_fwd_kernel(
    X, X_SCALES,  # [num_rows, K], [num_rows]
    WEIGHT, WEIGHT_SCALES, BIAS,  # [N, K], [N], [N] or None
    OUT,  # [num_rows, N]
    num_rows, x_stride, x_scale_stride,
    N: tl.constexpr, K: tl.constexpr, GELU: tl.constexpr, ADD_UP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Computes two tiles of the formula of ``scaled_linear.py``. ``ADD_UP``: float8 sums are added up step by step."""
    TILES_N: tl.constexpr = (N + 2 * BLOCK_N - 1) // (2 * BLOCK_N)
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    group = tl.program_id(0) // (GROUP_M * TILES_N)
    within = tl.program_id(0) % (GROUP_M * TILES_N)
    tiles = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    start_m = (group * GROUP_M + within % tiles) * BLOCK_M
    start_n = (within // tiles) * (2 * BLOCK_N)

    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # 64 bits for where a tile begins, 32 within it.
    p_x = X + tl.cast(start_m, tl.int64) * x_stride
    p_first = WEIGHT + tl.cast(start_n, tl.int64) * K
    o_x = tl.minimum(o_m, num_rows - 1 - start_m)[:, None] * x_stride + o_k[None, :]
    if N % (2 * BLOCK_N) == 0:
        o_first = o_n[None, :] * K + o_k[:, None]
        p_second, o_second = p_first + BLOCK_N * K, o_first
    else:
        last = N - 1 - start_n
        o_first = tl.minimum(o_n, last)[None, :] * K + o_k[:, None]
        p_second, o_second = p_first, tl.minimum(o_n + BLOCK_N, last)[None, :] * K + o_k[:, None]

    SUM: tl.constexpr = tl.int32 if X.dtype.element_ty == tl.int8 else tl.float32
    first = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    second = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        # [BLOCK_M, BLOCK_K]
        x = tl.load(p_x + o_x) if WHOLE else tl.load(p_x + o_x, mask=o_k[None, :] < K - start, other=0.0)
        first = _multiply(x, p_first, o_first, o_k, K - start, first, WHOLE, ADD_UP, BLOCK_K)
        second = _multiply(x, p_second, o_second, o_k, K - start, second, WHOLE, ADD_UP, BLOCK_K)
        p_x += BLOCK_K
        p_first += BLOCK_K
        p_second += BLOCK_K

    m_m = o_m < num_rows - start_m
    p_scale = X_SCALES + tl.cast(start_m, tl.int64) * x_scale_stride
    x_scale = tl.load(p_scale + o_m * x_scale_stride, mask=m_m, other=0.0)
    p_out = OUT + tl.cast(start_m, tl.int64) * N
    _write(first, x_scale, p_out, o_m, m_m, start_n + o_n, WEIGHT_SCALES, BIAS, N, GELU)
    _write(second, x_scale, p_out, o_m, m_m, start_n + BLOCK_N + o_n, WEIGHT_SCALES, BIAS, N, GELU)


def launch(call: Any) -> None:
    """Writes ``out`` of a checked ``ScaledCall``, which is not empty."""
    columns, depth = call.weight.shape
    x, scales = call.values.view(-1, depth), call.scales.view(-1)
    capability, float8 = capability_of(x.device), x.dtype == torch.float8_e4m3fn
    heuristic = ScaledConfig.heuristic(capability, float8)
    config = configured("scaled_linear", capability, heuristic, depth=depth, dtype=str(x.dtype).removeprefix("torch."))
    programs = triton.cdiv(x.shape[0], config.block_m) * triton.cdiv(columns, 2 * config.block_n)
    scaled_linear_fwd_kernel[(programs,)](
        x, scales, *call[2:5], call.out, x.shape[0], x.stride(0), scales.stride(0),
        N=columns, K=depth, GELU=call.gelu, ADD_UP=float8 and (capability is None or capability // 10 != 10),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
