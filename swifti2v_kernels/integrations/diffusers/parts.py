"""What the replacements of all models share: norms of queries and keys, rotary tables, text lengths, processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swifti2v_kernels import (
    Rope3D,
    gated_residual,
    gated_residual_norm_modulate,
    norm_modulate,
    norm_rope,
    qk_norm_rope,
    rope_from_tokens,
)
from swifti2v_kernels.integrations.patching import hooked

#: Tokens of a part: rows enough to fill a GPU with matrix products (not tuned on hardware), and 73 MB of hidden
#: activation for Wan 1.3B.
PART_TOKENS = 4096


class Processor:
    """An attention processor in place of diffusers' own, which it keeps for what it does not take.

    The class attributes are diffusers' protocol: ``set_attention_backend`` and ``enable_parallelism`` write them. Where
    somebody has chosen a backend or context parallelism, diffusers' own processor computes.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, original: Any):
        self.original = original

    @property
    def declines(self) -> bool:
        """Whether diffusers' own processor is to be called instead."""
        if self._attention_backend is None and self._parallel_config is None:
            return False
        self.original._attention_backend = self._attention_backend
        self.original._parallel_config = self._parallel_config
        return True


def backend_is_free(attn: nn.Module) -> str | None:
    """Why an attention module is left alone: a backend or context parallelism was chosen for it before."""
    backend = getattr(attn.processor, "_attention_backend", None)
    if backend is not None:
        return f"the attention backend {getattr(backend, 'value', backend)} was chosen for it"
    if getattr(attn.processor, "_parallel_config", None) is not None:
        return "context parallelism is enabled for it"
    return None


def token_rope(rotary_emb: tuple[Tensor, Tensor] | None) -> Rope3D | None:
    """From diffusers' (cos, sin), each ``[L, D]`` or ``[1, L, 1, D]`` with every value twice."""
    if rotary_emb is None:
        return None
    cos, sin = (table.reshape(-1, table.shape[-1])[:, 0::2] for table in rotary_emb)
    return rope_from_tokens(cos, sin)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """``x [B, L, H, D]`` turned by ``table [L, pairs, 2]`` or ``[B, L, pairs, 2]``, in float32, by PyTorch."""
    cos, sin = table.unsqueeze(-3).unbind(-1)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).to(x.dtype)


def rms_parameters(norm: nn.Module | None, x: Tensor) -> tuple[Tensor, float] | None:
    """Weight and epsilon of an RMSNorm that the fused operator can take over for ``x``, else None.

    A module with hooks is called, since its weight may be on another device until then.
    """
    if norm is None or type(norm).__name__ not in ("RMSNorm", "MochiRMSNorm") or hooked(norm):
        return None
    weight = norm.weight
    if weight is None or getattr(norm, "bias", None) is not None or weight.device != x.device:
        return None
    return weight, torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


