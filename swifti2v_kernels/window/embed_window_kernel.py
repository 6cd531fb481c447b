"""The Triton kernel of ``embed_window``: one program owns ``block_m`` tokens and ``block_n`` of their channels.

* **Pixels are gathered, not copied.** A token's address is its block's, row's and column's, a feature's that of its
  channel and pixel; their sum is where the element lies. Tiles may straddle blocks, so short blocks waste no rows.
* **The channels of one tile of tokens are computed side by side**, so that the pixels gathered by one program are in
  the cache for the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from ..common.configs import configured
from ..common.target import capability_of


@dataclass(frozen=True)
class EmbedConfig:
    """Tile sizes and launch options of one shape class on one capability."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    SPACE: ClassVar = {
        "block_m": (64, 128),
        "block_n": (128, 256),
        "block_k": (16, 32),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    }

    @classmethod
    def heuristic(cls, capability: int | None, width: int, itemsize: int) -> EmbedConfig:
        """Returns what is launched where nothing was measured; ``itemsize`` is that of the weight."""
        if capability is None:
            return cls(32, 64, 32, 4, 1)
        if itemsize == 4:
            return cls(64, 64, 16, 8, 2)  # without tensor cores a larger tile only takes registers
        # Steps of 16 features, because a pixel's address is 64 bits and more of them would spill; 144 are whole steps.
        if width > 128 and capability // 10 in (9, 10):
            # Wide tiles gather the same pixels less often; the faster the tensor cores, the more that counts.
            return cls(64, 256, 16, 4, 2) if capability // 10 == 9 else cls(128, 256, 16, 8, 2)
        return cls(128, 128, 16, 8, 2)


@triton.jit(do_not_specialize=["num_latents", "num_references", "length", "rows", "columns"])
def embed_window_fwd_kernel(
    LATENTS,  # [B, Z, S, h, w]
    WEIGHT, BIAS,  # [C, K], [C] or None
    REFERENCE,  # [B, z_ref, N, h, w] or None
    LATENT_INDEX, REFERENCE_INDEX, MASK,  # [T] int32 or None, the same, [T] float32 or None
    OUT,  # [B, length, C]
    latent_strides, reference_strides,  # (batch, channel, block, row)
    out_sb, out_sl,
    num_latents, num_references, length, rows, columns,
    Z: tl.constexpr, MASK_CHANNELS: tl.constexpr, IN_CHANNELS: tl.constexpr, C: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    GIVEN: tl.constexpr, CONDITIONED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the formula of ``embed_window.py``.

    ``GIVEN``: index -1 names a block of the reference. ``CONDITIONED``: the weight has channels for the reference.
    """
    K: tl.constexpr = IN_CHANNELS * PATCH_H * PATCH_W
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    i_m, i_n = tl.program_id(0) // TILES_N, tl.program_id(0) % TILES_N
    b = tl.cast(tl.program_id(1), tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < length, o_n < C
    block = o_m // (rows * columns)
    row = (o_m // columns) % rows
    column = o_m % columns

    frame = block
    if LATENT_INDEX is not None:
        frame = tl.load(LATENT_INDEX + block, mask=m_m, other=0)
    m_latents = (frame >= 0) & (frame < num_latents)
    bad = frame < -1 if GIVEN else frame < 0
    bad = bad | (frame >= num_latents)
    given = frame == -1
    p_latents = LATENTS + b * latent_strides[0] + frame.to(tl.int64) * latent_strides[2]
    p_latents += (row * PATCH_H).to(tl.int64) * latent_strides[3] + column * PATCH_W  # [BLOCK_M]
    if REFERENCE is not None:
        shown = block
        if REFERENCE_INDEX is not None:
            shown = tl.load(REFERENCE_INDEX + block, mask=m_m, other=0)
        m_reference = (shown >= 0) & (shown < num_references)
        bad = bad | ((shown < 0) | (shown >= num_references)) & (given | CONDITIONED)
        p_reference = REFERENCE + b * reference_strides[0] + shown.to(tl.int64) * reference_strides[2]
        p_reference += (row * PATCH_H).to(tl.int64) * reference_strides[3] + column * PATCH_W
    if MASK is not None:
        value = tl.load(MASK + block, mask=m_m, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        # Not by way of the pixel o_k % (PATCH_H * PATCH_W): the compiler would not see that x counts up with o_k.
        channel, y, x = o_k // (PATCH_H * PATCH_W), (o_k // PATCH_W % PATCH_H).to(tl.int64), o_k % PATCH_W
        m_a = (m_m & m_latents)[:, None] & (channel < Z)[None, :]
        offset = channel.to(tl.int64) * latent_strides[1] + y * latent_strides[3] + x
        a = tl.load(p_latents[:, None] + offset[None, :], mask=m_a, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        if REFERENCE is not None:
            # From the reference come its own channels, and those of the latents of a given block.
            own = (channel >= Z + MASK_CHANNELS) & (channel < IN_CHANNELS)
            taken = own[None, :]
            if GIVEN:
                taken = taken | (given[:, None] & (channel < Z)[None, :])
            offset = tl.where(own, channel - (Z + MASK_CHANNELS), channel).to(tl.int64) * reference_strides[1]
            offset += y * reference_strides[3] + x
            m_r = taken & (m_m & m_reference)[:, None]
            r = tl.load(p_reference[:, None] + offset[None, :], mask=m_r, other=0.0).to(tl.float32)
            a = tl.where(taken, r, a)
        if MASK is not None:
            a = tl.where(((channel >= Z) & (channel < Z + MASK_CHANNELS))[None, :], value[:, None], a)
        p_w = WEIGHT + o_n[None, :] * K + o_k[:, None]
        if K % BLOCK_K == 0 and C % BLOCK_N == 0:
            w = tl.load(p_w)  # [BLOCK_K, BLOCK_N]
        else:
            w = tl.load(p_w, mask=(o_k < K)[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(a.to(w.dtype), w, acc, input_precision="ieee")
    if BIAS is not None:
        acc += tl.load(BIAS + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(bad[:, None], float("nan"), acc)
    p_out = OUT + b * out_sb + o_m[:, None].to(tl.int64) * out_sl + o_n[None, :]
    tl.store(p_out, acc.to(OUT.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def launch(call: Any) -> None:
    """Writes ``out`` of a checked ``EmbedCall``, which is not empty."""
    latents, weight, reference = call.latents, call.weight, call.reference
    batch, length, width = call.out.shape
    _, in_channels, _, patch_h, patch_w = weight.shape
    z, num_latents, height, row_width = latents.shape[1:]
    z_ref, num_references = reference.shape[1:3] if reference is not None else (0, 0)
    capability, itemsize = capability_of(latents.device), weight.element_size()
    heuristic = EmbedConfig.heuristic(capability, width, itemsize)
    config = configured("embed_window", capability, heuristic, width=width, channels=in_channels, itemsize=itemsize)
    tiles = triton.cdiv(length, config.block_m) * triton.cdiv(width, config.block_n)
    embed_window_fwd_kernel[(tiles, batch)](
        *call, latents.stride()[:4], reference.stride()[:4] if reference is not None else (0, 0, 0, 0),
        *call.out.stride()[:2],
        num_latents, num_references, length, height // patch_h, row_width // patch_w,
        Z=z, MASK_CHANNELS=0 if call.mask is None else in_channels - z - z_ref, IN_CHANNELS=in_channels, C=width,
        PATCH_H=patch_h, PATCH_W=patch_w, GIVEN=z_ref == z, CONDITIONED=in_channels != z,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
