"""HunyuanVideo in diffusers (text, latent-concatenated and token-replaced images, FramePack): joint attention, norms.

Video and text stay two streams: their queries, keys and values are views of their own to ``segment_attention``, and no
single-stream layer concatenates them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import gated_residual, segment_attention
from ..hooks import only_moves, watched
from ..recipe import Recipe
from .attention import Processor, backend_is_free, may_overwrite, norm_rotate_pair, prefix_lengths, token_rope
from .norms import in_parts, like, modulated_norm, residual_norm, token_rows


class HunyuanVideoProcessor(Processor):
    """Joint attention of video and text, with projections of their own (dual layers) or in common (single layers)."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None] | str:
        """Computes the attention that diffusers' ``HunyuanVideoAttnProcessor2_0`` computes.

        The only mask that it takes is the model's own over keys, ``[B, 1, 1, L]``.
        """
        x, text = hidden_states, encoder_hidden_states
        known_mask = attention_mask is None or (attention_mask.ndim == 4 and attention_mask.shape[1:3] == (1, 1))
        shared = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k) if attn.add_q_proj is None else ()
        if text is None or not known_mask:
            return "no text" if text is None else "attention_mask is not one over keys"
        if (reason := self.declines(attn, *shared)) is not None:
            return reason
        heads, inplace = attn.heads, may_overwrite(attn.to_q, attn.to_k, attn.add_q_proj, attn.add_k_proj)
        q, k = norm_rotate_pair(
            attn.to_q(x), attn.to_k(x), attn.norm_q, attn.norm_k, heads, token_rope(image_rotary_emb), inplace
        )
        v = attn.to_v(x).unflatten(2, (heads, -1))
        if attn.add_q_proj is None:
            text_q, text_k, text_v = attn.to_q(text), attn.to_k(text), attn.to_v(text)
            norms = attn.norm_q, attn.norm_k
        else:
            text_q, text_k, text_v = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
            norms = attn.norm_added_q, attn.norm_added_k
        text_q, text_k = norm_rotate_pair(text_q, text_k, *norms, heads, None, inplace)
        lengths = None if attention_mask is None else prefix_lengths(attention_mask[:, 0, 0, x.shape[1] :])
        out, text_out = segment_attention(
            [q, text_q],
            [(k, v), (text_k, text_v.unflatten(2, (heads, -1)))],
            valid_lengths=None if lengths is None else [None, lengths],
        )
        del q, k, v  # not needed while the results are projected
        out, text_out = out.flatten(2), text_out.flatten(2)
        if getattr(attn, "to_out", None) is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return out, text_out


class _Modulation:
    """The ``parts`` of an adaptive norm's projection, ``[B, R, C]`` each, and the row that each latent frame takes.

    With a token-replaced image the first frame's tokens have the modulation of timestep 0 (row 0), the others row 1.
    """

    def __init__(self, norm: nn.Module, parts: int, temb: Tensor, replace_emb: Tensor | None = None, frames: int = 1):
        rows = norm.linear(norm.silu(temb)).unsqueeze(1)
        self.block_map: Tensor | None = None
        if replace_emb is not None:
            rows = torch.stack((norm.linear(norm.silu(replace_emb)), rows[:, 0]), dim=1)
            self.block_map = torch.arange(frames, device=temb.device).clamp(max=1).to(torch.int32)
        self.shift, self.scale, self.gate, *self.mlp = rows.chunk(parts, dim=2)


