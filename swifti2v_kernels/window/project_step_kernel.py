"""The Triton kernel of ``project_step``: one program owns ``block_m`` tokens of one block, with all features.

* **Programs do not straddle blocks**, so shift and scale are vectors, and a block that is no target costs one load.
* **Two passes over the tokens**, the second of them from cache: statistics, then normalise, modulate and project. The
  statistics merge means and centred sums of chunks: squares minus the square of the sum would cancel.
* **Velocities are transposed** before the update: neighbouring tokens are neighbours in the store, features are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from ..common.configs import configured
from ..common.target import capability_of


@dataclass(frozen=True)
class ProjectConfig:
    """Tile sizes and launch options of one shape class on one capability."""

    block_m: int
    #: Channels of one step of either pass.
    block_k: int
    num_warps: int
    num_stages: int

    SPACE: ClassVar = {
        "block_m": (16, 32, 64, 128),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }

    @classmethod
    def heuristic(cls, capability: int | None, block_n: int, itemsize: int) -> ProjectConfig:
        """Returns what is launched where nothing was measured, for features padded to ``block_n``, a power of two."""
        if capability is None:
            return cls(16, 32, 4, 1)
        if itemsize == 4:
            return cls(32, 16, 8, 2)  # without tensor cores a larger tile only takes registers
        # Steps of 32 channels: with 64, tokens that are not 16-byte aligned would spill. Eight warps for many features,
        # because four would hold 128 sums a thread, and on 10.x, where four spill for a width of 96.
        return cls(64, 32, 8, 2) if block_n > 64 or capability // 10 == 10 else cls(64, 32, 4, 3)


@triton.jit
def _write(
    velocity, o_n, p_m, m_m, BIAS, out_strides, factor,
    N: tl.constexpr, Z: tl.constexpr, PATCH_W: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Writes features ``o_n`` of a tile, ``velocity`` [tokens, features]; the tokens' first pixels are at ``p_m``."""
    velocity = velocity.T
    m_n = o_n < N
    if BIAS is not None:
        velocity += tl.load(BIAS + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    channel, pixel = o_n % Z, o_n // Z
    offset = channel.to(tl.int64) * out_strides[1] + (pixel // PATCH_W).to(tl.int64) * out_strides[3]
    p_out = p_m[None, :] + (offset + pixel % PATCH_W)[:, None]
    m_out = m_m[None, :] & m_n[:, None]
    if UPDATE:
        velocity = tl.load(p_out, mask=m_out, other=0.0).to(tl.float32) + factor * velocity
    tl.store(p_out, velocity.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["num_slots", "num_rows", "rows", "columns"])
def project_step_fwd_kernel(
    X, WEIGHT, BIAS,  # [B, T * rows * columns, C], [N, C], [N] or None
    SHIFT, SCALE,  # [B, num_rows, C]
    OUT,  # [B, Z, num_slots, h, w]
    LATENT_INDEX, BLOCK_MAP, STEP,  # [T] int32 or None, the same, float32 of one element or None
    x_sb, x_sl, shift_sb, shift_sr, scale_sb, scale_sr,
    out_strides,  # (batch, channel, block, row)
    num_slots, num_rows, rows, columns, factor, eps,
    C: tl.constexpr, Z: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, UPDATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the formula of ``project_step.py``.

    ``UPDATE``: ``factor``, or what STEP holds, times the velocity is added to what OUT holds.
    """
    N: tl.constexpr = Z * PATCH_H * PATCH_W
    block_len = rows * columns
    tiles = tl.cdiv(block_len, BLOCK_M)
    i_block = tl.program_id(0) // tiles
    i_m = tl.program_id(0) % tiles
    b = tl.cast(tl.program_id(1), tl.int64)
    slot = i_block
    if LATENT_INDEX is not None:
        slot = tl.load(LATENT_INDEX + i_block)
        if (slot < 0) | (slot >= num_slots):
            return
    i_row = i_block
    if BLOCK_MAP is not None:
        i_row = tl.load(BLOCK_MAP + i_block)
        known = (i_row >= 0) & (i_row < num_rows)
        i_row = tl.where(known, i_row, 0)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # within the block
    m_m = o_m < block_len
    p_x = X + b * x_sb + (tl.cast(i_block, tl.int64) * block_len + o_m) * x_sl  # [BLOCK_M]
    mean = tl.zeros([BLOCK_M], tl.float32)
    centred = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, C, BLOCK_K, num_stages=NUM_STAGES):
        o_c = start + tl.arange(0, BLOCK_K)
        m_c = o_c < C
        x = tl.load(p_x[:, None] + o_c[None, :], mask=m_m[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        count = tl.minimum(C - start, BLOCK_K).to(tl.float32)
        chunk = tl.sum(x, 1) / count
        x = tl.where(m_c[None, :], x - chunk[:, None], 0.0)
        delta = chunk - mean
        share = count / (start + count)
        mean += delta * share
        centred += tl.sum(x * x, 1) + delta * delta * share * start
    rstd = 1.0 / tl.sqrt(centred / C + eps)

    p_shift = SHIFT + b * shift_sb + tl.cast(i_row, tl.int64) * shift_sr
    p_scale = SCALE + b * scale_sb + tl.cast(i_row, tl.int64) * scale_sr
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, C, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < C
        x = tl.load(p_x[:, None] + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        shift = tl.load(p_shift + o_k, mask=m_k, other=0.0).to(tl.float32)
        scale = tl.load(p_scale + o_k, mask=m_k, other=0.0).to(tl.float32)
        y = (x - mean[:, None]) * rstd[:, None] * (1.0 + scale)[None, :] + shift[None, :]  # [BLOCK_M, BLOCK_K]
        w = tl.load(WEIGHT + o_n[None, :] * C + o_k[:, None], mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(y.to(w.dtype), w, acc, input_precision="ieee")

    row, column = o_m // columns, o_m % columns
    p_out = OUT + b * out_strides[0] + tl.cast(slot, tl.int64) * out_strides[2]
    p_m = p_out + (row * PATCH_H).to(tl.int64) * out_strides[3] + column * PATCH_W  # [BLOCK_M]
    if STEP is not None:
        factor = tl.load(STEP)
    if BLOCK_MAP is not None:
        acc = tl.where(known, acc, float("nan"))
    # Part by part: addresses of 64 bits for all sums at once would spill. A thread holds both sums of a pair.
    even, odd = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
    if BLOCK_N <= 64:
        o_n = 2 * tl.arange(0, BLOCK_N // 2)
        _write(even, o_n, p_m, m_m, BIAS, out_strides, factor, N, Z, PATCH_W, UPDATE)
        _write(odd, o_n + 1, p_m, m_m, BIAS, out_strides, factor, N, Z, PATCH_W, UPDATE)
    else:
        o_n = 4 * tl.arange(0, BLOCK_N // 4)
        first, third = tl.split(tl.reshape(even, [BLOCK_M, BLOCK_N // 4, 2]))
        _write(first, o_n, p_m, m_m, BIAS, out_strides, factor, N, Z, PATCH_W, UPDATE)
        _write(third, o_n + 2, p_m, m_m, BIAS, out_strides, factor, N, Z, PATCH_W, UPDATE)
        second, fourth = tl.split(tl.reshape(odd, [BLOCK_M, BLOCK_N // 4, 2]))
        _write(second, o_n + 1, p_m, m_m, BIAS, out_strides, factor, N, Z, PATCH_W, UPDATE)
        _write(fourth, o_n + 3, p_m, m_m, BIAS, out_strides, factor, N, Z, PATCH_W, UPDATE)


def launch(call: Any) -> None:
    """Writes the target blocks of ``out`` of a checked ``ProjectCall``, which is not empty."""
    x, shift, scale, out, (_, patch_h, patch_w) = call.x, call.shift, call.scale, call.out, call.patch_size
    batch, length, width = x.shape
    z, num_slots, height, row_width = out.shape[1:]
    rows, columns = height // patch_h, row_width // patch_w
    num_blocks, num_rows = length // (rows * columns), shift.shape[1]
    if call.block_map is None and num_rows == 1:
        shift, scale = (y.expand(-1, num_blocks, -1) for y in (shift, scale))
    block_n = max(triton.next_power_of_2(call.weight.shape[0]), 16)
    capability, itemsize = capability_of(out.device), x.element_size()
    heuristic = ProjectConfig.heuristic(capability, block_n, itemsize)
    config = configured("project_step", capability, heuristic, block_n=block_n, width=width, itemsize=itemsize)
    project_step_fwd_kernel[(num_blocks * triton.cdiv(rows * columns, config.block_m), batch)](
        *call[:9], *x.stride()[:2], *shift.stride()[:2], *scale.stride()[:2], out.stride()[:4],
        num_slots, num_rows, rows, columns, float(call.factor or 0.0), call.eps,
        C=width, Z=z, PATCH_H=patch_h, PATCH_W=patch_w, UPDATE=call.step is not None or call.factor is not None,
        BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=config.block_k, NUM_STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
