"""The parts that the convolution kernels share: the implicit GEMM, and their tile sizes.

A program owns ``BLOCK_M`` pixels of one frame and ``BLOCK_N + TAIL_N`` output channels. Channel counts of video
autoencoders are sums of two powers of two (96, 160, 192): two accumulators that share the loaded pixels cover them
without idle columns, and one program can then own all channels of a pixel, which a norm in its epilogue needs.

The GEMM is one flat loop over taps and channels; nested loops are pipelined worse, since their loads start anew with
each. Padding is a mask, and a frame before the first is another base address: nothing is copied to be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import configured
from ..common.frames import pixels
from ..common.target import capability_of
from .calls import MAX_OWNED_CHANNELS


@dataclass(frozen=True)
class ConvConfig:
    """Tile sizes and launch options of one shape class on one capability; a ``tail_n`` of 0 is no second tile."""

    block_m: int
    block_n: int
    tail_n: int
    block_k: int
    num_warps: int
    num_stages: int
    #: Registers that a thread may use; None: as many as the compiler wants.
    registers: int | None = None

    SPACE: ClassVar = {
        "block_m": (64, 128, 256),
        "block_k": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "registers": (None, 128),
    }

    @property
    def columns(self) -> int:
        """The output channels of one program."""
        return self.block_n + self.tail_n

    def options(self, *views: Tensor | None) -> dict[str, Any]:
        """Returns the arguments of a launch that reads these views and has both tiles of columns."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "TAIL_N": self.tail_n, "BLOCK_K": self.block_k,
            "ALIGNED": aligned(*views), "num_warps": self.num_warps, "num_stages": self.num_stages,
            "maxnreg": self.registers, "enable_fp_fusion": True,
        }  # fmt: skip

    @classmethod
    def heuristic(cls, capability: int | None, channels: int, columns: int, itemsize: int, owned: bool) -> ConvConfig:
        """Returns what is launched where nothing was measured. ``owned``: a program must own all columns of a pixel."""
        block_n, tail_n = _columns(columns, MAX_OWNED_CHANNELS if owned else 128)
        if not owned and -(-columns // (block_n + tail_n)) * (block_n + tail_n) > 1.1 * columns:
            block_n, tail_n = _columns(columns, MAX_OWNED_CHANNELS)  # 320 are twice 160, with none idle
        block_k = 64 if channels % 64 == 0 else min(max(triton.next_power_of_2(channels), 16), 32)
        if capability is None:
            return cls(32, block_n, tail_n, block_k, 4, 1)
        if itemsize == 4:
            # Without tensor cores a larger tile only takes registers.
            if owned:
                return cls(16, block_n, tail_n, 16, 8, 2)
            return cls(64, *_columns(columns, 32), 16, 8, 2, 128)  # left alone, ptxas saves registers and spills
        if capability // 10 in (9, 10):
            # Tiles of up to 128 columns leave registers for two programs an SM, of which one multiplies while the other
            # computes addresses.
            registers = 128 if block_n + tail_n <= (128 if capability // 10 == 9 else 96) else None
            return cls(128, block_n, tail_n, block_k, 8, 3 if block_k == 64 else 4, registers)
        if tail_n == 64:
            block_k = min(block_k, 32)  # with 64 the addresses would spill
        return cls(128, block_n, tail_n, block_k, 8, 2 if block_k == 64 else 3)


def _columns(columns: int, limit: int) -> tuple[int, int]:
    """Returns two powers of two, from 16, that cover ``columns`` or an even share within ``limit``.

    The second may be 0.
    """
    shares = -(-columns // limit)
    share = max(-(-columns // shares), 16)
    block = 1 << (share.bit_length() - 1)
    if share == block:
        return block, 0
    tail = max(triton.next_power_of_2(share - block), 16)
    return (2 * block, 0) if tail >= block else (block, tail)


def tiles(kernel: str, x: Tensor, columns: int, owned: bool | None = None, **key: int) -> ConvConfig:
    """Returns the configuration of a launch, of whose class ``key`` says more, and ``owned`` where there is a norm."""
    capability, channels, itemsize = capability_of(x.device), x.shape[4], x.element_size()
    heuristic = ConvConfig.heuristic(capability, channels, columns, itemsize, bool(owned))
    key |= {} if owned is None else {"owned": int(owned)}
    return configured(kernel, capability, heuristic, channels=channels, columns=columns, itemsize=itemsize, **key)


def mixed(x: Tensor, past: Tensor | None) -> bool:
    """Returns whether the history has other strides of rows and columns."""
    return past is not None and past.stride()[2:4] != x.stride()[2:4]


def aligned(*views: Tensor | None) -> bool:
    """Returns whether every pixel of the views starts at a multiple of 16 bytes."""
    present = [x for x in views if x is not None]
    return all(
        x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in (*x.stride()[:4], x.shape[4]))
        for x in present
    )


@triton.jit
def locate(
    X, PAST, x_strides, past_strides, b, first, row, column, num_past,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Returns the frames under the three taps in time and where in them the first pixels lie: (frames, offsets, row
    strides, column strides).

    Frame ``first`` is the earliest; those before 0 are in PAST. ``MIXED``: PAST has other strides.
    """
    x0 = X + b * x_strides[0] + tl.cast(first, tl.int64) * x_strides[1]
    x1 = x0 + x_strides[1]
    x2 = x1 + x_strides[1]
    offset = row.to(tl.int64) * x_strides[2] + column.to(tl.int64) * x_strides[3]
    past = offset
    before_h, before_w = x_strides[2], x_strides[3]
    if PAST is not None:
        p0 = PAST + b * past_strides[0] + tl.cast(num_past + first, tl.int64) * past_strides[1]
        x0, x1 = tl.where(first < 0, p0, x0), tl.where(first < -1, p0 + past_strides[1], x1)
        if MIXED:
            past = row.to(tl.int64) * past_strides[2] + column.to(tl.int64) * past_strides[3]
            before_h, before_w = past_strides[2], past_strides[3]
    return (x0, x1, x2), (offset, past), (x_strides[2], before_h), (x_strides[3], before_w)


@triton.jit
def conv_product(
    place,  # of ``locate``
    first, skipped,  # the earliest frame's index, and how many frames are before the clip
    row, column, m_m,  # [BLOCK_M]: row and column under the first tap, and which pixels there are
    height, width,  # of the input
    WEIGHT, first_column,  # [CO, KT, KH, KW, C]
    C: tl.constexpr, CO: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Returns the sums over all taps and channels, [BLOCK_M, BLOCK_N] and [BLOCK_M, TAIL_N], in float32.

    Pixels outside of the input are zero.
    """
    frames, offsets, row_strides, column_strides = place
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    o_n = first_column + tl.arange(0, BLOCK_N)
    m_n = o_n < CO
    p_n = WEIGHT + o_n.to(tl.int64) * (KT * KH * KW * C)
    o_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tail = acc
    if TAIL_N > 0:
        t_n = first_column + BLOCK_N + tl.arange(0, TAIL_N)
        tm_n = t_n < CO
        tp_n = WEIGHT + t_n.to(tl.int64) * (KT * KH * KW * C)
        tail = tl.zeros([BLOCK_M, TAIL_N], tl.float32)
    for i in tl.range(skipped * (KH * KW * STEPS), KT * KH * KW * STEPS):
        tap = i // STEPS
        c = (i % STEPS) * BLOCK_K
        dt, dh, dw = tap // (KH * KW), (tap // KW) % KH, tap % KW
        frame, offset, stride_h, stride_w = frames[0], offsets[0], row_strides[0], column_strides[0]
        if KT > 1:
            frame = tl.where(dt == 0, frames[0], tl.where(dt == 1, frames[1], frames[2]))
        if MIXED:
            before = first + dt < 0
            offset = tl.where(before, offsets[1], offsets[0])
            stride_h = tl.where(before, row_strides[1], row_strides[0])
            stride_w = tl.where(before, column_strides[1], column_strides[0])
        y, x = row + dh, column + dw
        inside = m_m & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        p_m = frame + (dh * stride_h + dw * stride_w + c) + offset
        if ALIGNED:
            p_m = tl.multiple_of(p_m, 16)  # which is lost where an address is chosen among two
        m_a, m_b = inside[:, None], m_n[None, :]
        if C % BLOCK_K != 0:
            m_k = c + o_k < C
            m_a, m_b = m_a & m_k[None, :], m_b & m_k[:, None]
        a = tl.load(p_m[:, None] + o_k[None, :], mask=m_a, other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load((p_n + (tap * C + c))[None, :] + o_k[:, None], mask=m_b, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, w, acc, input_precision="ieee")
        if TAIL_N > 0:
            m_b = tm_n[None, :]
            if C % BLOCK_K != 0:
                m_b = m_b & m_k[:, None]
            w = tl.load((tp_n + (tap * C + c))[None, :] + o_k[:, None], mask=m_b, other=0.0)
            tail = tl.dot(a, w, tail, input_precision="ieee")
    return acc, tail


@triton.jit
def _sum(acc, o_n, m, BIAS, RESIDUAL, p_residual, CO: tl.constexpr, dtype: tl.constexpr):
    """Returns the sum with bias and residual, rounded as it is stored."""
    if BIAS is not None:
        acc += tl.load(BIAS + o_n, mask=o_n < CO, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL is not None:
        acc += tl.load(p_residual[:, None] + o_n[None, :], mask=m, other=0.0).to(tl.float32)
    return acc.to(dtype)


@triton.jit
def _squares(y, o_n, CO: tl.constexpr):
    wide = tl.where((o_n < CO)[None, :], y.to(tl.float32), 0.0)
    return tl.sum(wide * wide, 1)


@triton.jit
def _store_normed(p_normed, y, factor, o_n, m, NORM, CO: tl.constexpr):
    gamma = tl.load(NORM + o_n, mask=o_n < CO, other=0.0).to(tl.float32)
    z = y.to(tl.float32) * factor[:, None] * gamma[None, :]
    z = z * tl.sigmoid(z)
    tl.store(p_normed[:, None] + o_n[None, :], z.to(p_normed.dtype.element_ty), mask=m)


@triton.jit
def conv_store(
    acc, tail, first_column, m_m, b, t, row, column,  # of ``conv_product``, and the pixels of the result
    BIAS, RESIDUAL, NORM, OUT, NORMED,  # each may be None
    residual_strides, out_strides, normed_strides,
    dtype: tl.constexpr, CO: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
):  # fmt: skip
    """Adds bias and residual and stores the rounded sum, and its RMSNorm with SiLU; a norm needs all columns."""
    o_n = first_column + tl.arange(0, BLOCK_N)
    m = m_m[:, None] & (o_n < CO)[None, :]
    p_residual = None
    if RESIDUAL is not None:
        p_residual = pixels(RESIDUAL, residual_strides, b, t, row, column)
    y = _sum(acc, o_n, m, BIAS, RESIDUAL, p_residual, CO, dtype)
    if TAIL_N > 0:
        t_n = first_column + BLOCK_N + tl.arange(0, TAIL_N)
        tm = m_m[:, None] & (t_n < CO)[None, :]
        z = _sum(tail, t_n, tm, BIAS, RESIDUAL, p_residual, CO, dtype)
    if OUT is not None:
        p_out = pixels(OUT, out_strides, b, t, row, column)
        tl.store(p_out[:, None] + o_n[None, :], y, mask=m)
        if TAIL_N > 0:
            tl.store(p_out[:, None] + t_n[None, :], z, mask=tm)
    if NORM is not None:
        total = _squares(y, o_n, CO)
        if TAIL_N > 0:
            total += _squares(z, t_n, CO)
        factor = tl.rsqrt(tl.maximum(total, 1e-24) / CO)
        p_normed = pixels(NORMED, normed_strides, b, t, row, column)
        _store_normed(p_normed, y, factor, o_n, m, NORM, CO)
        if TAIL_N > 0:
            _store_normed(p_normed, z, factor, t_n, tm, NORM, CO)
