"""The adaptive norms, residuals and feed-forwards of hosts' layers on our operators, as all models share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..norm.adaln import gated_residual, gated_residual_norm_modulate, norm_modulate
from .recipe import hooked

#: What replaces the norms of a layer, for the report.
BY = "norm_modulate, gated_residual_norm_modulate, gated_residual"
#: Tokens of a part: rows enough to fill a GPU with matmuls (not tuned on hardware), and 73 MB of hidden
#: activation for Wan 1.3B.
PART_TOKENS = 4096
#: Norms of the hosts by class name: diffusers' two, and the original Wan code's, which a probe has looked at.
_PLAIN = {"FP32LayerNorm": "layer", "WanLayerNorm": "layer", "RMSNorm": "rms"}
#: Norms of queries and keys, by class name.
_RMS = ("RMSNorm", "WanRMSNorm")


def plain_norm(norm: nn.Module) -> dict[str, Any] | None:
    """Returns the keywords with which our norms compute what the module ``norm`` does.

    None if the module has to be called: another kind of norm, one that others have put in its place, or hooks on it.
    """
    if hooked(norm):
        return None
    kind = "layer" if type(norm) is nn.LayerNorm else _PLAIN.get(type(norm).__name__)
    if kind is None or norm.eps is None:
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return {"norm": kind, "weight": weight, "bias": bias, "eps": norm.eps}


def rms_parameters(norm: nn.Module | None, x: Tensor) -> tuple[Tensor, float] | None:
    """Returns weight and epsilon of an RMSNorm that the fused operator can take over for ``x``, else None.

    A module with hooks is called, since its weight may be on another device until then.
    """
    if norm is None or type(norm).__name__ not in _RMS or hooked(norm):
        return None
    weight = norm.weight
    if weight is None or getattr(norm, "bias", None) is not None or weight.device != x.device:
        return None
    return weight, torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


def alike(first: tuple[Tensor, float] | None, second: tuple[Tensor, float] | None) -> bool:
    """Returns whether one launch can norm queries and keys with these :func:`rms_parameters`."""
    return bool(first and second) and (first[0].dtype, first[1]) == (second[0].dtype, second[1])


def modulated_norm(
    x: Tensor,
    norm: nn.Module,
    shift: Tensor | None,
    scale: Tensor | None,
    block_map: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """Returns ``norm(x) * (1 + scale) + shift`` in the dtype of ``x [B, L, C]``; without the two the norm alone.

    Their rows ``[B, R, C]`` belong to blocks by ``block_map``, as for :func:`swifti2v_kernels.norm_modulate`. A norm
    that is not a plain one is called; ``wide`` says that the host gives it ``x`` in float32.
    """
    options = plain_norm(norm)
    if options is not None:
        return norm_modulate(x, shift, scale, block_map=block_map, **options)
    y = norm(x.float() if wide else x)
    if shift is not None and scale is not None:
        if block_map is not None:
            shift, scale = (rows[:, block_map.long()] for rows in (shift, scale))
        if shift.shape[1] > 1:
            shift, scale = (r.repeat_interleave(x.shape[1] // r.shape[1], dim=1) for r in (shift, scale))
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
    # Under autocast a module's output is not in the dtype of the stream.
    update, options = update.to(x.dtype), plain_norm(norm)
    if options is not None:
        return gated_residual_norm_modulate(
            x, update, gate, shift, scale, block_map=block_map, inplace=inplace, **options
        )
    x = gated_residual(x, update, gate, block_map=None if gate is None else block_map, inplace=inplace)
    return x, modulated_norm(x, norm, shift, scale, block_map, wide)


def cross_layer(
    x: Tensor,
    row: Callable[[int], Tensor],
    norms: Sequence[nn.Module | None],
    attentions: Sequence[Callable[[Tensor], Tensor]],
    feed_forward: nn.Module,
    wide: bool = True,
) -> Tensor:
    """Computes a layer of self-attention, cross-attention and feed-forward, each after its norm, on ``x [B, L, C]``.

    ``row`` gives shift, scale and gate of the first (0 to 2) and of the last (3 to 5). An ``Identity`` is no
    norm, as is None. Neither ``x`` nor what attention is given is overwritten, which a hook on it may keep.
    """
    update = attentions[0](modulated_norm(x, norms[0], row(0), row(1), wide=wide))
    if norms[1] is None or (isinstance(norms[1], nn.Identity) and not hooked(norms[1])):
        x = y = gated_residual(x, update.to(x.dtype), row(2))
    else:
        x, y = residual_norm(x, update, row(2), norms[1], wide=wide)
    update, inplace = attentions[1](y), y is not x and not torch.is_grad_enabled()
    x, y = residual_norm(x, update, None, norms[2], row(3), row(4), wide=wide, inplace=inplace)
    update = in_parts(feed_forward, y, modules=[feed_forward]).to(x.dtype)
    return gated_residual(x, update, row(5), inplace=not torch.is_grad_enabled())


class Stream(NamedTuple):
    """One of the streams of a layer: ``x [B, L, C]``, both its norms with shift, scale and gate, its feed-forward.

    The rows of the modulation, ``[B, R, C]``, belong to the stream's blocks by ``block_map``.
    """

    x: Tensor
    norm1: nn.Module
    first: Sequence[Tensor]
    norm2: nn.Module
    second: Sequence[Tensor]
    feed_forward: nn.Module
    block_map: Tensor | None = None


def joint_layer(streams: Sequence[Stream], attention: nn.Module, **options: Any) -> tuple[Tensor, ...]:
    """Computes a layer whose streams, video and text, have the ``attention`` in common, which is given ``options``."""
    normed = [modulated_norm(s.x, s.norm1, *s.first[:2], s.block_map) for s in streams]
    updates = attention(hidden_states=normed[0], encoder_hidden_states=normed[1], **options)
    results = []
    for s, update in zip(streams, updates, strict=True):
        (*_, gate), (shift, scale, gate_ff) = s.first, s.second
        x, y = residual_norm(s.x, update, gate, s.norm2, shift, scale, s.block_map)
        update = in_parts(s.feed_forward, y, modules=[s.feed_forward]).to(x.dtype)
        inplace = not torch.is_grad_enabled()
        results.append(gated_residual(x, update, gate_ff, block_map=s.block_map, inplace=inplace))
    return tuple(results)


def in_parts(function: Callable[..., Tensor], y: Tensor, *others: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """Returns ``function(y, *others)``, made for PART_TOKENS tokens at a time, so that its intermediates stay small.

    The function is one of each token by itself, ``[B, L, C]`` to the same shape; ``y`` is **overwritten** if parts are
    made. With hooks on the ``modules`` that it calls, which would run once a part, with gradients, or under
    ``torch.compile``, everything is computed at once.
    """
    hooks = any(hooked(part) for root in modules for part in root.modules())
    if y.shape[1] <= PART_TOKENS or torch.is_grad_enabled() or torch.compiler.is_compiling() or hooks:
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
