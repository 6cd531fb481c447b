"""The portable Triton kernel of segment attention: every capability from 8.0 on, and the interpreter.

One program owns ``block_m`` query rows of one head and walks over the keys of every source it may see, with the online
softmax in float32 and base 2. What is particular:

* **Sources are walked, not concatenated.** The loop over sources selects base pointers and strides by scalars, so code
  size, registers and the inner loop do not grow with their number, and each source may have strides of its own. With
  tensor descriptors (TMA), which cannot be selected at run time, the loop is unrolled, for up to
  ``MAX_DESCRIPTOR_SOURCES`` sources.
* **Only the ragged tile masks.** A source's last tile, if it is not full, is taken first and by itself; the loop over
  full tiles has no mask at all. A source (or window) that a program does not see costs no iteration.
* **Query tiles of all views are one grid.** The tile index varies fastest, then the head, then the batch entry, so the
  programs that run at one time walk over the keys of one head, which stay in L2.
* **Two address forms.** Pointers with a scalar base and one shared int32 offset tile (two sets of pointers would spill
  on 8.x), or 4-D tensor descriptors on Hopper and data-centre Blackwell. Rows are placed by int64 arithmetic.

A head_dim of 96 is computed as 128 with zeros: a third more arithmetic than needed.

Timed on an NVIDIA H200 only. What the compiler made of it: ``python -m bench compile``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arguments import SegmentCall

LOG2E = 1.4426950408889634
#: Descriptors are single kernel arguments: Triton 3.6 cannot launch with a tuple of them.
MAX_DESCRIPTOR_SOURCES = 4
#: (head_dim, whether there are several sources) where Triton 3.6 writes PTX for Hopper of which ptxas serialises the
#: matrix multiplications, unless the form is another than the usual one. Newer ones do not.
_SERIALISED = {(96, False), (96, True), (128, True)} if triton.__version__.startswith("3.6.") else set()


@dataclass(frozen=True)
class PortableConfig:
    """Tile sizes and launch options of one shape class on one capability."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    SPACE: ClassVar = {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}

    @classmethod
    def heuristic(cls, capability: int | None, head_dim: int, num_sources: int, aligned: bool) -> PortableConfig:
        """Returns the configuration of a call; descriptors need all sources to be ``aligned`` to 16 bytes."""
        if capability is None:
            return cls(64, 32, 4, 1)  # the interpreter's time goes by tiles, and small ones meet more edges
        if capability // 10 in (9, 10):
            if not aligned:
                return cls(128, 32, 8, 2)  # element-wise loads take many registers
            if capability == 90 and (head_dim, num_sources > 1) in _SERIALISED:
                return cls(128, 64, 8, 3) if num_sources > 1 else cls(128, 128, 8, 1, True)
            if num_sources > MAX_DESCRIPTOR_SOURCES:
                return cls(128, 64, 8, 3)
            # 128 keys a tile halve the barriers; unrolled for several sources they would spill.
            return cls(128, 128, 8, 2, True) if num_sources == 1 else cls(128, 64, 8, 3, True)
        # mma.sync cards. 8 warps, because 4 warps with 128 rows spill; 32 keys, because 64 leave no register free.
        # head_dim 96 holds a mask for its columns besides.
        if head_dim == 96:
            return cls(128, 16, 8, 3) if capability >= 120 else cls(128, 32, 8, 2)
        return cls(128, 64, 8, 3) if head_dim == 64 else cls(128, 32, 8, 3)


