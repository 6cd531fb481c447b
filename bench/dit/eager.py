"""The operators as plain PyTorch: what one writes without a library, in diffusers' order of operations.

16-bit inputs are float32 inside, as in diffusers; float64 stays float64, so that the same functions are the exact
results that every implementation is held against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

EPS = 1e-6


def wide(x: Tensor) -> Tensor:
    """Converts to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def by_block(table: Tensor, block_map: Tensor) -> Tensor:
    """Returns the rows ``[B, T, 1, C]`` of a modulation table ``[B, R, C]``, one a block."""
    return table[:, block_map].unsqueeze(2)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, block_map: Tensor) -> Tensor:
    """Returns AdaLN of the tokens ``[B, L, C]``."""
    y = F.layer_norm(wide(x), x.shape[2:], eps=EPS).unflatten(1, (block_map.shape[0], -1))
    return (y * (1 + by_block(scale, block_map)) + by_block(shift, block_map)).flatten(1, 2).to(x.dtype)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor, block_map: Tensor) -> Tensor:
    """Returns the residual stream after an update."""
    blocks = (block_map.shape[0], -1)
    y = wide(x).unflatten(1, blocks) + update.unflatten(1, blocks) * by_block(gate, block_map)
    return y.flatten(1, 2).to(x.dtype)


def gated_residual_norm_modulate(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, block_map: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the residual stream after an update, and its AdaLN."""
    x = gated_residual(x, update, gate, block_map)
    return x, norm_modulate(x, shift, scale, block_map)


def gated_residual_norm(
    x: Tensor, update: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, block_map: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the residual stream after an update, and its affine LayerNorm, as it is before cross-attention."""
    x = gated_residual(x, update, gate, block_map)
    y = wide(x)
    return x, F.layer_norm(y, x.shape[2:], weight.to(y.dtype), bias.to(y.dtype), EPS).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``[B, L, H, D]`` by tables ``[1, L, 1, D]``, as diffusers' ``WanAttnProcessor`` does."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = first * sin + second * cos
    return out


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Applies RMSNorm over all heads and rotary embedding: ``[B, L, H * D]`` to ``[B, L, H, D]``."""
    q, k = F.rms_norm(q, q.shape[2:], q_weight, EPS), F.rms_norm(k, k.shape[2:], k_weight, EPS)
    q, k = q.unflatten(2, (heads, -1)), k.unflatten(2, (heads, -1))
    return rotate(q, cos, sin), rotate(k, cos, sin)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes the first half of the feed-forward."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def gather_window(
    latents: Tensor, reference: Tensor, mask: Tensor, latent_index: Tensor, reference_index: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gathers the window's channels ``[B, C_in, T, h, w]``: latents, mask (4 channels), reference."""
    known = reference[:, :, reference_index]
    noisy = torch.where((latent_index < 0)[:, None, None], known, latents[:, :, latent_index.clamp(min=0)])
    shown = mask[None, None, :, None, None].expand(noisy.shape[0], 4, -1, *noisy.shape[3:])
    return torch.cat((noisy, shown, known), dim=1).to(dtype)


def embed_window(
    latents: Tensor,
    reference: Tensor,
    mask: Tensor,
    latent_index: Tensor,
    reference_index: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Embeds the window's patches by a matmul."""
    x = gather_window(latents, reference, mask, latent_index, reference_index, weight.dtype)
    patches = rearrange(x, "b c t (y p) (x q) -> b (t y x) (c p q)", p=weight.shape[3], q=weight.shape[4])
    return F.linear(patches, weight.flatten(1), bias)


def unpatchify(tokens: Tensor, height: int, width: int) -> Tensor:
    """Reorders ``[B, T * height * width, 2 * 2 * z]`` to ``[B, z, T, 2 * height, 2 * width]``."""
    pattern = "b (t y x) (p q c) -> b c t (y p) (x q)"
    return rearrange(tokens, pattern, y=height, x=width, p=2, q=2)


def project_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    latents: Tensor,
    slots: Tensor,
    block_map: Tensor,
    step: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """Computes head and Euler step of target blocks ``x``; writes their latents into the store, which it returns."""
    tokens = F.linear(norm_modulate(x, shift, scale, block_map), weight, bias)
    velocity = unpatchify(tokens, *grid)
    return latents.index_copy_(2, slots, latents.index_select(2, slots) + step * velocity)
