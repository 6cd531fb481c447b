"""CogVideoX in diffusers: joint attention of text and video, and the adaptive norms of its layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import segment_attention
from ..hooks import watched
from ..norms import BY, Stream, joint_layer, token_rows
from ..recipe import Recipe
from .attention import OWN, Processor, Rotary, project, project_out, token_rope


class CogVideoXProcessor(Processor):
    """Joint attention of text and video; the LayerNorm of queries and keys and their rotation stay PyTorch's."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
    ) -> tuple[Tensor, Tensor] | str:
        """Computes the attention that diffusers' ``CogVideoXAttnProcessor2_0`` computes."""
        if attention_mask is not None:
            return "attention_mask is given"
        if (reason := self.declines(attn, *(getattr(attn, name) for name in OWN), *attn.to_out)) is not None:
            return reason
        streams = (encoder_hidden_states, None), (hidden_states, token_rope(image_rotary_emb))
        queries, keys, values = map(list, zip(*(project(attn, x, OWN, rope) for x, rope in streams), strict=True))
        outs = segment_attention(queries, list(zip(keys, values, strict=True)))
        del queries, keys, values  # not needed while the results are projected
        text, video = (project_out(attn, out) for out in outs)
        return video, text


def _layer(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, ...] | str:
    if watched(self, self.attn1):
        return "a hook inside must see both streams at once"
    # Shift, scale and gate of the video, and those of the text.
    first, second = (norm.linear(norm.silu(temb)).unsqueeze(1).chunk(6, dim=2) for norm in (self.norm1, self.norm2))
    streams = [
        Stream(token_rows(x), self.norm1.norm, first[part], self.norm2.norm, second[part], self.ff)
        for x, part in ((hidden_states, slice(3)), (encoder_hidden_states, slice(3, 6)))
    ]
    return joint_layer(streams, self.attn1, image_rotary_emb=image_rotary_emb, **(attention_kwargs or {}))


RECIPES = (
    Recipe(
        "CogVideoXAttnProcessor2_0",
        "attention",
        "segment_attention over text and video (LayerNorm and rotation of q, k: PyTorch)",
        (*OWN, "to_out", "heads"),
        processor=CogVideoXProcessor,
    ),
    Recipe(
        "CogVideoXBlock",
        "norms",
        BY,
        (*(f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("linear", "silu", "norm")), "attn1", "ff"),
        _layer,
    ),
)