@triton.jit
def _attend(acc, l_i, m_i, q, k, v, keep, scale, MASKED: tl.constexpr):
    """Adds one tile of keys to the sums: k [BLOCK_D, BLOCK_N], v [BLOCK_N, BLOCK_D]; ``keep`` marks its valid keys."""
    s = tl.dot(q, k)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        s = tl.where(keep[None, :], s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, l_i, m_new


@triton.jit
def _attend_pointers(
    acc, l_i, m_i, q, k_ptr, v_ptr, k_sl, v_sl, rows, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds all tiles of one source to the sums; the pointers stand at the first of its ``rows`` visible rows."""
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_offset = o_n[:, None] * k_sl + o_d[None, :]
    v_offset = o_n[:, None] * v_sl + o_d[None, :]
    m_d = o_d[None, :] < HEAD_DIM
    full = rows // BLOCK_N
    if full * BLOCK_N < rows:
        first = tl.cast(full * BLOCK_N, tl.int64)
        keep = o_n < rows - full * BLOCK_N
        k = tl.load(k_ptr + first * k_sl + k_offset, mask=keep[:, None] & m_d, other=0.0)
        v = tl.load(v_ptr + first * v_sl + v_offset, mask=keep[:, None] & m_d, other=0.0)
        acc, l_i, m_i = _attend(acc, l_i, m_i, q, k.T, v, keep, scale, True)
    for _ in tl.range(0, full):
        if HEAD_DIM == BLOCK_D:
            k = tl.load(k_ptr + k_offset)
            v = tl.load(v_ptr + v_offset)
        else:
            k = tl.load(k_ptr + k_offset, mask=m_d, other=0.0)
            v = tl.load(v_ptr + v_offset, mask=m_d, other=0.0)
        acc, l_i, m_i = _attend(acc, l_i, m_i, q, k.T, v, None, scale, False)
        k_ptr += BLOCK_N * k_sl
        v_ptr += BLOCK_N * v_sl
    return acc, l_i, m_i


@triton.jit
def _attend_descriptors(
    acc, l_i, m_i, q, k_desc, v_desc, i_b, i_h, low, high, scale,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the tiles of one source's rows ``low .. high - 1`` to the sums, read through descriptors."""
    end = low + (high - low) // BLOCK_N * BLOCK_N
    if end < high:
        keep = tl.arange(0, BLOCK_N) < high - end
        k = k_desc.load([i_b, i_h, end, 0]).reshape(BLOCK_N, BLOCK_D)
        v = v_desc.load([i_b, i_h, end, 0]).reshape(BLOCK_N, BLOCK_D)
        # Rows past a valid length or a window are other data; were one NaN, its weight of 0 would not help.
        v = tl.where(keep[:, None], v, 0.0)
        acc, l_i, m_i = _attend(acc, l_i, m_i, q, k.T, v, keep, scale, True)
    for i_n in tl.range(low, end, BLOCK_N):
        k = k_desc.load([i_b, i_h, i_n, 0]).reshape(BLOCK_N, BLOCK_D)
        v = v_desc.load([i_b, i_h, i_n, 0]).reshape(BLOCK_N, BLOCK_D)
        acc, l_i, m_i = _attend(acc, l_i, m_i, q, k.T, v, None, scale, False)
    return acc, l_i, m_i


@triton.jit
def _visible_rows(length, valid_ptr, i_b, seen, j, first_block, window, WINDOWED: tl.constexpr, SUBSETS: tl.constexpr):
    """Returns ``low`` and ``high``: this program's queries see the rows ``low .. high - 1`` of source ``j``.

    ``window`` is (block_len, left, right), for source 0; ``first_block`` the queries' own block; bit j of ``seen`` says
    whether this query view sees the source at all.
    """
    low = 0
    high = length
    if WINDOWED and j == 0:
        low = tl.maximum(first_block - window[1], 0) * window[0]
        high = tl.minimum((first_block + window[2] + 1) * window[0], high)
    if valid_ptr is not None:
        # Values from the device cannot be checked on the host: out-of-range ones must not reach other memory.
        high = tl.minimum(tl.maximum(tl.load(valid_ptr + i_b).to(tl.int32), 0), high)
    if SUBSETS:
        high = tl.where(((seen >> j) & 1) != 0, high, 0)
    return low, tl.maximum(high, low)


@triton.jit(do_not_specialize=["heads"])
def segment_attention_fwd_kernel(
    Q, OUT, LSE,  # per query view: [B, L, H, D], [B, L, H, D], [B, H, L] float32 or None
    K, V,  # per source: [B, L, H, D]; empty with descriptors
    K0, K1, K2, K3, V0, V1, V2, V3,  # descriptors of [B, H, L, D], tiles of [1, 1, BLOCK_N, BLOCK_D]; else None
    VALID,  # per source: [B] integers or None
    q_strides, out_strides, k_strides, v_strides,  # per view: (batch, token, head)
    q_lens, k_lens, attends, heads, scale, window,  # integers by unspecialised()
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WINDOWED: tl.constexpr, SUBSETS: tl.constexpr,
):  # fmt: skip
    """Computes one tile of queries of one head against every key it sees; see the top of the file."""
    NUM_Q: tl.constexpr = len(Q)
    NUM_K: tl.constexpr = len(k_lens)
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)

    # Which query view this tile belongs to.
    q_ptr, out_ptr, q_len, seen = Q[0], OUT[0], q_lens[0] >> 4, attends[0] >> 4
    lse_ptr = LSE[0]
    q_sb, q_sl, q_sh = q_strides[0][0], q_strides[0][1], q_strides[0][2]
    out_sb, out_sl, out_sh = out_strides[0][0], out_strides[0][1], out_strides[0][2]
    for i in tl.static_range(1, NUM_Q):
        tiles = tl.cdiv(q_len, BLOCK_M)
        later = i_m >= tiles
        i_m = tl.where(later, i_m - tiles, i_m)
        q_ptr, out_ptr = tl.where(later, Q[i], q_ptr), tl.where(later, OUT[i], out_ptr)
        if LSE[0] is not None:
            lse_ptr = tl.where(later, LSE[i], lse_ptr)
        q_len, seen = tl.where(later, q_lens[i] >> 4, q_len), tl.where(later, attends[i] >> 4, seen)
        q_sb = tl.where(later, q_strides[i][0], q_sb)
        q_sl = tl.where(later, q_strides[i][1], q_sl)
        q_sh = tl.where(later, q_strides[i][2], q_sh)
        out_sb = tl.where(later, out_strides[i][0], out_sb)
        out_sl = tl.where(later, out_strides[i][1], out_sl)
        out_sh = tl.where(later, out_strides[i][2], out_sh)
    window = (window[0] >> 4, window[1] >> 4, window[2] >> 4)
    if WINDOWED:
        # Tiles do not straddle blocks, so that all rows of a tile see the same keys.
        tiles = tl.cdiv(window[0], BLOCK_M)
        i_block = i_m // tiles
        start = i_block * window[0] + (i_m - i_block * tiles) * BLOCK_M
        stop = tl.minimum((i_block + 1) * window[0], q_len)
    else:
        i_block = 0
        start = i_m * BLOCK_M
        stop = q_len

    b, h = tl.cast(i_b, tl.int64), tl.cast(i_h, tl.int64)
    o_m, o_d = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_q = (o_m < stop)[:, None]
    if HEAD_DIM != BLOCK_D:
        m_q = m_q & (o_d < HEAD_DIM)[None, :]
    q_ptr += b * q_sb + h * q_sh
    q = tl.load(q_ptr + o_m[:, None].to(tl.int64) * q_sl + o_d[None, :], mask=m_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], -1.0e38, tl.float32)  # finite, so that a tile without valid keys makes no NaN

    if DESCRIPTORS:
        KD = (K0, K1, K2, K3)
        VD = (V0, V1, V2, V3)
        for j in tl.static_range(NUM_K):
            low, high = _visible_rows(k_lens[j] >> 4, VALID[j], i_b, seen, j, i_block, window, WINDOWED, SUBSETS)
            acc, l_i, m_i = _attend_descriptors(
                acc, l_i, m_i, q, KD[j], VD[j], i_b, i_h, low, high, scale, BLOCK_D, BLOCK_N
            )
    else:
        for j in tl.range(0, NUM_K, num_stages=1):
            low, high = _visible_rows(k_lens[0] >> 4, VALID[0], i_b, seen, 0, i_block, window, WINDOWED, SUBSETS)
            k_ptr, k_sb, k_sl, k_sh = K[0], k_strides[0][0], k_strides[0][1], k_strides[0][2]
            v_ptr, v_sb, v_sl, v_sh = V[0], v_strides[0][0], v_strides[0][1], v_strides[0][2]
            for i in tl.static_range(1, NUM_K):
                low_i, high_i = _visible_rows(
                    k_lens[i] >> 4, VALID[i], i_b, seen, i, i_block, window, WINDOWED, SUBSETS
                )
                low, high = tl.where(j == i, low_i, low), tl.where(j == i, high_i, high)
                k_ptr, v_ptr = tl.where(j == i, K[i], k_ptr), tl.where(j == i, V[i], v_ptr)
                k_sb, v_sb = tl.where(j == i, k_strides[i][0], k_sb), tl.where(j == i, v_strides[i][0], v_sb)
                k_sl, v_sl = tl.where(j == i, k_strides[i][1], k_sl), tl.where(j == i, v_strides[i][1], v_sl)
                k_sh, v_sh = tl.where(j == i, k_strides[i][2], k_sh), tl.where(j == i, v_strides[i][2], v_sh)
            k_ptr += b * k_sb + h * k_sh + tl.cast(low, tl.int64) * k_sl
            v_ptr += b * v_sb + h * v_sh + tl.cast(low, tl.int64) * v_sl
            acc, l_i, m_i = _attend_pointers(
                acc, l_i, m_i, q, k_ptr, v_ptr, k_sl, v_sl, high - low, scale, HEAD_DIM, BLOCK_D, BLOCK_N
            )

    # A row without any valid key: output 0, log-sum-exp -inf.
    none = l_i == 0.0
    l_i = tl.where(none, 1.0, l_i)
    acc = acc / l_i[:, None]
    out_ptr += b * out_sb + h * out_sh
    tl.store(out_ptr + o_m[:, None].to(tl.int64) * out_sl + o_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=m_q)
    if LSE[0] is not None:
        lse = tl.where(none, float("-inf"), (m_i + tl.log2(l_i)) * 0.6931471805599453)
        tl.store(lse_ptr + (b * heads + h) * q_len + o_m, lse, mask=o_m < stop)


