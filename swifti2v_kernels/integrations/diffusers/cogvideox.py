"""CogVideoX in diffusers: joint attention of text and video, and the adaptive norms of its layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import gated_residual, segment_attention
from ..hooks import watched
from ..recipe import Recipe
from .attention import Processor, may_overwrite, norm_rotate, token_rope
from .norms import in_parts, like, modulated_norm, residual_norm, token_rows


class CogVideoXProcessor(Processor):
    """Joint attention of text and video; the LayerNorm of queries and keys and their rotation stay PyTorch's."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | str:
        """Computes the attention that diffusers' ``CogVideoXAttnProcessor2_0`` computes."""
        shared = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, *attn.to_out
        reason = "attention_mask is given" if attention_mask is not None else self.declines(attn, *shared)
        if reason is not None:
            return reason
        queries, sources = [], []
        for stream, rope in ((encoder_hidden_states, None), (hidden_states, token_rope(image_rotary_emb))):
            queries.append(norm_rotate(attn.to_q(stream), attn.norm_q, attn.heads, rope, inplace=False))
            # Upstream turns the keys of self-attention only.
            key_rope = None if attn.is_cross_attention else rope
            k = norm_rotate(attn.to_k(stream), attn.norm_k, attn.heads, key_rope, inplace=False)
            sources.append((k, attn.to_v(stream).unflatten(2, (attn.heads, -1))))
        outs = segment_attention(queries, sources)
        del queries, sources, k  # not needed while the results are projected
        text, video = (attn.to_out[1](attn.to_out[0](out.flatten(2))) for out in outs)
        return video, text


def _layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor] | str:
    if watched(self, self.attn1):
        return "a hook inside must see both streams at once"
    streams = token_rows(hidden_states), token_rows(encoder_hidden_states)
    first, second = _modulations(self.norm1, temb), _modulations(self.norm2, temb)
    normed = [
        modulated_norm(stream, self.norm1.norm, shift, scale)
        for stream, (shift, scale, _) in zip(streams, first, strict=True)
    ]
    updates = self.attn1(
        hidden_states=normed[0],
        encoder_hidden_states=normed[1],
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    results = []
    for stream, update, (_, _, gate), (shift, scale, gate_ff) in zip(streams, updates, first, second, strict=True):
        stream, y = residual_norm(stream, update, gate, self.norm2.norm, shift, scale)
        update = like(in_parts(self.ff, y, modules=[self.ff]), stream)
        results.append(gated_residual(stream, update, gate_ff, inplace=may_overwrite(self.norm2.norm)))
    return results[0], results[1]


def _modulations(norm: nn.Module, temb: Tensor) -> list[tuple[Tensor, ...]]:
    """Returns (shift, scale, gate) of the video and of the text, each ``[B, 1, C]``."""
    parts = norm.linear(norm.silu(temb)).unsqueeze(1).chunk(6, dim=2)
    return [tuple(parts[:3]), tuple(parts[3:])]


RECIPES = (
    Recipe(
        "CogVideoXAttnProcessor2_0",
        "attention",
        "segment_attention over text and video (LayerNorm and rotation of q, k: PyTorch)",
        ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out", "heads", "is_cross_attention"),
        ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb"),
        processor=CogVideoXProcessor,
    ),
    Recipe(
        "CogVideoXBlock",
        "norms",
        "norm_modulate, gated_residual_norm_modulate, gated_residual",
        (
            *(f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("linear", "silu", "norm")),
            *("attn1", "ff"),
        ),
        ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "attention_kwargs"),
        forward=_layer,
    ),
)
