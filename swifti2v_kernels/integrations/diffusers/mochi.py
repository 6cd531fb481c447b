"""Mochi in diffusers: joint attention of video and padded text, and the adaptive RMS norms of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import gated_residual, gated_residual_norm_modulate, norm_modulate, segment_attention
from ..hooks import only_moves
from ..norms import BY, in_parts, token_rows
from ..recipe import Recipe
from .attention import ADDED, OWN, Processor, Rotary, prefix_lengths, project, project_out, rotate


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
        image_rotary_emb: Rotary = None,
    ) -> tuple[Tensor, Tensor] | str:
        """Computes the attention that diffusers' ``MochiAttnProcessor2_0`` computes.

        The mask ``[B, L]`` is padded after the text.
        """
        x, text = hidden_states, encoder_hidden_states
        if (reason := self.declines(attn)) is not None:
            return reason
        # In training, the text queries of the last layer, whose results nobody uses, get gradients of zeros upstream:
        # without any, wrappers for data-parallel training stop.
        if torch.is_grad_enabled() and not hasattr(attn, "to_add_out"):
            return "gradients in the last layer"
        q, k, v = project(attn, x, OWN, None)
        if image_rotary_emb is not None:
            q, k = (rotate(y, *image_rotary_emb) for y in (q, k))  # tables [L, H, D / 2]
        text_q, text_k, text_v = project(attn, text, ADDED, None)
        lengths, sources = prefix_lengths(attention_mask), [(k, v), (text_k, text_v)]
        out, text_out = segment_attention([q, text_q], sources, valid_lengths=[None, lengths])
        del q, k, v, sources  # not needed while the results are projected
        out = project_out(attn, out)
        # Zeros, with which diffusers pads before the projection.
        text_out = text_out.flatten(2) * attention_mask.to(text_out.dtype).unsqueeze(2)
        return out, attn.to_add_out(text_out) if hasattr(attn, "to_add_out") else text_out


def _layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: Rotary = None,
) -> tuple[Tensor, Tensor] | str:
    called = (".linear", ".linear_1", ".silu")
    norms = (m for name, m in self.named_modules() if name.startswith("norm") and not name.endswith(called))
    if not all(map(only_moves, norms)):
        return "a hook on a norm"
    x, text = token_rows(hidden_states), token_rows(encoder_hidden_states)
    video, words = _Stream(self.norm1, temb), None if self.context_pre_only else _Stream(self.norm1_context, temb)
    x_update, text_update = self.attn1(
        hidden_states=video.first(x),
        encoder_hidden_states=self.norm1_context(text, temb) if words is None else words.first(text),
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    x = video.rest(x, x_update, (self.norm2, self.norm3, self.norm4), self.ff)
    if words is not None:
        norms = self.norm2_context, self.norm3_context, self.norm4_context
        text = words.rest(text, text_update, norms, self.ff_context)
    return x, text


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
        update = norm_modulate(update.to(x.dtype), norm="rms", eps=norms[0].eps)
        x, y = gated_residual_norm_modulate(
            x, update, self.gate, self.shift, self.scale_mlp, norm="rms", eps=norms[1].eps
        )
        update = in_parts(feed_forward, y, modules=[feed_forward])
        update = norm_modulate(update.to(x.dtype), norm="rms", eps=norms[2].eps)
        return gated_residual(x, update, self.gate_mlp, inplace=not torch.is_grad_enabled())


RECIPES = (
    Recipe(
        "MochiAttnProcessor2_0",
        "attention",
        "segment_attention over video and text, norm_rope (rotation, an angle per head: PyTorch)",
        (*OWN, "to_out", "heads", "context_pre_only", *ADDED),
        processor=MochiProcessor,
        fits=lambda attn: None if attn.context_pre_only or hasattr(attn, "to_add_out") else "no attribute 'to_add_out'",
    ),
    Recipe(
        "MochiTransformerBlock",
        "norms",
        BY,
        (
            *("norm1.linear", "norm1.silu", "norm1.norm.eps", "norm1_context", "attn1", "ff", "ff_context"),
            *("norm2.eps", "norm3.eps", "norm4.eps", "norm2_context", "norm3_context", "norm4_context"),
            "context_pre_only",
        ),
        _layer,
    ),
)
