"""One layer of the Wan DiT on the tokens of a window, in place, a part of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.config import DiTConfig
from model.dit.parts import Attention, KeyValue, Tokens, feed_forward, linear_into, part_of
from model.dit.workspace import Part, Workspace
from swifti2v_kernels import QuantizedRows, Rope3D, gated_residual, gated_residual_norm_modulate


def written_to(out: Tokens) -> dict[str, Any]:
    """Returns the arguments by which a norm writes its result to ``out``, quantised if ``out`` is."""
    return {"out": out, "quantize": out.values.dtype} if isinstance(out, QuantizedRows) else {"out": out}


class DiTLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward of one layer."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.eps = eps
        self.attn1 = Attention(dim, heads, eps)
        self.attn2 = Attention(dim, heads, eps, config.added_kv)
        self.norm2 = nn.LayerNorm(dim, eps=eps) if config.cross_attn_norm else None
        self.ffn = feed_forward(dim, config.ffn_dim, dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        n: Tokens,
        kept: KeyValue,
        memory: KeyValue | None,
        context: Sequence[KeyValue],
        rope: Rope3D,
        modulation: Tensor,
        following: Tensor | None,
        block_map: Tensor,
        parts: Sequence[Part],
        workspace: Workspace,
    ) -> None:
        """Computes the layer for the given parts of a window, in place.

        The residual stream of a part crosses memory at three updates only.

        Args:
            x: the window's residual stream ``[B, L, C]``; updated in its parts.
            n: the norm of ``x`` for this layer, ``[B, L, C]``; overwritten in the parts with that for the next layer.
                Quantised where the layer's matmuls are in 8 bits.
            kept: keys and values of all tokens are written there, ``[B, L, C]``.
            memory: further keys and values ``[B, L', H, D]`` that self-attention reads.
            context: keys and values of cross-attention, each with a softmax of its own.
            rope: rotation tables of the window.
            modulation: ``[B, R, 6, C]``; ``following``: that of the next layer, or None after the last.
            block_map: the row of the modulation for each block.
            parts: tokens to compute (the keys and values are those of all).
            workspace: buffers ``a``, ``b`` and ``hidden``.
        """
        own = self.attn1.keys_values(n, rope, *kept)
        inner_up, inner_down = self.ffn.net[0].proj, self.ffn.net[2]
        for part in parts:
            batch = slice(part.batch, part.batch + 1)
            sources, groups = (
                [(k[batch], v[batch]) for k, v in pairs]
                for pairs in ([own] if memory is None else [memory, own], context)
            )
            tokens, normed = (part_of(y, batch, part.start, part.stop) for y in (x, n))
            _, _, gate, ff_shift, ff_scale, ff_gate = modulation[batch].unbind(2)
            rows = {"block_map": block_map[part.first : part.last], "inplace": True}
            update = self.attn1.attend(normed, [sources], rope, part.start, workspace)
            query: Tokens
            if self.norm2 is None:
                query = workspace.take("b", *tokens.shape)
                query.copy_(gated_residual(tokens, update, gate, **rows))
            else:
                query = workspace.normed("b", *tokens.shape)
                affine = {"weight": self.norm2.weight, "bias": self.norm2.bias, "eps": self.eps}
                gated_residual_norm_modulate(tokens, update, gate, **affine, **rows, **written_to(query))
            update = self.attn2.attend(query, [[pair] for pair in groups], None, 0, workspace)
            y = workspace.normed("b", *tokens.shape)
            options = {"eps": self.eps, **rows, **written_to(y)}
            gated_residual_norm_modulate(tokens, update, None, ff_shift, ff_scale, **options)
            hidden = workspace.take("hidden", *tokens.shape[:2], inner_up.bias.shape[0])
            linear_into(inner_up, y, hidden, workspace, "gelu_tanh")
            update = linear_into(inner_down, hidden, workspace.take("a", *tokens.shape), workspace)
            if following is None:
                gated_residual(tokens, update, ff_gate, **rows)
            else:
                shift, scale = following[batch, :, 0], following[batch, :, 1]
                options = {"eps": self.eps, **rows, **written_to(normed)}
                gated_residual_norm_modulate(tokens, update, ff_gate, shift, scale, **options)
