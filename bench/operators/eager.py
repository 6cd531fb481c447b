"""The operators as plain PyTorch: what one writes without a library, in diffusers' order of operations.

16-bit inputs are float32 inside. Parameters have the names of the operators' own arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from swifti2v_kernels import Rope3D

EPS = 1e-6


def by_block(table: Tensor, block_map: Tensor) -> Tensor:
    """Returns the rows ``[B, T, 1, C]`` of a modulation table ``[B, R, C]``, one a block."""
    return table[:, block_map].unsqueeze(2)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor, block_map: Tensor) -> Tensor:
    """Returns the residual stream after an update."""
    blocks = (block_map.shape[0], -1)
    y = x.float().unflatten(1, blocks) + update.unflatten(1, blocks) * by_block(gate, block_map)
    return y.flatten(1, 2).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns LayerNorm in float32."""
    return F.layer_norm(x.float(), x.shape[2:], weight, bias, EPS)


def adaln(
    x: Tensor, block_map: Tensor, update: Tensor | None = None, gate: Tensor | None = None,
    shift: Tensor | None = None, scale: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, norm: Callable[..., Tensor] = layer_norm,
) -> Any:  # fmt: skip
    """Returns the modulated or affine norm of tokens ``[B, L, C]``, after an update, where there is one, both."""
    if update is not None:
        x = gated_residual(x, update, gate, block_map)  # type: ignore[arg-type]
    y = norm(x, weight, bias)
    if shift is not None and scale is not None:
        y = y.unflatten(1, (block_map.shape[0], -1))
        y = (y * (1 + by_block(scale, block_map)) + by_block(shift, block_map)).flatten(1, 2)
    y = y.to(x.dtype)
    return y if update is None else (x, y)


def rotary_tables(rope: Rope3D) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines ``[1, L, 1, D]`` for every token, as diffusers hands them to its layers."""
    grid = tuple(axis.shape[0] for axis in rope)
    tables = []
    for i in range(2):
        axes = [
            table[..., i].view([-1 if j == axis else 1 for j in range(3)] + [table.shape[1]]).expand(*grid, -1)
            for axis, table in enumerate(rope)
        ]
        tables.append(torch.cat(axes, dim=-1).repeat_interleave(2, dim=-1).reshape(1, math.prod(grid), 1, -1))
    return tables[0], tables[1]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``[B, L, H, D]`` by tables ``[1, L, 1, D]``, as diffusers' ``WanAttnProcessor`` does."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = first * sin + second * cos
    return out


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Returns RMSNorm over all heads."""
    return F.rms_norm(x, x.shape[2:], weight, EPS)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope3D, num_heads: int,
    norm: Callable[..., Tensor] = rms_norm,
) -> functools.partial[Any]:  # fmt: skip
    """Returns a call of norms over all heads and rotary embedding: ``[B, L, H * D]`` to ``[B, L, H, D]``."""
    return functools.partial(_norm_and_rotate, norm, (q, k), (q_weight, k_weight), *rotary_tables(rope), num_heads)


def _norm_and_rotate(norm: Any, qk: Any, weights: Any, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, ...]:
    normed = [norm(x, weight) for x, weight in zip(qk, weights, strict=True)]
    return tuple(rotate(x.unflatten(2, (heads, -1)), cos, sin) for x in normed)


def embed_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Embeds patches of ``[B, C_in, T, h, w]`` by a matmul."""
    patches = rearrange(x, "b c t (y p) (x q) -> b (t y x) (c p q)", p=weight.shape[3], q=weight.shape[4])
    return F.linear(patches, weight.flatten(1), bias)


def embed_window(
    latents: Tensor, weight: Tensor, bias: Tensor, reference: Tensor, mask: Tensor, latent_index: Tensor,
    reference_index: Tensor, embed: Callable[..., Tensor] = embed_patches,
) -> Tensor:  # fmt: skip
    """Gathers the window's channels, latents, mask (4 channels) and reference, and embeds their patches."""
    known = reference[:, :, reference_index]
    noisy = torch.where((latent_index < 0)[:, None, None], known, latents[:, :, latent_index.clamp(min=0)])
    shown = mask[None, None, :, None, None].expand(noisy.shape[0], 4, -1, *noisy.shape[3:])
    return embed(torch.cat((noisy, shown, known), dim=1).to(weight.dtype), weight, bias)


def _project(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, out: Tensor, slots: Tensor,
    block_map: Tensor, step: Tensor,
) -> Tensor:  # fmt: skip
    tokens = F.linear(adaln(x, block_map, shift=shift, scale=scale), weight, bias)
    pattern = "b (t y x) (p q c) -> b c t (y p) (x q)"
    velocity = rearrange(tokens, pattern, y=out.shape[3] // 2, x=out.shape[4] // 2, p=2, q=2)
    return out.index_copy_(2, slots, out.index_select(2, slots) + step * velocity)


def project_step(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, out: Tensor, latent_index: Tensor,
    block_map: Tensor, step: Tensor,
) -> functools.partial[Any]:  # fmt: skip
    """Returns a call of head and Euler step of the target blocks, into the store of latents."""
    targets = latent_index >= 0
    tokens = x.unflatten(1, (len(targets), -1))[:, targets].flatten(1, 2)
    slots = latent_index[targets].long()
    return functools.partial(_project, tokens, weight, bias, shift, scale, out, slots, block_map[targets], step)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes the first half of the feed-forward."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
