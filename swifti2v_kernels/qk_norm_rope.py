"""RMSNorm of queries and keys over the model width, then rotary embedding over (block, row, column).

    y = x / sqrt(mean(x^2) + eps) * weight                   over all heads together (Wan)
    (y[2p], y[2p+1]) -> rotation by position * theta^(-2j/d) of the pair p's axis

The head's D channels are split into t | h | w parts of D - 4*(D//6), 2*(D//6) and 2*(D//6) channels (44 | 42 | 42 for
D = 128), pairs are interleaved (2p, 2p + 1), and the position of a token is (its block's index in the clip, row,
column): a window made of blocks 0, 9, 10, 11 is rotated as in the whole clip.

| tensor      | shape        | dtype            |
|-------------|--------------|------------------|
| q, k        | [B, L, H*D]  | fp32, fp16, bf16 |
| weights     | [H*D]        | any float        |
| rope.{t,h,w}| [n, d/2, 2]  | fp32 (cos, sin)  |
| out         | [B, L, H, D] | as the input     |

Angles are float64, their cosine and sine float32, the products float32 with one rounding at the end; the tables are per
axis and never a full [L, D]. Bytes: q and k read once and written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rope3D(NamedTuple):
    """Cosines and sines per axis, each ``[positions, pairs, 2]`` in float32; made by :func:`rope_3d`."""

    t: Tensor
    h: Tensor
    w: Tensor


def rope_3d(
    block_index: Sequence[int] | Tensor,
    height: int,
    width: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> Rope3D:
    """Rotary tables for blocks of ``height x width`` tokens at the given indices of the clip.

    Args:
        block_index: index in the clip of every block of the window, in window order.
        height, width: token rows and columns of a block.
        head_dim: channels of one head (even).
        theta: base of the frequencies.
        device: where the tables live; default CPU.

    Raises:
        ValueError: ``head_dim`` is odd or smaller than 6.

    Source: Wan (``rope_apply``; diffusers ``WanRotaryPosEmbed``).
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim: expected an even number of at least 6, got {head_dim}")
    spatial = 2 * (head_dim // 6)
    index = torch.as_tensor(block_index, dtype=torch.float64)
    axes = ((index, head_dim - 2 * spatial), (torch.arange(height), spatial), (torch.arange(width), spatial))
    tables = []
    for position, channels in axes:
        frequency = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angle = torch.outer(position.to("cpu", torch.float64), frequency)
        tables.append(torch.stack((angle.cos(), angle.sin()), dim=-1).to(device, torch.float32))
    return Rope3D(*tables)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Rope3D | None,
    num_heads: int,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``q`` and ``k`` over all heads, split into heads, and 3D RoPE.

    Args:
        q, k: outputs of the projections, ``[B, L, H * D]``. Without ``rope`` their lengths may differ.
        q_weight, k_weight: norm weights ``[H * D]``.
        rope: tables of :func:`rope_3d` with ``L = blocks * height * width``, or None (cross-attention).
        num_heads: ``H``.
        eps: added to the mean square.

    Returns:
        ``(q, k)``, each ``[B, L, H, D]`` in the dtype of its input.

    Raises:
        ValueError: widths, heads or the tables do not fit.

    Source: Wan self-attention (diffusers ``WanAttnProcessor``).
    """
    return (
        _norm_rope("q", q, q_weight, rope, num_heads, eps),
        _norm_rope("k", k, k_weight, rope, num_heads, eps),
    )


def _norm_rope(name: str, x: Tensor, weight: Tensor, rope: Rope3D | None, num_heads: int, eps: float) -> Tensor:
    if x.ndim != 3 or x.shape[2] % num_heads:
        raise ValueError(f"{name}: expected [B, L, {num_heads} * D], got {tuple(x.shape)}")
    if weight.shape != x.shape[2:]:
        raise ValueError(f"{name}_weight: expected [{x.shape[2]}], got {tuple(weight.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype).unflatten(2, (num_heads, -1))
    return y if rope is None else _rotate(name, y, rope)


def _rotate(name: str, x: Tensor, rope: Rope3D) -> Tensor:
    grid = tuple(axis.shape[0] for axis in rope)
    pairs = tuple(axis.shape[1] for axis in rope)
    if grid[0] * grid[1] * grid[2] != x.shape[1]:
        raise ValueError(f"rope: tables for {grid[0]} x {grid[1]} x {grid[2]} tokens, but {name} has {x.shape[1]}")
    if 2 * sum(pairs) != x.shape[3]:
        raise ValueError(f"rope: tables for head_dim {2 * sum(pairs)}, but {name} has {x.shape[3]}")
    wide = torch.promote_types(x.dtype, torch.float32)
    # [B, t, h, w, H, pair, 2]: each axis rotates its own pairs by a table broadcast over the other two axes.
    parts = x.to(wide).unflatten(1, grid).unflatten(-1, (-1, 2)).split(pairs, dim=-2)
    rotated = []
    for axis, (part, table) in enumerate(zip(parts, rope, strict=True)):
        shape = [1, 1, 1, 1, pairs[axis]]
        shape[axis] = grid[axis]
        cos, sin = (table[..., i].to(wide).view(1, *shape) for i in range(2))
        even, odd = part.unbind(-1)
        rotated.append(torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1))
    return torch.cat(rotated, dim=-2).flatten(-2).flatten(1, 3).to(x.dtype)
