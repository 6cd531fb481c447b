"""Tables of rotary embeddings over (block, row, column), as :mod:`swifti2v_kernels.norm.qk_norm_rope` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rope3D(NamedTuple):
    """The tables of a 3D rotary embedding: cosines and sines of each axis, float32.

    :func:`swifti2v_kernels.rope_3d` and :func:`swifti2v_kernels.rope_from_tokens` make them.

    Attributes:
        t: ``[blocks, pairs, 2]`` for the blocks of the window, by their index in the clip.
        h: ``[rows, pairs, 2]`` for the rows of tokens.
        w: ``[columns, pairs, 2]`` for the columns of tokens.
    """

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
    """Returns rotary tables for blocks of ``height x width`` tokens at the given indices of the clip.

    Pair j of an axis with d channels is turned by the angle ``position * theta ** (-2 * j / d)``, computed in float64.

    Args:
        block_index: index in the clip of every block of the window, in window order.
        height: rows of tokens of a block.
        width: columns of tokens of a block.
        head_dim: channels of one head (even).
        axis_dims: channels of the axes (t, h, w), even, with sum ``head_dim``; default as in Wan. HunyuanVideo has
            (16, 56, 56).
        theta: base of the frequencies.
        device: where the tables live; default CPU.

    Returns:
        Three tables ``[positions, pairs, 2]`` of cosines and sines in float32, for block, row and column.

    Raises:
        ValueError: ``head_dim`` is odd or smaller than 6, or ``axis_dims`` does not fit it.

    Examples:
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
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    positions = (torch.as_tensor(block_index, **exact), torch.arange(height, **exact), torch.arange(width, **exact))
    tables = []
    for position, channels in zip(positions, dims, strict=True):
        angle = torch.outer(position, theta ** (-torch.arange(0, channels, 2, **exact) / channels))
        tables.append(torch.stack((angle.cos(), angle.sin()), dim=-1).to(device, torch.float32))
    return Rope3D(*tables)


def rope_from_tokens(cos: Tensor, sin: Tensor) -> Rope3D:
    """Returns rotary tables for models that give the angles per token instead of per axis.

    Args:
        cos: cosines ``[L, pairs]`` for every token's pairs of channels. From a table that repeats each value for both
            members of a pair, as diffusers' do, pass ``cos[:, 0::2]``.
        sin: sines ``[L, pairs]``, likewise.

    Returns:
        A table for L tokens, whatever their places; its ``t`` is ``[L, pairs, 2]``, and the other axes are empty.

    Raises:
        ValueError: the two are not ``[L, pairs]``, or their shapes differ.

    Examples:
        >>> angle = torch.outer(torch.arange(10.0), torch.tensor([1.0, 0.1]))
        >>> [tuple(table.shape) for table in rope_from_tokens(angle.cos(), angle.sin())]
        [(10, 2, 2), (1, 0, 2), (1, 0, 2)]

    Source: rotary tables per token of HunyuanVideo and LTX-Video in diffusers.
    """
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(f"cos, sin: expected both [L, pairs], got {list(cos.shape)} and {list(sin.shape)}")
    table = torch.stack((cos.to(torch.float32), sin.to(torch.float32)), dim=-1)
    return Rope3D(table, table.new_empty(1, 0, 2), table.new_empty(1, 0, 2))
