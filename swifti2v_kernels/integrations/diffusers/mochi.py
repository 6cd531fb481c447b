"""Mochi in diffusers: joint attention of video and padded text, and the adaptive RMS norms of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import gated_residual, gated_residual_norm_modulate, norm_modulate, segment_attention
from ..hooks import only_moves
from ..recipe import Recipe
from .attention import Processor, may_overwrite, norm_rotate, norm_rotate_pair, prefix_lengths, rotate
from .norms import in_parts, like, token_rows


class MochiProcessor(Processor):
    """Joint attention of video and text; each head has angles of its own, so the rotation stays PyTorch's.

    diffusers gathers every entry's valid text and pads the results again; here lengths say how many keys count.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | str:
        """Computes the attention that diffusers' ``MochiAttnProcessor2_0`` computes.

        The mask ``[B, L]`` is padded after the text.
        """
        x, text, heads = hidden_states, encoder_hidden_states, attn.heads
        if (reason := self.declines(attn)) is not None:
            return reason
        # In training, the text queries of the last layer, whose results nobody uses, get gradients of zeros upstream:
        # without any, wrappers for data-parallel training stop.
        if torch.is_grad_enabled() and not hasattr(attn, "to_add_out"):
            return "gradients in the last layer"
        inplace = may_overwrite(attn.to_q, attn.to_k, attn.add_q_proj, attn.add_k_proj)
        q = norm_rotate(attn.to_q(x), attn.norm_q, heads, None, inplace)
        k = norm_rotate(attn.to_k(x), attn.norm_k, heads, None, inplace)
        if image_rotary_emb is not None:
            q, k = (rotate(y, *image_rotary_emb) for y in (q, k))  # tables [L, H, D / 2]
        text_q, text_k = norm_rotate_pair(
            attn.add_q_proj(text), attn.add_k_proj(text), attn.norm_added_q, attn.norm_added_k, heads, None, inplace
        )
        lengths = prefix_lengths(attention_mask)
        sources = [
            (k, attn.to_v(x).unflatten(2, (heads, -1))),
            (text_k, attn.add_v_proj(text).unflatten(2, (heads, -1))),
        ]
        out, text_out = segment_attention([q, text_q], sources, valid_lengths=[None, lengths])
        del q, k, sources  # not needed while the results are projected
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        # Zeros, with which diffusers pads before the projection.
        text_out = text_out.flatten(2) * attention_mask.to(text_out.dtype).unsqueeze(2)
        return out, attn.to_add_out(text_out) if hasattr(attn, "to_add_out") else text_out


def _layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | str:
    called = (".linear", ".linear_1", ".silu")
    if any(
        not only_moves(m) for name, m in self.named_modules() if name.startswith("norm") and not name.endswith(called)
    ):
        return "a hook on a norm"
    hidden_states, encoder_hidden_states = token_rows(hidden_states), token_rows(encoder_hidden_states)
    video = _Stream(self.norm1, temb)
    text = None if self.context_pre_only else _Stream(self.norm1_context, temb)
    updates = self.attn1(
        hidden_states=video.first(hidden_states),
        encoder_hidden_states=(
            self.norm1_context(encoder_hidden_states, temb) if text is None else text.first(encoder_hidden_states)
        ),
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    hidden_states = video.rest(hidden_states, updates[0], (self.norm2, self.norm3, self.norm4), self.ff)
    if text is not None:
        norms = self.norm2_context, self.norm3_context, self.norm4_context
        encoder_hidden_states = text.rest(encoder_hidden_states, updates[1], norms, self.ff_context)
    return hidden_states, encoder_hidden_states


class _Stream:
    """One of the two streams of a layer: its modulation, and what happens before and after the attention."""

    def __init__(self, norm: nn.Module, temb: Tensor):
        parts = norm.linear(norm.silu(temb)).float().unsqueeze(1).chunk(4, dim=2)
        self.scale, gate, self.scale_mlp, gate_mlp = parts
        self.gate, self.gate_mlp = gate.tanh(), gate_mlp.tanh()
        self.shift = torch.zeros_like(self.scale)
        self.eps = norm.norm.eps

    def first(self, x: Tensor) -> Tensor:
        return norm_modulate(x, self.shift, self.scale, norm="rms", eps=self.eps)

    def rest(self, x: Tensor, update: Tensor, norms: tuple[Any, Any, Any], feed_forward: nn.Module) -> Tensor:
        # Hooks may keep what modules return, so only sums of our own are overwritten.
        update = norm_modulate(like(update, x), norm="rms", eps=norms[0].eps)
        x, y = gated_residual_norm_modulate(
            x, update, self.gate, self.shift, self.scale_mlp, norm="rms", eps=norms[1].eps
        )
        update = in_parts(feed_forward, y, modules=[feed_forward])
        update = norm_modulate(like(update, x), norm="rms", eps=norms[2].eps)
        return gated_residual(x, update, self.gate_mlp, inplace=not torch.is_grad_enabled())


def _attention_needs(attn: nn.Module) -> tuple[str, ...]:
    """Returns the attributes that are read of an attention module; in the last layer no text comes out again."""
    needs = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out", "heads", "context_pre_only")
    needs += ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
    return needs if getattr(attn, "context_pre_only", True) else (*needs, "to_add_out")


RECIPES = (
    Recipe(
        "MochiAttnProcessor2_0",
        "attention",
        "segment_attention over video and text, norm_rope (rotation, an angle per head: PyTorch)",
        _attention_needs,
        ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb"),
        processor=MochiProcessor,
    ),
    Recipe(
        "MochiTransformerBlock",
        "norms",
        "norm_modulate, gated_residual_norm_modulate, gated_residual",
        (
            *("norm1.linear", "norm1.silu", "norm1.norm.eps", "norm1_context", "attn1", "ff", "ff_context"),
            *("norm2.eps", "norm3.eps", "norm4.eps", "norm2_context", "norm3_context", "norm4_context"),
            "context_pre_only",
        ),
        ("hidden_states", "encoder_hidden_states", "temb", "encoder_attention_mask", "image_rotary_emb"),
        forward=_layer,
    ),
)