def _dual_layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor] | str:
    """Replaces the ``forward`` of dual-stream layers, with and without a replaced image.

    Those without are given the last two arguments as well, and make no use of them.
    """
    if not (only_moves(self.norm1) and only_moves(self.norm1_context)):
        return "a hook on a first norm"
    x, text = token_rows(hidden_states), token_rows(encoder_hidden_states)
    frames = 1 if token_replace_emb is None or num_tokens is None else x.shape[1] // num_tokens
    streams = [
        (x, _Modulation(self.norm1, 6, temb, token_replace_emb, frames), self.norm1, self.norm2, self.ff),
        (text, _Modulation(self.norm1_context, 6, temb), self.norm1_context, self.norm2_context, self.ff_context),
    ]
    normed = [modulated_norm(s, first.norm, m.shift, m.scale, m.block_map) for s, m, first, _, _ in streams]
    updates = self.attn(
        hidden_states=normed[0],
        encoder_hidden_states=normed[1],
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    results = []
    for (stream, m, _, second, feed_forward), update in zip(streams, updates, strict=True):
        shift, scale, gate = m.mlp
        stream, y = residual_norm(stream, update, m.gate, second, shift, scale, m.block_map)
        update = like(in_parts(feed_forward, y, modules=[feed_forward]), stream)
        inplace = may_overwrite(second)
        results.append(gated_residual(stream, update, gate, block_map=m.block_map, inplace=inplace))
    return results[0], results[1]


def _single_layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor] | str:
    """Replaces the ``forward`` of single-stream layers, with and without a replaced image, as :func:`_dual_layer`."""
    if watched(self, self.attn):
        return "a hook inside must see both streams at once"
    x, text = token_rows(hidden_states), token_rows(encoder_hidden_states)

    def mlp(y: Tensor, update: Tensor) -> Tensor:
        return self.proj_out(torch.cat((update, self.act_mlp(self.proj_mlp(y))), dim=2))

    frames = 1 if token_replace_emb is None or num_tokens is None else x.shape[1] // num_tokens
    streams = [(x, _Modulation(self.norm, 3, temb, token_replace_emb, frames)), (text, _Modulation(self.norm, 3, temb))]
    normed = [modulated_norm(s, self.norm.norm, m.shift, m.scale, m.block_map) for s, m in streams]
    updates = self.attn(
        hidden_states=normed[0],
        encoder_hidden_states=normed[1],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    results = []
    for (stream, m), y, update in zip(streams, normed, updates, strict=True):
        update = in_parts(mlp, y, update, modules=[self.attn, self.proj_mlp, self.act_mlp, self.proj_out])
        results.append(gated_residual(stream, like(update, stream), m.gate, block_map=m.block_map))
    return results[0], results[1]


def _plain_norm(layer: nn.Module) -> str | None:
    norm = layer.norm1 if hasattr(layer, "norm1") else layer.norm
    if getattr(norm, "emb", None) is not None:
        return "its first norm embeds the timestep itself"
    return None


def _attention_needs(attn: nn.Module) -> tuple[str, ...]:
    """Returns the attributes that are read of an attention module; in a dual layer, also those for the text."""
    needs = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "heads", "add_q_proj")
    dual = getattr(attn, "add_q_proj", None) is not None
    return (*needs, "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out") if dual else needs


_BY = "norm_modulate, gated_residual_norm_modulate, gated_residual"
_DUAL = (
    *(f"{norm}.{part}" for norm in ("norm1", "norm1_context") for part in ("linear", "silu", "norm")),
    *("attn", "norm2", "norm2_context", "ff", "ff_context"),
)
_SINGLE = ("norm.linear", "norm.silu", "norm.norm", "attn", "act_mlp", "proj_mlp", "proj_out")
_STREAMS = ("hidden_states", "encoder_hidden_states", "temb", "attention_mask")
_REPLACED = ("token_replace_emb", "num_tokens")

RECIPES = (
    Recipe(
        "HunyuanVideoAttnProcessor2_0",
        "attention",
        "qk_norm_rope, segment_attention over video and text",
        _attention_needs,
        ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb"),
        processor=HunyuanVideoProcessor,
        fits=backend_is_free,
    ),
    *(
        Recipe(
            f"HunyuanVideo{kind}TransformerBlock", "norms", _BY, needs, parameters, forward=forward, fits=_plain_norm
        )
        for kind, needs, parameters, forward in (
            ("", _DUAL, (*_STREAMS, "freqs_cis"), _dual_layer),
            ("TokenReplace", _DUAL, (*_STREAMS, "freqs_cis", *_REPLACED), _dual_layer),
            ("Single", _SINGLE, (*_STREAMS, "image_rotary_emb"), _single_layer),
            ("TokenReplaceSingle", _SINGLE, (*_STREAMS, "image_rotary_emb", *_REPLACED), _single_layer),
        )
    ),
)
