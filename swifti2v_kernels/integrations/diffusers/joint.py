"""Models of diffusers with a joint attention of video and text: HunyuanVideo (also FramePack) and CogVideoX.

Video and text stay two streams: their queries, keys and values are views of their own to ``segment_attention``, and no
layer concatenates them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import gated_residual
from ..norms import BY, Stream, in_parts, joint_layer, modulated_norm, token_rows
from ..recipe import Recipe
from .attention import ADDED, OWN, Rotary, attention_recipe, joint_attention, project, project_out, text_lengths


def _hunyuan_attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
) -> tuple[Tensor, Tensor] | str:
    """Computes the attention of ``HunyuanVideoAttnProcessor2_0``.

    Projections are the streams' own (dual layers) or common (single layers). The only mask that it takes is the model's
    own over keys, ``[B, 1, 1, L]``.
    """
    x, text = hidden_states, encoder_hidden_states
    if text is None:
        return "no text"
    if attention_mask is not None and (attention_mask.ndim != 4 or attention_mask.shape[1:3] != (1, 1)):
        return "attention_mask is not one over keys"
    lengths = None if attention_mask is None else text_lengths(attention_mask[:, 0, 0, x.shape[1] :])
    out, text_out = joint_attention(
        project(attn, x, OWN, image_rotary_emb),
        project(attn, text, OWN if attn.add_q_proj is None else ADDED, None),
        lengths=lengths,
    )
    out = out.flatten(2) if attn.to_out is None else project_out(attn, out)
    text_out = text_out.flatten(2)
    return out, text_out if attn.to_add_out is None else attn.to_add_out(text_out)


def _hunyuan_modulation(
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


def _hunyuan_layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Rotary = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """Replaces the ``forward`` of dual-stream layers, with and without a replaced image.

    Those without are given the last two arguments as well, and make no use of them.
    """
    streams = []
    for x, norm1, norm2, feed_forward, replaced in (
        (hidden_states, self.norm1, self.norm2, self.ff, (token_replace_emb, num_tokens)),
        (encoder_hidden_states, self.norm1_context, self.norm2_context, self.ff_context, ()),
    ):
        rows, block_map = _hunyuan_modulation(x, norm1, 6, temb, *replaced)
        streams.append(Stream(token_rows(x), norm1.norm, rows[:3], norm2, rows[3:], feed_forward, block_map))
    return joint_layer(streams, self.attn, attention_mask=attention_mask, image_rotary_emb=freqs_cis)


def _hunyuan_single_layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """Replaces the ``forward`` of single-stream layers, which :func:`_hunyuan_layer` does for the dual ones."""

    def mlp(y: Tensor, update: Tensor) -> Tensor:
        return self.proj_out(torch.cat((update, self.act_mlp(self.proj_mlp(y))), dim=2))

    streams, normed = [], []
    for x, replaced in ((hidden_states, (token_replace_emb, num_tokens)), (encoder_hidden_states, ())):
        (shift, scale, gate), block_map = _hunyuan_modulation(x, self.norm, 3, temb, *replaced)
        streams.append((x := token_rows(x), gate, block_map))
        normed.append(modulated_norm(x, self.norm.norm, shift, scale, block_map))
    options = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
    updates = self.attn(hidden_states=normed[0], encoder_hidden_states=normed[1], **options)
    results = []
    for (x, gate, block_map), y, update in zip(streams, normed, updates, strict=True):
        update = in_parts(mlp, y, update, modules=[self.attn, self.proj_mlp, self.act_mlp, self.proj_out])
        results.append(gated_residual(x, update.to(x.dtype), gate, block_map=block_map))
    return tuple(results)


def _cogvideox_attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
) -> tuple[Tensor, Tensor] | str:
    """Computes the attention of ``CogVideoXAttnProcessor2_0``; LayerNorm and rotation of q and k stay PyTorch's."""
    if attention_mask is not None:
        return "attention_mask is given"
    text, video = joint_attention(
        project(attn, encoder_hidden_states, OWN, None),
        project(attn, hidden_states, OWN, image_rotary_emb),
    )
    return project_out(attn, video), project_out(attn, text)


def _cogvideox_layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, ...]:
    # Shift, scale and gate of the video, and those of the text.
    first, second = (norm.linear(norm.silu(temb)).unsqueeze(1).chunk(6, dim=2) for norm in (self.norm1, self.norm2))
    streams = [
        Stream(token_rows(x), self.norm1.norm, first[part], self.norm2.norm, second[part], self.ff)
        for x, part in ((hidden_states, slice(3)), (encoder_hidden_states, slice(3, 6)))
    ]
    return joint_layer(streams, self.attn1, image_rotary_emb=image_rotary_emb, **(attention_kwargs or {}))


def _adaptive(*norms: str) -> tuple[str, ...]:
    return tuple(f"{norm}.{part}" for norm in norms for part in ("linear", "silu", "norm"))


_HUNYUAN = (*_adaptive("norm1", "norm1_context"), "attn", "norm2", "norm2_context", "ff", "ff_context")
_HUNYUAN_SINGLE = (*_adaptive("norm"), "attn", "act_mlp", "proj_mlp", "proj_out")

RECIPES = (
    attention_recipe(
        "HunyuanVideoAttnProcessor2_0",
        "qk_norm_rope, segment_attention over video and text",
        (*ADDED, "to_add_out"),
        _hunyuan_attention,
    ),
    attention_recipe(
        "CogVideoXAttnProcessor2_0",
        "segment_attention over text and video (LayerNorm and rotation of q, k: PyTorch)",
        (),
        _cogvideox_attention,
    ),
    *(
        Recipe(host, "norms", BY, forward, needs, apart=("attn", "attn1"))
        for host, forward, needs in (
            ("HunyuanVideoTransformerBlock", _hunyuan_layer, _HUNYUAN),
            ("HunyuanVideoTokenReplaceTransformerBlock", _hunyuan_layer, _HUNYUAN),
            ("HunyuanVideoSingleTransformerBlock", _hunyuan_single_layer, _HUNYUAN_SINGLE),
            ("HunyuanVideoTokenReplaceSingleTransformerBlock", _hunyuan_single_layer, _HUNYUAN_SINGLE),
            ("CogVideoXBlock", _cogvideox_layer, (*_adaptive("norm1", "norm2"), "attn1", "ff")),
        )
    ),
)
