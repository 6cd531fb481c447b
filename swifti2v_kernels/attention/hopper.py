"""Segment attention for Hopper (9.0): explicit warp specialisation in Gluon.

The portable kernel's warps all do the same at the same time, so the tensor cores wait during every softmax. Here a
program has three roles: one warp that only issues TMA loads (the producer) and two groups of four warps (the
consumers), each with 64 query rows and 240 registers a thread. Each consumer issues ``q @ k`` of the next tile and
``p @ v`` of this one together and computes the softmax while the second of them runs; the two consumers are not
synchronised with each other. Loads, matrix multiplications and exponentials thus overlap, which is the structure of
FlashAttention-3.

Shared memory: the queries of both consumers, and ``num_stages`` tiles each of k and of v. Four barriers a stage:
``k_full``/``v_full`` (the TMA engine has written it) and ``k_empty``/``v_empty`` (both consumers have read it). Stage
``i % num_stages`` is in use for the ``i // num_stages``-th time, whose lowest bit is the parity that waits name.

Sources: their ragged tiles (each source has one of 1 to ``block_n`` rows) come first and are masked, by a branch that
all other tiles jump over. The consumers know nothing else of the sources: only the producer must tell them apart.

Contract, beyond the portable kernel's: capability 9.0, 16-bit, at most 3 non-empty sources that TMA can address, no
valid lengths and no block window (rows after the visible ones must read as zeros, as they do past a tensor's end).
Gluon has no interpreter: the protocol is proved by simulation and the compiled code by its report; the portable kernel
is the oracle on hardware, and takes over where Gluon is not available.

Timed on an NVIDIA H200 only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .arguments import SegmentCall, aligned
from .portable import LOG2E, describe, unspecialised

#: ``async_load`` in newer Triton (where the old name only raises), ``async_copy_global_to_shared`` in 3.6.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
#: With four sources, both compilers spill.
MAX_SOURCES = 3
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class HopperConfig:
    """Sizes of a launch: ``block_n`` keys a tile, ``num_stages`` tiles in flight, 64 query rows for each consumer."""

    block_n: int
    num_stages: int
    block_m: int = 128

    SPACE: ClassVar = {"block_n": (64, 128), "num_stages": (2, 3, 4)}

    @classmethod
    def heuristic(cls, head_dim: int) -> HopperConfig:
        """Returns tiles of 128 keys, since 64 double the barriers, and stages that fill shared memory.

        With a head_dim of 128 they take 164 of its 232 kB.
        """
        return cls(128, 2) if head_dim > 64 else cls(128, 4)


@gluon.jit
def _load_tile(k_desc, v_desc, i, row, i_b, i_h, ring):
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = ring
    STAGES: gl.constexpr = k_smem.shape[0]
    BYTES: gl.constexpr = k_smem.shape[3] * k_smem.shape[4] * 2
    stage = i % STAGES
    parity = (i // STAGES) & 1
    mbarrier.wait(k_empty.index(stage), parity ^ 1)
    mbarrier.expect(k_full.index(stage), BYTES)
    tma_load(k_desc, [i_b, i_h, row, 0], k_full.index(stage), k_smem.index(stage))
    mbarrier.wait(v_empty.index(stage), parity ^ 1)
    mbarrier.expect(v_full.index(stage), BYTES)
    tma_load(v_desc, [i_b, i_h, row, 0], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _produce(k_descs, v_descs, full, visible, i_b, i_h, ring):
    """Loads the tiles in the consumers' order: the ragged tile of every visible source, then all full tiles."""
    BLOCK_N: gl.constexpr = ring[0].shape[3]
    i = 0
    for j in gl.static_range(len(k_descs)):
        if visible[j] != 0:
            _load_tile(k_descs[j], v_descs[j], i, full[j] * BLOCK_N, i_b, i_h, ring)
            i += 1
    for j in gl.static_range(len(k_descs)):
        for tile in range(full[j]):
            _load_tile(k_descs[j], v_descs[j], i + tile, tile * BLOCK_N, i_b, i_h, ring)
        i += full[j]


