"""The parts that our attention processors for all models of diffusers share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import Rope3D, norm_rope, qk_norm_rope, rope_from_tokens
from ..hooks import hook_kinds, only_moves
from ..norms import alike, may_overwrite, rms_parameters
from ..recipe import is_taken

#: An attention module's projections and norms for its first stream, and those for the text of a joint attention.
OWN = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
#: diffusers' (cos, sin) of a rotation, or None.
Rotary = tuple[Tensor, Tensor] | None


class Processor:
    """An attention processor in place of diffusers' own, which it keeps for the calls that it does not take.

    A subclass's ``__call__`` returns the reason, a string, for such a call; diffusers' own processor is called then.
    Calls are counted either way.

    The class attributes are diffusers' protocol: ``set_attention_backend`` and ``enable_parallelism`` write them. Where
    somebody has chosen a backend or context parallelism, diffusers' own processor computes.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, original: Any):
        self.original = original

    def __init_subclass__(cls) -> None:
        attend = cls.__call__

        @functools.wraps(attend)
        def counted(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = attend(self, attn, *args, **kwargs)
            if is_taken(out, attn):
                return out
            self.hand_back()
            return self.original(attn, *args, **kwargs)

        cls.__call__ = counted

    def declines(self, attn: nn.Module, *shared: nn.Module | None) -> str | None:
        """Returns why diffusers' own processor is to be called instead, or None.

        ``shared`` are modules that diffusers calls once for all tokens and we for each stream: whatever hooks on them
        do to the tokens, they must see all of them.
        """
        if (reason := other_choice(self)) is not None:
            return reason
        # This hook skips attention by catching the call of torch's that is in diffusers' own processor.
        if "AttentionProcessorSkipHook" in hook_kinds(attn):
            return "a hook may skip the attention inside diffusers' own processor"
        watched = any(not only_moves(module) for module in shared if module is not None)
        return "a hook on a projection or norm must see all tokens at once" if watched else None

    def hand_back(self) -> None:
        """Gives the original processor the backend and parallelism chosen since, for when it computes."""
        for name in ("_attention_backend", "_parallel_config"):
            if hasattr(self.original, name):
                setattr(self.original, name, getattr(self, name))


def other_choice(processor: Any) -> str | None:
    """Returns why diffusers' own processor is to compute, a backend or parallelism that was chosen, or None."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backend = getattr(processor, "_attention_backend", None)
    if backend is not None:
        return f"the attention backend {getattr(backend, 'value', backend)} was chosen for it"
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism is enabled for it"
    # Active for the whole process, by ``attention_backend(...)``, ``set_attention_backend`` or a variable.
    active, _ = _AttentionBackendRegistry.get_active_backend()
    usual = active == AttentionBackendName.NATIVE
    return None if usual else f"the attention backend {getattr(active, 'value', active)} is active"


def heads_of(x: Tensor, attn: nn.Module) -> Tensor:
    """Returns ``[B, L, H*D]`` as ``[B, L, H, D]``."""
    return x.unflatten(2, (attn.heads, -1))


def project(
    attn: nn.Module, x: Tensor, names: Sequence[str], rope: Rope3D | None, context: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries of ``x [B, L, C]``, keys and values of it or of ``context``, as ``[B, L, H, D]``.

    The first two are normed and rotated, by one launch if possible. ``names``: the attributes of the three projections
    and of the two norms, such as :data:`OWN`.
    """
    to_q, to_k, to_v, norm_q, norm_k = (getattr(attn, name) for name in names)
    context = x if context is None else context
    q, k, inplace = to_q(x), to_k(context), may_overwrite(to_q, to_k)
    first, second = rms_parameters(norm_q, q), rms_parameters(norm_k, k)
    if alike(first, second) and q.shape[2] == k.shape[2]:
        q, k = qk_norm_rope(q, k, first[0], second[0], rope, attn.heads, eps=first[1], inplace=inplace)
    else:
        q, k = norm_rotate(q, norm_q, attn.heads, rope, inplace), norm_rotate(k, norm_k, attn.heads, rope, inplace)
    return q, k, heads_of(to_v(context), attn)


def project_out(attn: nn.Module, out: Tensor) -> Tensor:
    """Returns the attention's result ``[B, L, H, D]`` projected, ``[B, L, C]``."""
    return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def token_rope(rotary_emb: Rotary) -> Rope3D | None:
    """Returns the tables of diffusers' (cos, sin), each ``[L, D]`` or ``[1, L, 1, D]`` with every value twice."""
    if rotary_emb is None:
        return None
    cos, sin = (table.reshape(-1, table.shape[-1])[:, 0::2] for table in rotary_emb)
    return rope_from_tokens(cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns ``x [B, L, H, D]`` turned by ``cos`` and ``sin``, which broadcast to ``[B, L, H, D / 2]``.

    PyTorch computes it, in float32.
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).to(x.dtype)


def norm_rotate(x: Tensor, norm: nn.Module | None, heads: int, rope: Rope3D | None, inplace: bool) -> Tensor:
    """Returns a projection's output ``[B, L, H*D]``, normed and rotated, as ``[B, L, H, D]``.

    The norm is over the width or per head. ``inplace``: ``x`` is overwritten (:func:`may_overwrite`).
    """
    parameters = rms_parameters(norm, x)
    if parameters is not None:
        return norm_rope(x, parameters[0], rope, heads, eps=parameters[1], inplace=inplace)
    weight = getattr(norm, "weight", None)
    if norm is not None and weight is not None and weight.shape[-1] == x.shape[2] and heads > 1:
        y = norm(x).unflatten(2, (heads, -1))
    else:
        y = x.unflatten(2, (heads, -1))
        y = y if norm is None else norm(y)
    return y if rope is None else rotate(y, *rope.t.unsqueeze(1).unbind(-1))


def prefix_lengths(mask: Tensor) -> Tensor:
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
