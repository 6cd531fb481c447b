"""One layer of the Wan DiT on the tokens of a window, in place, a part of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.config import DiTConfig
from model.dit.parts import Attention, FeedForward, KeyValue, Tokens, linear_into, part_of
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
        self.ffn = FeedForward(dim, config.ffn_dim, dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

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
        for part in parts:
            batch = slice(part.batch, part.batch + 1)
            sources, groups = (
                [(k[batch], v[batch]) for k, v in pairs]
                for pairs in ([own] if memory is None else [memory, own], context)
            )
            self.part(
                *(part_of(y, batch, part.start, part.stop) for y in (x, n)),
                sources,
                [[pair] for pair in groups],
                rope,
                part.start,
                modulation[batch],
                None if following is None else following[batch],
                block_map[part.first : part.last],
                workspace,
            )

    def part(
        self,
        x: Tensor,
        n: Tokens,
        sources: Sequence[KeyValue],
        context: Sequence[Sequence[KeyValue]],
        rope: Rope3D,
        start: int,
        modulation: Tensor,
        following: Tensor | None,
        block_map: Tensor,
        workspace: Workspace,
    ) -> None:
        """Computes the layer for tokens ``[1, m, C]``, those from the window's ``start`` on, in place.

        The residual stream crosses memory at three updates only.
        """
        _, _, gate, ff_shift, ff_scale, ff_gate = modulation.unbind(2)
        rows = {"block_map": block_map, "eps": self.eps, "inplace": True}
        update = self.attn1.attend(n, [sources], rope, start, workspace)
        query: Tokens
        if self.norm2 is None:
            query = workspace.take("b", *x.shape)
            query.copy_(gated_residual(x, update, gate, block_map=block_map, inplace=True))
        else:
            query = workspace.normed("b", *x.shape)
            affine = {"weight": self.norm2.weight, "bias": self.norm2.bias}
            gated_residual_norm_modulate(x, update, gate, **affine, **rows, **written_to(query))
        update = self.attn2.attend(query, context, None, 0, workspace)
        y = workspace.normed("b", *x.shape)
        gated_residual_norm_modulate(x, update, None, ff_shift, ff_scale, **rows, **written_to(y))
        up, down = self.ffn.net[0].proj, self.ffn.net[2]
        hidden = workspace.take("hidden", *x.shape[:2], up.bias.shape[0])
        linear_into(up, y, hidden, workspace, "gelu_tanh")
        update = linear_into(down, hidden, workspace.take("a", *x.shape), workspace)
        if following is None:
            gated_residual(x, update, ff_gate, block_map=block_map, inplace=True)
        else:
            shift, scale = following[:, :, 0], following[:, :, 1]
            gated_residual_norm_modulate(x, update, ff_gate, shift, scale, **rows, **written_to(n))