def unspecialised(values: Iterable[int]) -> tuple[int, ...]:
    """Returns integers as a kernel argument for which Triton compiles once; the kernel shifts them back by 4.

    Triton specialises the integers of a tuple on being 1 and on being a multiple of 16, whatever ``do_not_specialize``
    says: calls of other lengths would compile again. ``16 * n + 1`` is neither.
    """
    return tuple(16 * n + 1 for n in values)


def describe(
    views: Sequence[Tensor], slots: int, block: list[int], make: Any = TensorDescriptor, **kwargs: Any
) -> list[Any]:
    """Returns host descriptors of views [B, L, H, D] as [B, H, L, D], with None in the rest of so many slots.

    Rows from L on read as zeros.
    """
    found = []
    for x in (view.transpose(1, 2) for view in views):
        # The stride of an axis of one is never used, but must pass the descriptor's alignment rule.
        strides = [s if n > 1 else 8 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)] + [1]
        found.append(make(x, list(x.shape), strides, block, **kwargs))
    return found + [None] * (slots - len(found))


def launch_portable(call: SegmentCall, config: PortableConfig) -> None:
    """Writes ``out`` (and ``lse``, contiguous) of a checked call of which no view is empty."""
    q, k, v = call.q, call.k, call.v
    batch, _, heads, head_dim = q[0].shape
    block_d = triton.next_power_of_2(head_dim)
    if not call.window:
        tiles = sum(triton.cdiv(x.shape[1], config.block_m) for x in q)
    else:
        tiles = triton.cdiv(q[0].shape[1], call.window[0]) * triton.cdiv(call.window[0], config.block_m)
    # With descriptors the kernel has no other way to the sources.
    described, pointers = ((k, v), ((), ())) if config.descriptors else (((), ()), (k, v))
    block = [1, 1, config.block_n, block_d]
    descriptors = [x for views in described for x in describe(views, MAX_DESCRIPTOR_SOURCES, block)]

    def strides(views: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        return tuple(x.stride()[:3] for x in views)

    segment_attention_fwd_kernel[(tiles, heads, batch)](
        tuple(q), tuple(call.out), tuple(call.lse) or (None,) * len(q), *map(tuple, pointers), *descriptors,
        tuple(call.valid_lengths), strides(q), strides(call.out), *map(strides, pointers),
        unspecialised(x.shape[1] for x in q), unspecialised(x.shape[1] for x in k), unspecialised(call.attends), heads,
        call.scale * LOG2E, unspecialised(call.window or (0, 0, 0)),
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        DESCRIPTORS=config.descriptors, WINDOWED=bool(call.window),
        SUBSETS=any(seen != (1 << len(k)) - 1 for seen in call.attends),
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
