"""Tables of rotary embeddings over (block, row, column), as :mod:`swifti2v_kernels.norm.qk_norm_rope` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rope3D(NamedTuple):
    """Cosines and sines per axis, each ``[positions, pairs, 2]`` in float32; made by :func:`rope_3d` or
    :func:`rope_from_tokens`."""

    t: Tensor
    h: Tensor
    w: Tensor


def rope_3d(
    block_index: Sequence[int] | Tensor,
    height: int,
    width: int,
    head_dim: int,
    *,
    axis_dims: tuple[int, int, int] | None = None,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> Rope3D:
    """Rotary tables for blocks of ``height x width`` tokens at the given indices of the clip.

    Args:
        block_index: index in the clip of every block of the window, in window order.
        height, width: token rows and columns of a block.
        head_dim: channels of one head (even).
        axis_dims: channels of the axes (t, h, w), even, with sum ``head_dim``; default as in Wan. HunyuanVideo has
            (16, 56, 56).
        theta: base of the frequencies.
        device: where the tables live; default CPU.

    Raises:
        ValueError: ``head_dim`` is odd or smaller than 6, or ``axis_dims`` does not fit it.

    Example:
        >>> [tuple(table.shape) for table in rope_3d([0, 9, 10], 8, 16, 128)]
        [(3, 22, 2), (8, 21, 2), (16, 21, 2)]

    Source: Wan (``rope_apply``; diffusers ``WanRotaryPosEmbed``).
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim: expected an even number of at least 6, got {head_dim}")
    spatial = 2 * (head_dim // 6)
    dims = (head_dim - 2 * spatial, spatial, spatial) if axis_dims is None else tuple(axis_dims)
    if len(dims) != 3 or sum(dims) != head_dim or any(d % 2 or d < 0 for d in dims):
        raise ValueError(f"axis_dims: expected three even numbers with sum {head_dim}, got {axis_dims}")
    index = torch.as_tensor(block_index, dtype=torch.float64)
    tables = []
    for position, channels in zip((index, torch.arange(height), torch.arange(width)), dims, strict=True):
        frequency = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angle = torch.outer(position.to("cpu", torch.float64), frequency)
        tables.append(torch.stack((angle.cos(), angle.sin()), dim=-1).to(device, torch.float32))
    return Rope3D(*tables)


def rope_from_tokens(cos: Tensor, sin: Tensor) -> Rope3D:
    """Rotary tables of models that give the angles per token instead of per axis.

    Args:
        cos, sin: ``[L, pairs]``, of every token's pairs of channels. Of tables that repeat each value for both members
            of a pair, as diffusers' do, pass ``cos[:, 0::2]`` and ``sin[:, 0::2]``.

    Returns:
        A table for L tokens, whatever their places: ``t`` is ``[L, pairs, 2]``, the other axes are empty.

    Raises:
        ValueError: other shapes, or shapes that differ.

    Example:
        >>> angle = torch.outer(torch.arange(10.0), torch.tensor([1.0, 0.1]))
        >>> [tuple(table.shape) for table in rope_from_tokens(angle.cos(), angle.sin())]
        [(10, 2, 2), (1, 0, 2), (1, 0, 2)]
    """
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(f"cos, sin: expected both [L, pairs], got {list(cos.shape)} and {list(sin.shape)}")
    table = torch.stack((cos, sin), dim=-1).to(torch.float32)
    return Rope3D(table, table.new_empty(1, 0, 2), table.new_empty(1, 0, 2))
