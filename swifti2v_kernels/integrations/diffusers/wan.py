"""Wan 2.1 and 2.2, VACE and Animate in diffusers: attention and the adaptive norms of their layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import gated_residual, segment_attention
from ..recipe import Recipe
from .attention import Processor, backend_is_free, may_overwrite, norm_rotate, norm_rotate_pair, token_rope
from .norms import in_parts, like, modulated_norm, modulation_rows, residual_norm, token_rows

#: Tokens of the text; what is before them in the context are image tokens. A constant in diffusers too.
TEXT_TOKENS = 512


class WanProcessor(Processor):
    """Self-attention, and cross-attention to text and image tokens."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | str:
        """Computes the attention that diffusers' ``WanAttnProcessor`` computes."""
        reason = "attention_mask is given" if attention_mask is not None else self.declines(attn)
        if reason is not None:
            return reason
        image = None
        if attn.add_k_proj is not None and encoder_hidden_states is not None:
            image, encoder_hidden_states = encoder_hidden_states.tensor_split(
                [encoder_hidden_states.shape[1] - TEXT_TOKENS], dim=1
            )
        q, k, v = _projections(attn, hidden_states, encoder_hidden_states)
        inplace = may_overwrite(*(getattr(attn, name, None) for name in ("to_q", "to_k", "to_qkv", "to_kv")))
        q, k = norm_rotate_pair(q, k, attn.norm_q, attn.norm_k, attn.heads, token_rope(rotary_emb), inplace)
        out = segment_attention(q, [(k, v.unflatten(2, (attn.heads, -1)))])
        if image is not None:
            k, v = attn.to_added_kv(image).chunk(2, dim=-1) if attn.fused_projections else _added(attn, image)
            k = norm_rotate(k, attn.norm_added_k, attn.heads, None, inplace=False)
            out = out + segment_attention(q, [(k, v.unflatten(2, (attn.heads, -1)))])
        del q, k, v  # not needed while the result is projected
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def _added(attn: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    return attn.add_k_proj(image), attn.add_v_proj(image)


def _projections(attn: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if not attn.fused_projections:
        context = x if context is None else context
        return attn.to_q(x), attn.to_k(context), attn.to_v(context)
    if not attn.is_cross_attention:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        return q, k, v
    k, v = attn.to_kv(x if context is None else context).chunk(2, dim=-1)
    return attn.to_q(x), k, v


def _layer(self: Any, x: Tensor, context: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    """Computes a layer from the first norm to the last residual, ``[B, L, C]`` to ``[B, L, C]``.

    Both kinds, Wan's and VACE's, have that in common.
    """
    # A timestep per token: [B, L, 6, C].
    row = modulation_rows(self.scale_shift_table[0], temb if temb.ndim == 4 else temb.unsqueeze(1))
    x = token_rows(x)
    y = modulated_norm(x, self.norm1, row(0), row(1), wide=True)
    update = self.attn1(y, None, None, rotary_emb)
    if isinstance(self.norm2, nn.Identity):
        x = y = gated_residual(x, like(update, x), row(2))
    else:
        x, y = residual_norm(x, update, row(2), self.norm2, wide=True)
    update = self.attn2(y, context, None, None)
    # The layer's input may be needed by the caller, and a hook may keep what has been handed to its module.
    inplace = may_overwrite(self.norm2, self.attn2)
    x, y = residual_norm(x, update, None, self.norm3, row(3), row(4), wide=True, inplace=inplace)
    update = like(in_parts(self.ffn, y, modules=[self.ffn]), x)
    return gated_residual(x, update, row(5), inplace=may_overwrite(self.norm3))


def _wan_layer(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Tensor:
    return _layer(self, hidden_states, encoder_hidden_states, temb, rotary_emb)


def _vace_layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> tuple[Tensor | None, Tensor]:
    if self.proj_in is not None:
        control_hidden_states = self.proj_in(control_hidden_states) + hidden_states
    control_hidden_states = _layer(self, control_hidden_states, encoder_hidden_states, temb, rotary_emb)
    return None if self.proj_out is None else self.proj_out(control_hidden_states), control_hidden_states


_ATTENTION = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out", "heads", "add_k_proj", "fused_projections")
_LAYER = ("norm1", "attn1", "norm2", "attn2", "norm3", "ffn", "scale_shift_table")
_BY = "norm_modulate, gated_residual_norm_modulate, gated_residual"

RECIPES = (
    Recipe(
        "WanAttnProcessor",
        "attention",
        "qk_norm_rope, segment_attention",
        _ATTENTION,
        ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb"),
        processor=WanProcessor,
        fits=backend_is_free,
    ),
    Recipe(
        "WanTransformerBlock",
        "norms",
        _BY,
        _LAYER,
        ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb"),
        forward=_wan_layer,
    ),
    Recipe(
        "WanVACETransformerBlock",
        "norms",
        _BY,
        (*_LAYER, "proj_in", "proj_out"),
        ("hidden_states", "encoder_hidden_states", "control_hidden_states", "temb", "rotary_emb"),
        forward=_vace_layer,
    ),
)
