"""The Triton kernel of ``qk_norm_rope`` and ``norm_rope``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from ..common.configs import configured
from ..common.target import capability_of


@dataclass(frozen=True)
class NormRopeConfig:
    """The share of a program: ``block_m`` tokens, one after the other, computed by ``num_warps`` warps."""

    block_m: int
    num_warps: int

    SPACE: ClassVar = {"block_m": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8, 16)}

    @classmethod
    def heuristic(cls, block_h: int, block_d: int) -> NormRopeConfig:
        """Returns the configuration for tokens padded to ``block_h`` heads of ``block_d`` channels.

        Up to 32 channels a thread, in 128-bit loads; the norm's weights are loaded once a program, so 4 tokens make
        them a quarter of the traffic, from cache.
        """
        return cls(4, min(max(block_h * block_d // 1024, 1), 16))


@triton.jit
def _load_pairs(base, o_h, o_p, m_h, m_p, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Loads [H, D] as first and second members of the pairs, each [BLOCK_H, BLOCK_P] float32."""
    BLOCK_H: tl.constexpr = o_h.shape[0]
    BLOCK_P: tl.constexpr = o_p.shape[0]
    if INTERLEAVED:
        # One contiguous load; that the members of a pair are neighbours in a thread's registers makes split free.
        o_d = tl.arange(0, 2 * BLOCK_P)
        mask = m_h[:, None] & (o_d < HEAD_DIM)[None, :]
        x = tl.load(base + o_h[:, None] * HEAD_DIM + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [BLOCK_H, BLOCK_P, 2]))
    else:
        offset = o_h[:, None] * HEAD_DIM + o_p[None, :]
        mask = m_h[:, None] & m_p[None, :]
        first = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(base + offset + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(base, first, second, o_h, o_p, m_h, m_p, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    BLOCK_H: tl.constexpr = o_h.shape[0]
    BLOCK_P: tl.constexpr = o_p.shape[0]
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_P)
        x = tl.reshape(tl.join(first, second), [BLOCK_H, 2 * BLOCK_P])
        mask = m_h[:, None] & (o_d < HEAD_DIM)[None, :]
        tl.store(base + o_h[:, None] * HEAD_DIM + o_d[None, :], x.to(base.dtype.element_ty), mask=mask)
    else:
        offset = o_h[:, None] * HEAD_DIM + o_p[None, :]
        mask = m_h[:, None] & m_p[None, :]
        tl.store(base + offset, first.to(base.dtype.element_ty), mask=mask)
        tl.store(base + offset + HEAD_DIM // 2, second.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _turn(row_t, row_h, row_w, o_p, m_p, PAIRS_T: tl.constexpr, PAIRS_H: tl.constexpr):
    """Returns cosine and sine of every pair of a token, each from its axis's row, shifted so as to start at pair 0."""
    row = tl.where(o_p < PAIRS_T, row_t, tl.where(o_p < PAIRS_T + PAIRS_H, row_h, row_w)) + 2 * o_p
    return tl.load(row, mask=m_p, other=0.0)[None, :], tl.load(row + 1, mask=m_p, other=0.0)[None, :]


@triton.jit(do_not_specialize=["q_len", "k_len", "start", "height", "width"])
def norm_rope_fwd_kernel(
    Q, K, Q_WEIGHT, K_WEIGHT, Q_OUT, K_OUT,  # [B, L, H*D], [H*D] or [D]
    T_TABLE, H_TABLE, W_TABLE,  # [n, pairs of the axis, 2] float32, or None without rotation
    q_sb, q_sl, k_sb, k_sl, q_out_sb, q_out_sl, k_out_sb, k_out_sl,
    q_len, k_len, start, height, width, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    PAIRS_T: tl.constexpr, PAIRS_H: tl.constexpr, PAIRS_W: tl.constexpr,
    PER_HEAD: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Computes the formulas of ``qk_norm_rope.py`` for BLOCK_M tokens of q (third axis of the grid: 0) or of k (1)."""
    first_token, b = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64)
    # Of one type for q and k, whichever of them Triton takes for 64 bits.
    q_sl, k_sl = tl.cast(q_sl, tl.int64), tl.cast(k_sl, tl.int64)
    q_out_sl, k_out_sl = tl.cast(q_out_sl, tl.int64), tl.cast(k_out_sl, tl.int64)
    x_ptr, out_ptr, w_ptr, x_sl, out_sl, length = Q + b * q_sb, Q_OUT + b * q_out_sb, Q_WEIGHT, q_sl, q_out_sl, q_len
    if tl.program_id(2) == 1:
        x_ptr, out_ptr, w_ptr, x_sl, out_sl, length = (
            K + b * k_sb, K_OUT + b * k_out_sb, K_WEIGHT, k_sl, k_out_sl, k_len
        )  # fmt: skip
    o_h, o_p = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    m_h, m_p = o_h < HEADS, o_p < HEAD_DIM // 2
    # A weight for each head's channels is the same row for every head.
    o_w = o_h * 0 if PER_HEAD else o_h
    w_first, w_second = _load_pairs(w_ptr, o_w, o_p, m_h, m_p, HEAD_DIM, INTERLEAVED)
    for i in range(first_token, tl.minimum(first_token + BLOCK_M, length)):
        token = tl.cast(i, tl.int64)
        first, second = _load_pairs(x_ptr + token * x_sl, o_h, o_p, m_h, m_p, HEAD_DIM, INTERLEAVED)
        square = tl.sum(first * first + second * second, 1)
        if PER_HEAD:
            inverse = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        else:
            inverse = tl.rsqrt(tl.sum(square, 0) / (HEADS * HEAD_DIM) + eps)
        first, second = first * inverse * w_first, second * inverse * w_second
        if T_TABLE is not None:
            # The norm's result is rounded before it is rotated, as PyTorch code that stores it would.
            first, second = first.to(Q.dtype.element_ty).to(tl.float32), second.to(Q.dtype.element_ty).to(tl.float32)
            place = start + i
            if PAIRS_T == HEAD_DIM // 2:  # a table per token
                row = T_TABLE + 2 * (place.to(tl.int64) * PAIRS_T + o_p)
                cos = tl.load(row, mask=m_p, other=0.0)[None, :]
                sin = tl.load(row + 1, mask=m_p, other=0.0)[None, :]
            else:
                i_t = place // (height * width)
                place -= i_t * (height * width)
                i_h = place // width
                i_w = place - i_h * width
                cos, sin = _turn(
                    T_TABLE + 2 * i_t * PAIRS_T,
                    H_TABLE + 2 * (i_h * PAIRS_H - PAIRS_T),
                    W_TABLE + 2 * (i_w * PAIRS_W - PAIRS_T - PAIRS_H),
                    o_p, m_p, PAIRS_T, PAIRS_H,
                )  # fmt: skip
            first, second = first * cos - second * sin, first * sin + second * cos
        _store_pairs(out_ptr + token * out_sl, first, second, o_h, o_p, m_h, m_p, HEAD_DIM, INTERLEAVED)


def launch(call: Any) -> None:
    """Writes ``out``, views ``[B, L, H*D]``, of a checked ``RopeCall``, whose one tensor stands for both q and k."""
    q, k, q_out, k_out = call.x[0], call.x[-1], call.out[0], call.out[-1]
    batch, q_len, channels = q.shape
    heads, interleaved = call.num_heads, call.layout == "interleaved"
    head_dim = channels // heads
    pairs = tuple(table.shape[1] for table in call.rope) or (0, 0, 0)
    height, width = (call.rope[1].shape[0], call.rope[2].shape[0]) if call.rope else (1, 1)
    block_h, block_p = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim // 2)
    key = {"block_h": block_h, "block_d": 2 * block_p, "itemsize": q.element_size(), "interleaved": int(interleaved)}
    config = configured("norm_rope", capability_of(q.device), NormRopeConfig.heuristic(block_h, 2 * block_p), **key)
    norm_rope_fwd_kernel[(triton.cdiv(max(q_len, k.shape[1]), config.block_m), batch, len(call.x))](
        q, k, call.weights[0], call.weights[-1], q_out, k_out, *(call.rope or (None, None, None)),
        *(s for x in (q, k, q_out, k_out) for s in x.stride()[:2]),
        q_len, k.shape[1], call.start, height, width, call.eps,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_H=block_h, BLOCK_P=block_p,
        PAIRS_T=pairs[0], PAIRS_H=pairs[1], PAIRS_W=pairs[2],
        PER_HEAD=call.weights[0].shape[0] != channels, INTERLEAVED=interleaved, BLOCK_M=config.block_m,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