@gluon.jit
def _keep_first(s, rows, LAYOUT_S: gl.constexpr):
    columns = gl.arange(0, s.shape[1], gl.SliceLayout(0, LAYOUT_S))
    return gl.where(gl.expand_dims(columns < rows, 0), s, float("-inf"))


@gluon.jit
def _softmax(s, m_i, l_i, scale, LAYOUT_P: gl.constexpr, DTYPE: gl.constexpr):
    m_new = gl.maximum(m_i, gl.max(s, 1))
    alpha = gl.exp2((m_i - m_new) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(m_new * scale, 1))
    l_i = l_i * alpha + gl.sum(p, 1)
    return gl.convert_layout(p.to(DTYPE), LAYOUT_P), m_new, l_i, alpha


@gluon.jit
def _consume_tiles(
    q_tile, ring, tiles, p, acc, m_i, l_i, scale,
    LAYOUT_S: gl.constexpr, LAYOUT_O: gl.constexpr, LAYOUT_P: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Consumes all tiles but the first; on entry and exit ``p`` is the previous tile, not yet multiplied by v."""
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = ring
    ragged, num_ragged, total = tiles
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    HEAD_DIM: gl.constexpr = k_smem.shape[4]
    ROWS: gl.constexpr = q_tile.shape[0]
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT_S)
    for i in range(1, total):
        stage = i % STAGES
        before = (i - 1) % STAGES
        k_tile = k_smem.index(stage).reshape([BLOCK_N, HEAD_DIM])
        s_token = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        o_token = warpgroup_mma(p, v_smem.index(before).reshape([BLOCK_N, HEAD_DIM]), acc, is_async=True)
        s = warpgroup_mma_wait(1, [s_token])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if i < num_ragged:
            s = _keep_first(s, (ragged >> (8 * i)) & 255, LAYOUT_S)
        p_new, m_i, l_i, alpha = _softmax(s, m_i, l_i, scale, LAYOUT_P, DTYPE)
        # The wait for the next k stands here because a barrier wait ends a basic block: without it ptxas hoists the
        # wait for p @ v above the softmax, and nothing overlaps.
        mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < total)
        acc, p, p_new = warpgroup_mma_wait(0, [o_token, p, p_new])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, LAYOUT_O)), 1)
        p = p_new
    return p, acc, m_i, l_i


@gluon.jit
def _consume(views, q_len, start, tiles, scale, q_smem, ring, HAS_LSE: gl.constexpr, CONSUMER: gl.constexpr):
    """Computes 64 query rows, from ``start + 64 * CONSUMER`` on.

    ``views``: pointers at row 0 of this head, with token strides. ``tiles``: the rows of the ragged tiles, 8 bits each,
    how many of these there are, and how many tiles in all.
    """
    ragged, _num_ragged, total = tiles
    q_ptr, q_sl, out_ptr, out_sl, lse_ptr = views
    k_smem, v_smem, k_full, k_empty, v_full, _v_empty = ring
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    HEAD_DIM: gl.constexpr = k_smem.shape[4]
    ROWS: gl.constexpr = q_smem.shape[1]
    DTYPE: gl.constexpr = q_smem.dtype
    LAYOUT_S: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    LAYOUT_O: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    LAYOUT_M: gl.constexpr = gl.SliceLayout(1, LAYOUT_S)
    LAYOUT_P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT_O, k_width=2)
    LANES: gl.constexpr = HEAD_DIM // 8
    LAYOUT_G: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])

    first_row = start + CONSUMER * ROWS
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT_G))
    columns = gl.expand_dims(gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT_G)), 0)
    inside = gl.expand_dims(rows < q_len - first_row, 1)
    q_tile = q_smem.index(CONSUMER)
    q_ptr += first_row.to(gl.int64) * q_sl
    q_tile.store(gl.load(q_ptr + (gl.expand_dims(rows, 1) * q_sl + columns), mask=inside, other=0.0))
    fence_async_shared()

    m_i = gl.full([ROWS], -1.0e38, gl.float32, LAYOUT_M)
    l_i = gl.full([ROWS], 0.0, gl.float32, LAYOUT_M)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, LAYOUT_O)
    mbarrier.wait(k_full.index(0), 0)
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT_S)
    k_tile = k_smem.index(0).reshape([BLOCK_N, HEAD_DIM])
    s = warpgroup_mma(q_tile, k_tile.permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(k_empty.index(0), count=1)
    s = _keep_first(s, ragged & 255, LAYOUT_S)
    p, m_i, l_i, _alpha = _softmax(s, m_i, l_i, scale, LAYOUT_P, DTYPE)
    mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=total > 1)
    p, acc, m_i, l_i = _consume_tiles(q_tile, ring, tiles, p, acc, m_i, l_i, scale, LAYOUT_S, LAYOUT_O, LAYOUT_P, DTYPE)
    stage = (total - 1) % STAGES
    mbarrier.wait(v_full.index(stage), ((total - 1) // STAGES) & 1)
    v_tile = v_smem.index(stage).reshape([BLOCK_N, HEAD_DIM])
    acc = warpgroup_mma_wait(0, [warpgroup_mma(p, v_tile, acc, is_async=True)])
    acc = acc / gl.expand_dims(gl.convert_layout(l_i, gl.SliceLayout(1, LAYOUT_O)), 1)

    # Through shared memory, so that a warp writes whole rows.
    q_tile.store(acc.to(DTYPE))
    out_ptr += first_row.to(gl.int64) * out_sl
    inside = gl.expand_dims(first_row + rows < q_len, 1)
    gl.store(out_ptr + (gl.expand_dims(rows, 1) * out_sl + columns), q_tile.load(LAYOUT_G), mask=inside)
    if HAS_LSE:
        lse_rows = first_row + gl.arange(0, ROWS, LAYOUT_M)
        lse = (m_i * scale + gl.log2(l_i)) * 0.6931471805599453
        gl.store(lse_ptr + lse_rows, lse, mask=lse_rows < q_len)


@gluon.jit(do_not_specialize=["heads"])
def segment_attention_hopper_kernel(
    Q, OUT, LSE,  # per query view: [B, L, H, D], [B, L, H, D], [B, H, L] float32 or None
    K0, K1, K2, V0, V1, V2,  # descriptors of [B, H, L, D], tiles of [1, 1, BLOCK_N, D]; None from NUM_K on
    q_strides, out_strides,  # per view: (batch, token, head)
    q_lens, k_lens, attends, heads, scale,  # integers by unspecialised()
    NUM_K: gl.constexpr, NUM_STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Computes 128 queries of one head; the roles of its warps are described at the top of the file."""
    DTYPE: gl.constexpr = K0.dtype
    ROWS: gl.constexpr = BLOCK_M // 2
    i_m, i_h, i_b = gl.program_id(0), gl.program_id(1), gl.program_id(2)

    q_ptr, out_ptr, q_len, seen = Q[0], OUT[0], q_lens[0] >> 4, attends[0] >> 4
    HAS_LSE: gl.constexpr = LSE[0] is not None
    lse_ptr = LSE[0] if HAS_LSE else out_ptr  # Triton 3.6 cannot hand None to a partition
    q_sb, q_sl, q_sh = q_strides[0][0], q_strides[0][1], q_strides[0][2]
    out_sb, out_sl, out_sh = out_strides[0][0], out_strides[0][1], out_strides[0][2]
    for i in gl.static_range(1, len(Q)):
        tiles = (q_len + BLOCK_M - 1) // BLOCK_M
        later = i_m >= tiles
        i_m = gl.where(later, i_m - tiles, i_m)
        q_ptr, out_ptr = gl.where(later, Q[i], q_ptr), gl.where(later, OUT[i], out_ptr)
        if HAS_LSE:
            lse_ptr = gl.where(later, LSE[i], lse_ptr)
        q_len, seen = gl.where(later, q_lens[i] >> 4, q_len), gl.where(later, attends[i] >> 4, seen)
        q_sb = gl.where(later, q_strides[i][0], q_sb)
        q_sl = gl.where(later, q_strides[i][1], q_sl)
        q_sh = gl.where(later, q_strides[i][2], q_sh)
        out_sb = gl.where(later, out_strides[i][0], out_sb)
        out_sl = gl.where(later, out_strides[i][1], out_sl)
        out_sh = gl.where(later, out_strides[i][2], out_sh)
    b, h = i_b.to(gl.int64), i_h.to(gl.int64)
    q_ptr += b * q_sb + h * q_sh
    out_ptr += b * out_sb + h * out_sh
    if HAS_LSE:
        lse_ptr += (b * heads + h) * q_len

    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(DTYPE, [2, ROWS, BLOCK_D], Q_LAYOUT)
    k_smem = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, 1, 1, BLOCK_N, BLOCK_D], K0.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, 1, 1, BLOCK_N, BLOCK_D], K0.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    for i in gl.static_range(NUM_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    if NUM_K == 1:
        k_descs, v_descs = (K0,), (V0,)
    elif NUM_K == 2:
        k_descs, v_descs = (K0, K1), (V0, V1)
    else:
        k_descs, v_descs = (K0, K1, K2), (V0, V1, V2)
    # Per source: full tiles before its ragged one, and whether this query view sees it.
    full = ()
    visible = ()
    ragged = 0
    num_ragged = 0
    total = 0
    for j in gl.static_range(NUM_K):
        sees = (seen >> j) & 1
        rows = k_lens[j] >> 4
        tiles = sees * ((rows - 1) // BLOCK_N)
        full = full + (tiles,)  # noqa: RUF005, since Triton knows no unpacking
        visible = visible + (sees,)  # noqa: RUF005
        ragged |= (sees * ((rows - 1) % BLOCK_N + 1)) << (8 * num_ragged)
        num_ragged += sees
        total += tiles + sees
    tiles = (ragged, num_ragged, total)
    views = (q_ptr, q_sl, out_ptr, out_sl, lse_ptr)
    ring = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    start = i_m * BLOCK_M
    gl.warp_specialize(
        [
            (_consume, (views, q_len, start, tiles, scale, q_smem, ring, HAS_LSE, 0)),
            (_consume, (views, q_len, start, tiles, scale, q_smem, ring, HAS_LSE, 1)),
            (_produce, (k_descs, v_descs, full, visible, i_b, i_h, ring)),
        ],
        [4, 1],
        [240, 24],
    )


def obstacle(call: SegmentCall) -> str | None:
    """Returns why this kernel cannot take a call on capability 9.0, or None if it can. No source is empty."""
    q = call.q[0]
    if q.dtype.itemsize != 2 or q.shape[3] not in HEAD_DIMS:
        return f"head_dim {q.shape[3]} in {q.dtype}"
    if len(call.k) > MAX_SOURCES:
        return f"{len(call.k)} sources, more than {MAX_SOURCES}"
    if any(x is not None for x in call.valid_lengths):
        return "valid lengths"
    if call.window:
        return "a block window"
    if not aligned(*call.k, *call.v):
        return "a source is not aligned to 16 bytes"
    return None


def launch_hopper(call: SegmentCall, config: HopperConfig) -> None:
    """Writes ``out`` (and ``lse``) of a call as in ``launch_portable``, within the contract at the top of the file."""
    q, out = call.q, call.out
    batch, _, heads, head_dim = q[0].shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    block = [1, 1, config.block_n, head_dim]
    k, v = (describe(views, MAX_SOURCES, block, TensorDescriptor, layout=layout) for views in (call.k, call.v))
    tiles = sum(triton.cdiv(x.shape[1], config.block_m) for x in q)
    segment_attention_hopper_kernel[(tiles, heads, batch)](
        tuple(q), tuple(out), tuple(call.lse) or (None,) * len(q), *k, *v,
        tuple(x.stride()[:3] for x in q), tuple(x.stride()[:3] for x in out),
        unspecialised(x.shape[1] for x in q), unspecialised(k.shape[1] for k in call.k), unspecialised(call.attends),
        heads, call.scale * LOG2E,
        NUM_K=len(call.k), NUM_STAGES=config.num_stages, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=head_dim, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
