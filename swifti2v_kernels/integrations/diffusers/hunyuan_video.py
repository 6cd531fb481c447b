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
from ..norms import BY, Stream, in_parts, joint_layer, modulated_norm, token_rows
from ..recipe import Recipe
from .attention import ADDED, OWN, Processor, Rotary, other_choice, prefix_lengths, project, project_out, token_rope


class HunyuanVideoProcessor(Processor):
    """Joint attention of video and text, with projections of their own (dual layers) or in common (single layers)."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
    ) -> tuple[Tensor, Tensor | None] | str:
        """Computes the attention that diffusers' ``HunyuanVideoAttnProcessor2_0`` computes.

        The only mask that it takes is the model's own over keys, ``[B, 1, 1, L]``.
        """
        x, text = hidden_states, encoder_hidden_states
        if text is None:
            return "no text"
        if attention_mask is not None and (attention_mask.ndim != 4 or attention_mask.shape[1:3] != (1, 1)):
            return "attention_mask is not one over keys"
        dual = attn.add_q_proj is not None
        if (reason := self.declines(attn, *(() if dual else (getattr(attn, name) for name in OWN)))) is not None:
            return reason
        q, k, v = project(attn, x, OWN, token_rope(image_rotary_emb))
        text_q, text_k, text_v = project(attn, text, ADDED if dual else OWN, None)
        lengths = None if attention_mask is None else prefix_lengths(attention_mask[:, 0, 0, x.shape[1] :])
        out, text_out = segment_attention([q, text_q], [(k, v), (text_k, text_v)], valid_lengths=[None, lengths])
        del q, k, v  # not needed while the results are projected
        out = out.flatten(2) if attn.to_out is None else project_out(attn, out)
        text_out = text_out.flatten(2)
        if attn.to_add_out is not None:
            text_out = attn.to_add_out(text_out)
        return out, text_out


def _modulation(
    x: Tensor, norm: nn.Module, parts: int, temb: Tensor, replace_emb: Tensor | None = None, num_tokens: Any = None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Returns the ``parts`` of an adaptive norm's projection, ``[B, R, C]`` each, and the row of each latent frame.

    With a token-replaced image the first frame's tokens have the modulation of timestep 0 (row 0), the others row 1.
    """
    rows, block_map = norm.linear(norm.silu(temb)).unsqueeze(1), None
    if replace_emb is not None:
        rows = torch.stack((norm.linear(norm.silu(replace_emb)), rows[:, 0]), dim=1)
        frames = x.shape[1] // (num_tokens or x.shape[1])
        block_map = torch.arange(frames, device=temb.device).clamp(max=1).to(torch.int32)
    return rows.chunk(parts, dim=2), block_map


def _dual_layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Rotary = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, ...] | str:
    """Replaces the ``forward`` of dual-stream layers, with and without a replaced image.

    Those without are given the last two arguments as well, and make no use of them.
    """
    if not (only_moves(self.norm1) and only_moves(self.norm1_context)):
        return "a hook on a first norm"
    streams = []
    for x, norm1, norm2, feed_forward, replaced in (
        (hidden_states, self.norm1, self.norm2, self.ff, (token_replace_emb, num_tokens)),
        (encoder_hidden_states, self.norm1_context, self.norm2_context, self.ff_context, ()),
    ):
        rows, block_map = _modulation(x, norm1, 6, temb, *replaced)
        streams.append(Stream(token_rows(x), norm1.norm, rows[:3], norm2, rows[3:], feed_forward, block_map))
    return joint_layer(streams, self.attn, attention_mask=attention_mask, image_rotary_emb=freqs_cis)


def _single_layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, ...] | str:
    """Replaces the ``forward`` of single-stream layers, with and without a replaced image, as :func:`_dual_layer`."""
    if watched(self, self.attn):
        return "a hook inside must see both streams at once"

    def mlp(y: Tensor, update: Tensor) -> Tensor:
        return self.proj_out(torch.cat((update, self.act_mlp(self.proj_mlp(y))), dim=2))

    streams, normed = [], []
    for x, replaced in ((hidden_states, (token_replace_emb, num_tokens)), (encoder_hidden_states, ())):
        (shift, scale, gate), block_map = _modulation(x, self.norm, 3, temb, *replaced)
        streams.append((x := token_rows(x), gate, block_map))
        normed.append(modulated_norm(x, self.norm.norm, shift, scale, block_map))
    updates = self.attn(
        hidden_states=normed[0],
        encoder_hidden_states=normed[1],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    results = []
    for (x, gate, block_map), y, update in zip(streams, normed, updates, strict=True):
        update = in_parts(mlp, y, update, modules=[self.attn, self.proj_mlp, self.act_mlp, self.proj_out])
        results.append(gated_residual(x, update.to(x.dtype), gate, block_map=block_map))
    return tuple(results)


_DUAL = (
    *(f"{norm}.{part}" for norm in ("norm1", "norm1_context") for part in ("linear", "silu", "norm")),
    *("attn", "norm2", "norm2_context", "ff", "ff_context"),
)
_SINGLE = ("norm.linear", "norm.silu", "norm.norm", "attn", "act_mlp", "proj_mlp", "proj_out")

RECIPES = (
    Recipe(
        "HunyuanVideoAttnProcessor2_0",
        "attention",
        "qk_norm_rope, segment_attention over video and text",
        (*OWN, *ADDED, "heads", "to_out", "to_add_out"),
        processor=HunyuanVideoProcessor,
        fits=lambda attn: other_choice(attn.processor),
    ),
    *(
        Recipe(f"HunyuanVideo{kind}TransformerBlock", "norms", BY, needs, forward)
        for single, needs, forward in (("", _DUAL, _dual_layer), ("Single", _SINGLE, _single_layer))
        for kind in (single, f"TokenReplace{single}")
    ),
)
