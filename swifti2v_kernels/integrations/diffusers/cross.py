"""Models of diffusers whose layers have self- and cross-attention: Wan (2.1, 2.2, VACE, Animate) and LTX-Video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import norm_rope, rope_from_tokens, segment_attention
from ..norms import BY, cross_layer, modulation_rows, rms_parameters, token_rows
from ..recipe import Recipe
from .attention import OWN, Rotary, attention_recipe, norm_rotate, project, project_out, rotate, text_lengths

#: Tokens of Wan's text; what is before them in the context are image tokens. A constant in diffusers too.
TEXT_TOKENS = 512
_BY = "qk_norm_rope, segment_attention"


def _wan_attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: Rotary = None,
) -> Tensor | str:
    """Computes the self-attention, or the cross-attention to text and image tokens, of ``WanAttnProcessor``."""
    if attention_mask is not None or attn.fused_projections:
        return "attention_mask is given" if attention_mask is not None else "its projections are fused"
    image, context = None, hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if attn.add_k_proj is not None and encoder_hidden_states is not None:
        image, context = context.tensor_split([context.shape[1] - TEXT_TOKENS], dim=1)
    q, k, v = project(attn, hidden_states, OWN, rotary_emb, context)
    out = segment_attention(q, [(k, v)])
    if image is not None:
        k = norm_rotate(attn.add_k_proj(image), attn.norm_added_k, attn.heads)
        out = out + segment_attention(q, [(k, attn.add_v_proj(image).unflatten(2, (attn.heads, -1)))])
    del q, k, v  # not needed while the result is projected
    return project_out(attn, out)


def _wan_layer(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Tensor:
    # A timestep per token: [B, L, 6, C].
    row = modulation_rows(self.scale_shift_table[0], temb if temb.ndim == 4 else temb.unsqueeze(1))
    norms = self.norm1, self.norm2, self.norm3
    attentions = (
        lambda y: self.attn1(y, None, None, rotary_emb),
        lambda y: self.attn2(y, encoder_hidden_states, None, None),
    )
    return cross_layer(token_rows(hidden_states), row, norms, attentions, self.ffn)


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
    control_hidden_states = _wan_layer(self, control_hidden_states, encoder_hidden_states, temb, rotary_emb)
    return None if self.proj_out is None else self.proj_out(control_hidden_states), control_hidden_states


def _ltx_attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
) -> Tensor | str:
    """Computes the self-attention, or the cross-attention to padded text, of ``LTXVideoAttnProcessor``.

    The only mask that it takes is text padding as the model makes it (0 and -10000).
    """
    if attention_mask is not None and (attention_mask.ndim != 3 or attention_mask.shape[1] != 1):
        return "attention_mask is not one over keys"
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if image_rotary_emb is None:
        q, k, v = project(attn, hidden_states, OWN, None, context)
    else:
        q = _norm_rotate_width(attn.to_q(hidden_states), attn.norm_q, image_rotary_emb)
        k = _norm_rotate_width(attn.to_k(context), attn.norm_k, image_rotary_emb)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(context)))
    lengths = None if attention_mask is None else _bias_lengths(attention_mask)
    out = segment_attention(q, [(k, v)], valid_lengths=[lengths])
    del q, k, v  # not needed while the result is projected
    return project_out(attn, out)


def _bias_lengths(bias: Tensor) -> Tensor:
    """Returns the text lengths int32 ``[B]`` from the bias ``[B, 1, L]``.

    An entry without any text attends to all of its padding, as it would under the bias.
    """
    keeps = bias[:, 0] > -1.0
    lengths = text_lengths(keeps)
    torch._assert_async(
        ((bias == 0) | (bias <= -1e4)).all(), "attention_mask: expected a bias of 0 or -10000; restore() takes any mask"
    )
    return torch.where(lengths == 0, keeps.shape[1], lengths)


def _norm_rotate_width(x: Tensor, norm: nn.Module, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """Norms over the width and rotates by angles of the whole width, which is one head to the operator.

    Tables are per batch entry. ``x`` is overwritten unless there are gradients.
    """
    cos, sin = (table[..., 0::2] for table in rotary_emb)  # [B, L, C / 2]
    parameters = rms_parameters(norm, x)
    if parameters is None or torch.is_grad_enabled():
        return rotate(norm(x), cos, sin)
    weight, eps = parameters
    for i in range(x.shape[0]):
        rope = rope_from_tokens(cos[i % cos.shape[0]], sin[i % sin.shape[0]])
        norm_rope(x[i : i + 1], weight, rope, 1, eps=eps, inplace=True)
    return x


def _ltx_layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    row = modulation_rows(self.scale_shift_table, temb.unflatten(2, (self.scale_shift_table.shape[0], -1)))
    # The host's sums with a gate of a wider dtype, as autocast gives them, make its residual stream wider too.
    gate_dtype = torch.promote_types(self.scale_shift_table.dtype, temb.dtype)
    x = token_rows(hidden_states.to(torch.promote_types(hidden_states.dtype, gate_dtype)))
    text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    attentions = (
        lambda y: self.attn1(hidden_states=y, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb),
        lambda y: self.attn2(y, image_rotary_emb=None, **text),
    )
    return cross_layer(x, row, (self.norm1, None, self.norm2), attentions, self.ff, wide=False)


_ATTENTIONS = ("attn1", "attn2")
_WAN = (*_ATTENTIONS, "norm1", "norm2", "norm3", "ffn", "scale_shift_table")
_LTX = (*_ATTENTIONS, "norm1", "norm2", "ff", "scale_shift_table")

RECIPES = (
    attention_recipe("WanAttnProcessor", _BY, ("add_k_proj", "fused_projections"), _wan_attention),
    attention_recipe("LTXVideoAttnProcessor", _BY, (), _ltx_attention),
    *(
        Recipe(host, "norms", BY, forward, needs, apart=_ATTENTIONS)
        for host, forward, needs in (
            ("WanTransformerBlock", _wan_layer, _WAN),
            ("WanVACETransformerBlock", _vace_layer, (*_WAN, "proj_in", "proj_out")),
            ("LTXVideoTransformerBlock", _ltx_layer, _LTX),
        )
    ),
)
