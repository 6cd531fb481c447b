"""LTX-Video in diffusers: attention and the adaptive RMS norms of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import gated_residual, norm_rope, rope_from_tokens, segment_attention
from ..recipe import Recipe
from .attention import (
    Processor,
    backend_is_free,
    may_overwrite,
    norm_rotate_pair,
    prefix_lengths,
    rms_parameters,
    rotate,
)
from .norms import in_parts, like, modulated_norm, modulation_rows, residual_norm, token_rows


class LTXVideoProcessor(Processor):
    """Self-attention, and cross-attention to padded text."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | str:
        """Computes the attention that diffusers' ``LTXVideoAttnProcessor`` computes.

        The only mask that it takes is text padding as the model makes it (0 and -10000).
        """
        known_mask = attention_mask is None or (attention_mask.ndim == 3 and attention_mask.shape[1] == 1)
        reason = self.declines(attn) if known_mask else "attention_mask is not one over keys"
        if reason is not None:
            return reason
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        inplace = may_overwrite(attn.to_q, attn.to_k)
        if image_rotary_emb is None:
            q, k = norm_rotate_pair(q, k, attn.norm_q, attn.norm_k, attn.heads, None, inplace)
        else:
            q, k = (
                _norm_rotate_width(x, norm, attn.heads, image_rotary_emb, inplace)
                for x, norm in ((q, attn.norm_q), (k, attn.norm_k))
            )
        lengths = None if attention_mask is None else _text_lengths(attention_mask)
        out = segment_attention(q, [(k, v.unflatten(2, (attn.heads, -1)))], valid_lengths=[lengths])
        del q, k, v  # not needed while the result is projected
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


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


def _norm_rotate_width(
    x: Tensor, norm: nn.Module, heads: int, rotary_emb: tuple[Tensor, Tensor], inplace: bool
) -> Tensor:
    """Norms over the width and rotates by angles of the whole width, which is one head to the operator.

    Tables are per batch entry.
    """
    cos, sin = (table[..., 0::2] for table in rotary_emb)  # [B, L, C / 2]
    parameters = rms_parameters(norm, x)
    if parameters is None or torch.is_grad_enabled():
        y = rotate(norm(x).unsqueeze(2), cos.unsqueeze(2), sin.unsqueeze(2))
    else:
        y = x if inplace else x.clone()
        for i in range(x.shape[0]):
            rope = rope_from_tokens(cos[i % cos.shape[0]], sin[i % sin.shape[0]])
            norm_rope(y[i : i + 1], parameters[0], rope, 1, eps=parameters[1], inplace=True)
    return y.view(*x.shape[:2], heads, -1)


def _layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    row = modulation_rows(self.scale_shift_table, temb.unflatten(2, (self.scale_shift_table.shape[0], -1)))
    # The host's sums with a gate of a wider dtype, as autocast gives them, make its residual stream wider too.
    gate_dtype = torch.promote_types(self.scale_shift_table.dtype, temb.dtype)
    x = token_rows(hidden_states.to(torch.promote_types(hidden_states.dtype, gate_dtype)))
    y = modulated_norm(x, self.norm1, row(0), row(1))
    update = self.attn1(hidden_states=y, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
    x = gated_residual(x, like(update, x), row(2))
    update = self.attn2(
        x, encoder_hidden_states=encoder_hidden_states, image_rotary_emb=None, attention_mask=encoder_attention_mask
    )
    x, y = residual_norm(x, update, None, self.norm2, row(3), row(4), inplace=may_overwrite(self.attn2))
    update = like(in_parts(self.ff, y, modules=[self.ff]), x)
    return gated_residual(x, update, row(5), inplace=may_overwrite(self.norm2))


RECIPES = (
    Recipe(
        "LTXVideoAttnProcessor",
        "attention",
        "qk_norm_rope, segment_attention",
        ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out", "heads"),
        ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb"),
        processor=LTXVideoProcessor,
        fits=backend_is_free,
    ),
    Recipe(
        "LTXVideoTransformerBlock",
        "norms",
        "norm_modulate, gated_residual_norm_modulate, gated_residual",
        ("norm1", "attn1", "norm2", "attn2", "ff", "scale_shift_table"),
        ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask"),
        forward=_layer,
    ),
)