def norm_rotate_pair(
    q: Tensor, k: Tensor, norm_q: nn.Module | None, norm_k: nn.Module | None, heads: int, rope: Rope3D | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys of one projection, ``[B, L, H*D]`` each, normed and rotated: ``[B, L, H, D]``, by one launch."""
    first, second = rms_parameters(norm_q, q), rms_parameters(norm_k, k)
    same = first is not None and second is not None and q.shape[2] == k.shape[2] and first[1] == second[1]
    if first is None or second is None or not same or first[0].dtype != second[0].dtype:
        return norm_rotate(q, norm_q, heads, rope), norm_rotate(k, norm_k, heads, rope)
    # Both are fresh outputs of their projections; with gradients they are left as they are.
    inplace = not torch.is_grad_enabled()
    return qk_norm_rope(q, k, first[0], second[0], rope, heads, eps=first[1], inplace=inplace)


def norm_rotate(x: Tensor, norm: nn.Module | None, heads: int, rope: Rope3D | None) -> Tensor:
    """One projection's output, ``[B, L, H*D]``, normed (over the width or per head) and rotated: ``[B, L, H, D]``."""
    parameters = rms_parameters(norm, x)
    if parameters is not None:
        weight, eps = parameters
        return norm_rope(x, weight, rope, heads, eps=eps, inplace=not torch.is_grad_enabled())
    weight = getattr(norm, "weight", None)
    over_width = weight is not None and weight.shape[-1] == x.shape[2] and heads > 1
    if norm is None:
        y = x.unflatten(2, (heads, -1))
    else:
        y = norm(x).unflatten(2, (heads, -1)) if over_width else norm(x.unflatten(2, (heads, -1)))
    return y if rope is None else rotate(y, rope.t)


def prefix_lengths(mask: Tensor) -> Tensor:
    """How many text tokens of each entry count, int32 ``[B]``, from a mask ``[B, L]``, true where they do.

    The mask must be padded behind the text, as those of the text encoders are; anything else stops with this message
    (on a GPU, where reading the mask would stop the stream, by an assertion on the device).
    """
    mask = mask.to(torch.bool)
    lengths = mask.sum(dim=1, dtype=torch.int32)
    expected = torch.arange(mask.shape[1], device=mask.device) < lengths.unsqueeze(1)
    torch._assert_async(
        (mask == expected).all(), "attention_mask: expected text padded behind its tokens; restore() takes any mask"
    )
    return lengths


def layer_norm_modulate(x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` for a LayerNorm, which is called as a module where it has hooks."""
    if hooked(norm):
        return (norm(x) * (1 + scale) + shift).to(x.dtype)
    return norm_modulate(x, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def residual_layer_norm(
    x: Tensor, update: Tensor, gate: Tensor | None, norm: nn.Module, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x + gate * update`` and its modulated LayerNorm, in one pass unless the norm has hooks."""
    if not hooked(norm):
        affine = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
        return gated_residual_norm_modulate(x, like(update, x), gate, shift, scale, **affine)
    x = gated_residual(x, like(update, x), gate)
    if shift is None or scale is None:
        return x, norm(x).to(x.dtype)
    return x, layer_norm_modulate(x, norm, shift, scale)


def in_parts(function: Callable[..., Tensor], y: Tensor, *others: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """``function(y, *others)`` for PART_TOKENS tokens at a time, so that what it makes in between stays small.

    Args:
        function: of the tokens alone, each by itself; ``[B, L, C]`` to the same shape.
        y, others: ``[B, L, ...]``. **``y`` is overwritten** and returned, if anything is done in parts.
        modules: those that ``function`` calls. With hooks on them, which would run once a part, with gradients, or
            under ``torch.compile``, everything is computed at once.
    """
    called = (module for root in modules for module in root.modules())
    if (
        y.shape[1] <= PART_TOKENS
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or any(hooked(m) or m._forward_hooks or m._forward_pre_hooks for m in called)
    ):
        return function(y, *others)
    for b in range(y.shape[0]):
        for start in range(0, y.shape[1], PART_TOKENS):
            part = slice(b, b + 1), slice(start, start + PART_TOKENS)
            y[part] = function(y[part], *(other[part] for other in others))
    return y


def modulation_rows(table: Tensor, temb: Tensor) -> Callable[[int], Tensor]:
    """Row i of ``table [6, C] + temb [B, R, 6, C]`` as ``[B, R, C]``, in float32 at least.

    Made one by one: with a timestep per token all six are as large as six (in 16 bits twelve) residual streams.
    """
    table = table.to(temb.device, torch.promote_types(table.dtype, torch.float32))
    return lambda i: temb[:, :, i] + table[i]


def token_rows(x: Tensor) -> Tensor:
    """With contiguous channels: what comes from a patch embedding is a transposed view."""
    return x if x.stride(-1) == 1 else x.contiguous()


def like(update: Tensor, x: Tensor) -> Tensor:
    """In the dtype of ``x``: under autocast a layer's output is not in that of the residual stream."""
    return update if update.dtype == x.dtype else update.to(x.dtype)
