"""The adaptive norms, residuals and feed-forwards of diffusers' layers on our operators, as all models share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import gated_residual, gated_residual_norm_modulate, norm_modulate
from ..hooks import hooked, hooked_inside

#: Tokens of a part: rows enough to fill a GPU with matmuls (not tuned on hardware), and 73 MB of hidden
#: activation for Wan 1.3B.
PART_TOKENS = 4096


def plain_norm(norm: nn.Module) -> dict[str, Any] | None:
    """Returns the keywords with which our norms compute what the module ``norm`` does.

    None if the module has to be called: another kind of norm, one that others have put in its place, or hooks on it.
    """
    if hooked(norm):
        return None
    kind = "layer" if type(norm) is nn.LayerNorm or type(norm).__name__ == "FP32LayerNorm" else ""
    kind = "rms" if type(norm).__name__ == "RMSNorm" else kind
    if not kind or norm.eps is None:
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return {"norm": kind, "weight": weight, "bias": bias, "eps": norm.eps}


def modulated_norm(
    x: Tensor,
    norm: nn.Module,
    shift: Tensor | None,
    scale: Tensor | None,
    block_map: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """Returns ``norm(x) * (1 + scale) + shift`` in the dtype of ``x``; without shift and scale the norm alone.

    Args:
        x: ``[B, L, C]``.
        norm: a module, which is called if it is not a plain one.
        shift: modulation rows ``[B, R, C]``, or None.
        scale: modulation rows ``[B, R, C]``, or None.
        block_map: the row of each block, as for :func:`swifti2v_kernels.norm_modulate`.
        wide: whether the host gives its norm ``x`` in float32.
    """
    options = plain_norm(norm)
    if options is not None:
        return norm_modulate(x, shift, scale, block_map=block_map, **options)
    y = norm(x.float() if wide else x)
    if shift is not None and scale is not None:
        shift, scale = (_by_token(rows, block_map, x.shape[1]) for rows in (shift, scale))
        y = y * (1 + scale) + shift
    return y.to(x.dtype)


def residual_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    norm: nn.Module,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    block_map: Tensor | None = None,
    wide: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns ``x' = x + gate * update`` and :func:`modulated_norm` of it, in one pass if the norm is a plain one.

    ``inplace``: ``x`` is overwritten.
    """
    update, options = like(update, x), plain_norm(norm)
    if options is not None:
        return gated_residual_norm_modulate(
            x, update, gate, shift, scale, block_map=block_map, inplace=inplace, **options
        )
    # A hook may keep what the norm is given, so that is not overwritten.
    x = gated_residual(x, update, gate, block_map=None if gate is None else block_map)
    return x, modulated_norm(x, norm, shift, scale, block_map, wide)


def _by_token(rows: Tensor, block_map: Tensor | None, length: int) -> Tensor:
    rows = rows if block_map is None else rows[:, block_map.long()]
    return rows if rows.shape[1] == 1 else rows.repeat_interleave(length // rows.shape[1], dim=1)


def in_parts(function: Callable[..., Tensor], y: Tensor, *others: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """Returns ``function(y, *others)``, made for PART_TOKENS tokens at a time, so that its intermediates stay small.

    Args:
        function: a function of each token by itself; ``[B, L, C]`` to the same shape.
        y: ``[B, L, ...]``. It is **overwritten** and returned, if anything is done in parts.
        *others: ``[B, L, ...]`` each.
        modules: those that ``function`` calls. With hooks on them, which would run once a part, with gradients, or
            under ``torch.compile``, everything is computed at once.
    """
    if y.shape[1] <= PART_TOKENS or torch.is_grad_enabled() or torch.compiler.is_compiling() or hooked_inside(*modules):
        return function(y, *others)
    for b in range(y.shape[0]):
        for start in range(0, y.shape[1], PART_TOKENS):
            part = slice(b, b + 1), slice(start, start + PART_TOKENS)
            y[part] = function(y[part], *(other[part] for other in others))
    return y


def modulation_rows(table: Tensor, temb: Tensor) -> Callable[[int], Tensor]:
    """Returns a function that gives row i of ``table [6, C] + temb [B, R, 6, C]`` as ``[B, R, C]``.

    Rows are float32 at least and made one by one: with a timestep per token all six are as large as six (in 16 bits
    twelve) residual streams.
    """
    table = table.to(temb.device, torch.promote_types(table.dtype, torch.float32))
    return lambda i: temb[:, :, i] + table[i]


def token_rows(x: Tensor) -> Tensor:
    """Returns ``x`` with contiguous channels: what comes from a patch embedding is a transposed view."""
    return x if x.stride(-1) == 1 else x.contiguous()


def like(update: Tensor, x: Tensor) -> Tensor:
    """Returns ``update`` in the dtype of ``x``: under autocast a module's output is not in that of the stream."""
    return update if update.dtype == x.dtype else update.to(x.dtype)
