"""Wan 2.1 and 2.2, VACE and Animate in diffusers: attention and the adaptive norms of their layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import segment_attention
from ..norms import BY, cross_layer, modulation_rows, token_rows
from ..recipe import Recipe
from .attention import OWN, Processor, Rotary, heads_of, norm_rotate, other_choice, project, project_out, token_rope

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
        rotary_emb: Rotary = None,
    ) -> Tensor | str:
        """Computes the attention that diffusers' ``WanAttnProcessor`` computes."""
        if attention_mask is not None or attn.fused_projections:
            return "attention_mask is given" if attention_mask is not None else "its projections are fused"
        if (reason := self.declines(attn)) is not None:
            return reason
        image, context = None, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.add_k_proj is not None and encoder_hidden_states is not None:
            image, context = context.tensor_split([context.shape[1] - TEXT_TOKENS], dim=1)
        q, k, v = project(attn, hidden_states, OWN, token_rope(rotary_emb), context)
        out = segment_attention(q, [(k, v)])
        if image is not None:
            k, v = (
                norm_rotate(attn.add_k_proj(image), attn.norm_added_k, attn.heads, None, False),
                attn.add_v_proj(image),
            )
            out = out + segment_attention(q, [(k, heads_of(v, attn))])
        del q, k, v  # not needed while the result is projected
        return project_out(attn, out)


def _layer(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    # A timestep per token: [B, L, 6, C].
    row = modulation_rows(self.scale_shift_table[0], temb if temb.ndim == 4 else temb.unsqueeze(1))
    norms = self.norm1, self.norm2, self.norm3
    attentions = (
        lambda y: self.attn1(y, None, None, rotary_emb),
        lambda y: self.attn2(y, encoder_hidden_states, None, None),
    )
    return cross_layer(token_rows(hidden_states), row, norms, attentions, self.ffn, (self.norm2, self.attn2))


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


_LAYER = ("norm1", "attn1", "norm2", "attn2", "norm3", "ffn", "scale_shift_table")

RECIPES = (
    Recipe(
        "WanAttnProcessor",
        "attention",
        "qk_norm_rope, segment_attention",
        (*OWN, "to_out", "heads", "add_k_proj", "fused_projections"),
        processor=WanProcessor,
        fits=lambda attn: other_choice(attn.processor),
    ),
    Recipe("WanTransformerBlock", "norms", BY, _LAYER, _layer),
    Recipe("WanVACETransformerBlock", "norms", BY, (*_LAYER, "proj_in", "proj_out"), _vace_layer),
)
