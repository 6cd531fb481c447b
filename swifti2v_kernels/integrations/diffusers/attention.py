"""The parts that our attention for all models of diffusers shares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import Rope3D, norm_rope, qk_norm_rope, rope_from_tokens, segment_attention
from ..norms import alike, rms_parameters
from ..recipe import Recipe, hook_kinds

#: An attention module's projections and norms for its first stream, and those for the text of a joint attention.
OWN = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
#: diffusers' (cos, sin) of a rotation, or None.
Rotary = tuple[Tensor, Tensor] | None


def attention_recipe(processor: str, by: str, needs: Sequence[str], forward: Callable[..., Any]) -> Recipe:
    """Returns the recipe for attention modules with diffusers' ``processor``; the other arguments are a recipe's.

    Where somebody chooses another processor, a backend or context parallelism, before or after, diffusers computes.
    """
    known = inspect.signature(forward).parameters

    @functools.wraps(forward)
    def chosen(attn: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= known.keys():
            return "an argument that is not known"
        return other_choice(attn, processor) or forward(attn, *args, **kwargs)

    needs = (*OWN, "to_out", "heads", *needs)
    fits = functools.partial(other_choice, known=processor)
    return Recipe(processor, "attention", by, chosen, needs, processor=True, fits=fits)


def other_choice(attn: Any, known: str) -> str | None:
    """Returns why diffusers' own processor, of its class ``known``, or another one is to compute, or None."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    processor, kind = attn.processor, type(attn.processor)
    # Somebody's own may have the name of diffusers'.
    if kind.__name__ != known or not kind.__module__.startswith("diffusers."):
        return f"it has another processor, {kind.__name__} of {kind.__module__}"
    backend = getattr(processor, "_attention_backend", None)
    if backend is not None:
        return f"the attention backend {getattr(backend, 'value', backend)} was chosen for it"
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism is enabled for it"
    # This hook skips attention by catching the call of torch's that is in diffusers' own processor.
    if "AttentionProcessorSkipHook" in hook_kinds(attn):
        return "a hook may skip the attention inside diffusers' own processor"
    # Active for the whole process, by ``attention_backend(...)``, ``set_attention_backend`` or a variable.
    active, _ = _AttentionBackendRegistry.get_active_backend()
    usual = active == AttentionBackendName.NATIVE
    return None if usual else f"the attention backend {getattr(active, 'value', active)} is active"


def project(
    attn: nn.Module, x: Tensor, names: Sequence[str], rotary_emb: Rotary, context: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries of ``x [B, L, C]``, keys and values of it or of ``context``, as ``[B, L, H, D]``.

    The first two are normed and rotated, by one launch if possible. ``names``: the attributes of the three projections
    and of the two norms, such as :data:`OWN`.
    """
    to_q, to_k, to_v, norm_q, norm_k = (getattr(attn, name) for name in names)
    context = x if context is None else context
    q, k, rope = to_q(x), to_k(context), None
    if rotary_emb is not None:
        # Each table is [L, D] or [1, L, 1, D], with every value twice.
        rope = rope_from_tokens(*(table.reshape(-1, table.shape[-1])[:, 0::2] for table in rotary_emb))
    first, second = rms_parameters(norm_q, q), rms_parameters(norm_k, k)
    if alike(first, second) and q.shape[2] == k.shape[2]:
        options = {"eps": first[1], "inplace": not torch.is_grad_enabled()}
        q, k = qk_norm_rope(q, k, first[0], second[0], rope, attn.heads, **options)
    else:
        q, k = norm_rotate(q, norm_q, attn.heads, rope), norm_rotate(k, norm_k, attn.heads, rope)
    return q, k, to_v(context).unflatten(2, (attn.heads, -1))


def joint_attention(*streams: tuple[Tensor, Tensor, Tensor], lengths: Tensor | None = None) -> Sequence[Tensor]:
    """Returns the results ``[B, L, H, D]`` of two streams' queries, over the keys and values of both.

    ``lengths``, int32 ``[B]``, say how many keys of the second stream count.
    """
    queries, keys, values = zip(*streams, strict=True)
    sources = list(zip(keys, values, strict=True))
    return segment_attention(list(queries), sources, valid_lengths=[None, lengths])


def project_out(attn: nn.Module, out: Tensor) -> Tensor:
    """Returns the attention's result ``[B, L, H, D]`` projected, ``[B, L, C]``."""
    return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns ``x [B, L, H, D]`` turned by ``cos`` and ``sin``, which broadcast to ``[B, L, H, D / 2]``.

    PyTorch computes it, in float32.
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).to(x.dtype)


def norm_rotate(x: Tensor, norm: nn.Module | None, heads: int, rope: Rope3D | None = None) -> Tensor:
    """Returns a projection's output ``[B, L, H*D]``, normed and rotated, as ``[B, L, H, D]``.

    The norm is over the width or per head. ``x`` is overwritten unless there are gradients.
    """
    parameters = rms_parameters(norm, x)
    if parameters is not None:
        weight, eps = parameters
        return norm_rope(x, weight, rope, heads, eps=eps, inplace=not torch.is_grad_enabled())
    weight = getattr(norm, "weight", None)
    if norm is not None and weight is not None and weight.shape[-1] == x.shape[2] and heads > 1:
        y = norm(x).unflatten(2, (heads, -1))
    else:
        y = x.unflatten(2, (heads, -1))
        y = y if norm is None else norm(y)
    return y if rope is None else rotate(y, *rope.t.unsqueeze(1).unbind(-1))


def text_lengths(mask: Tensor) -> Tensor:
    """Returns how many text tokens of each entry count, int32 ``[B]``, from a mask ``[B, L]``, true where they do.

    The mask must be padded after the text, as those of the text encoders are; anything else stops with this message
    (on a GPU, where reading the mask would stop the stream, by an assertion on the device).
    """
    mask = mask.to(torch.bool)
    lengths = mask.sum(dim=1, dtype=torch.int32)
    expected = torch.arange(mask.shape[1], device=mask.device) < lengths.unsqueeze(1)
    torch._assert_async(
        (mask == expected).all(), "attention_mask: expected padding after the text only; restore() takes any mask"
    )
    return lengths
