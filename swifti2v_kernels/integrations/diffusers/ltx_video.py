"""LTX-Video in diffusers: attention and the adaptive RMS norms of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import norm_rope, rope_from_tokens, segment_attention
from ..norms import BY, cross_layer, may_overwrite, modulation_rows, rms_parameters, token_rows
from ..recipe import Recipe
from .attention import (
    OWN,
    Processor,
    Rotary,
    heads_of,
    other_choice,
    prefix_lengths,
    project,
    project_out,
    rotate,
)


class LTXVideoProcessor(Processor):
    """Self-attention, and cross-attention to padded text."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
    ) -> Tensor | str:
        """Computes the attention that diffusers' ``LTXVideoAttnProcessor`` computes.

        The only mask that it takes is text padding as the model makes it (0 and -10000).
        """
        known_mask = attention_mask is None or (attention_mask.ndim == 3 and attention_mask.shape[1] == 1)
        reason = self.declines(attn) if known_mask else "attention_mask is not one over keys"
        if reason is not None:
            return reason
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if image_rotary_emb is None:
            q, k, v = project(attn, hidden_states, OWN, None, context)
        else:
            q, k = (
                heads_of(_norm_rotate(to(x), norm, image_rotary_emb, may_overwrite(to)), attn)
                for to, x, norm in ((attn.to_q, hidden_states, attn.norm_q), (attn.to_k, context, attn.norm_k))
            )
            v = heads_of(attn.to_v(context), attn)
        lengths = None if attention_mask is None else _text_lengths(attention_mask)
        out = segment_attention(q, [(k, v)], valid_lengths=[lengths])
        del q, k, v  # not needed while the result is projected
        return project_out(attn, out)


def _text_lengths(bias: Tensor) -> Tensor:
    """Returns the text lengths int32 ``[B]`` from the bias ``[B, 1, L]``.

    An entry without any text attends to all of its padding, as it would under the bias.
    """
    keeps = bias[:, 0] > -1.0
    lengths = prefix_lengths(keeps)
    torch._assert_async(
        ((bias == 0) | (bias <= -1e4)).all(), "attention_mask: expected a bias of 0 or -10000; restore() takes any mask"
    )
    return torch.where(lengths == 0, keeps.shape[1], lengths)


def _norm_rotate(x: Tensor, norm: nn.Module, rotary_emb: tuple[Tensor, Tensor], inplace: bool) -> Tensor:
    """Norms over the width and rotates by angles of the whole width, which is one head to the operator.

    Tables are per batch entry.
    """
    cos, sin = (table[..., 0::2] for table in rotary_emb)  # [B, L, C / 2]
    parameters = rms_parameters(norm, x)
    if parameters is None or torch.is_grad_enabled():
        return rotate(norm(x), cos, sin)
    weight, eps = parameters
    y = x if inplace else x.clone()
    for i in range(x.shape[0]):
        rope = rope_from_tokens(cos[i % cos.shape[0]], sin[i % sin.shape[0]])
        norm_rope(y[i : i + 1], weight, rope, 1, eps=eps, inplace=True)
    return y


def _layer(
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
    return cross_layer(x, row, (self.norm1, None, self.norm2), attentions, self.ff, (self.attn2,), wide=False)


RECIPES = (
    Recipe(
        "LTXVideoAttnProcessor",
        "attention",
        "qk_norm_rope, segment_attention",
        (*OWN, "to_out", "heads"),
        processor=LTXVideoProcessor,
        fits=lambda attn: other_choice(attn.processor),
    ),
    Recipe(
        "LTXVideoTransformerBlock", "norms", BY, ("norm1", "attn1", "norm2", "attn2", "ff", "scale_shift_table"), _layer
    ),
)
