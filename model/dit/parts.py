"""The modules that a DiT layer is made of, and the embeddings before the layers; names as in diffusers' Wan model."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DiTConfig
from model.dit.workspace import Workspace
from swifti2v_kernels import (
    QuantizedRows,
    Rope3D,
    linear_gelu,
    norm_rope,
    quantize_rows,
    scaled_linear,
    segment_attention,
)

KeyValue = tuple[Tensor, Tensor]
#: Tokens [B, L, C], in the model's dtype or, where matmuls are in 8 bits, quantised.
Tokens = Tensor | QuantizedRows


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps)
    return y.to(x.dtype)


class ScaledLinear(nn.Module):
    """A linear layer whose matmul is in 8 bits: weights with a scale a row, inputs with one a token."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.scales, self.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, scales, bias))

    def forward(self, x: Tokens) -> Tensor:
        """Maps ``[..., K]`` to ``[..., N]`` in the dtype of the bias."""
        return self.into(quantize_rows(x, self.weight.dtype) if isinstance(x, Tensor) else x, None)

    def into(self, x: QuantizedRows, out: Tensor | None, activation: str | None = None) -> Tensor:
        """Writes the result to ``out``, or to a new tensor without one, and returns it."""
        weight = QuantizedRows(self.weight, self.scales)
        return scaled_linear(x, weight, self.bias, activation=activation, dtype=self.bias.dtype, out=out)


Linear = nn.Linear | ScaledLinear


def part_of(tokens: Tokens, batch: slice, start: int, stop: int) -> Tokens:
    """Returns a view of the tokens ``start .. stop - 1`` of some batch entries."""
    if isinstance(tokens, QuantizedRows):
        return QuantizedRows(*(t[batch, start:stop] for t in tokens))
    return tokens[batch, start:stop]


def linear_into(
    layer: Linear, x: Tokens, out: Tensor, workspace: Workspace | None = None, activation: str | None = None
) -> Tensor:
    """Writes ``layer(x)`` to ``out`` and returns it; x is [1, m, C] with contiguous rows.

    ``activation`` is None or ``gelu_tanh``. An input that still has to be quantised goes through the workspace's
    ``rows``.
    """
    if isinstance(layer, ScaledLinear):
        if isinstance(x, Tensor):
            room = None if workspace is None else workspace.take_rows("rows", *x.shape)
            x = quantize_rows(x, layer.weight.dtype, out=room)
        return layer.into(x, out, activation)
    if activation is not None:
        return linear_gelu(x, layer.weight, layer.bias, out=out)
    torch.addmm(layer.bias, x[0], layer.weight.t(), out=out[0])
    return out


class Attention(nn.Module):
    """Projections and norms of one attention; the attention itself is ``swifti2v_kernels.segment_attention``."""

    def __init__(self, dim: int, num_heads: int, eps: float, added_kv: bool = False):
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=eps) for _ in range(2))
        if added_kv:
            self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(2))
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    def keys_values(self, n: Tokens, rope: Rope3D, k: Tensor, v: Tensor) -> KeyValue:
        """Writes keys and values of the normed tokens [B, L, C] to ``k`` and ``v`` [B, L, C].

        Returns:
            Views [B, L, H, D] of these.
        """
        for b in range(k.shape[0]):
            rows = part_of(n, slice(b, b + 1), 0, k.shape[1])
            linear_into(self.to_k, rows, k[b : b + 1])
            linear_into(self.to_v, rows, v[b : b + 1])
        k = norm_rope(k, self.norm_k.weight, rope, self.num_heads, eps=self.eps, inplace=True)
        return k, v.unflatten(2, (self.num_heads, -1))

    def context(self, tokens: Tensor, *, added: bool = False) -> KeyValue:
        """Returns keys and values of the text (or, ``added``, of the image) [B, L, C], without positions."""
        to_k, to_v = (self.add_k_proj, self.add_v_proj) if added else (self.to_k, self.to_v)
        weight = (self.norm_added_k if added else self.norm_k).weight
        k = norm_rope(to_k(tokens), weight, None, self.num_heads, eps=self.eps)
        return k, to_v(tokens).unflatten(2, (self.num_heads, -1))

    def attend(
        self,
        n: Tokens,
        groups: Sequence[Sequence[KeyValue]],
        rope: Rope3D | None,
        start: int,
        workspace: Workspace,
    ) -> Tensor:
        """Lets queries ``n`` [1, m, C], the window's tokens from ``start`` on, attend to each group of sources.

        The groups' softmaxes are separate and their results added (Wan's image branch). Returns the projected result
        in the workspace's buffer ``a``; uses ``b``, and ``hidden`` with two groups.
        """
        shape = n.values.shape if isinstance(n, QuantizedRows) else n.shape
        q = linear_into(self.to_q, n, workspace.take("a", *shape), workspace)
        q = norm_rope(q, self.norm_q.weight, rope, self.num_heads, start=start, eps=self.eps, inplace=True)
        out = workspace.take("b", *q.shape)
        segment_attention(q, groups[0], out=out)
        for sources in groups[1:]:
            out += segment_attention(q, sources, out=workspace.take("hidden", *q.shape))
        return linear_into(self.to_out[0], out.flatten(2), workspace.take("a", *shape), workspace)


def feed_forward(dim_in: int, hidden: int, dim_out: int, approximate: str = "tanh") -> nn.Sequential:
    """Returns ``linear -> GELU -> linear``; the identity in the middle stands for diffusers' dropout."""
    first = nn.Sequential(OrderedDict(proj=nn.Linear(dim_in, hidden), gelu=nn.GELU(approximate)))
    return nn.Sequential(OrderedDict(net=nn.Sequential(first, nn.Identity(), nn.Linear(hidden, dim_out))))


def two_linears(dim_in: int, dim_out: int, activation: nn.Module) -> nn.Sequential:
    """Returns the ``linear_1 -> activation -> linear_2`` of the timestep and text embedders."""
    first, last = nn.Linear(dim_in, dim_out), nn.Linear(dim_out, dim_out)
    return nn.Sequential(OrderedDict(linear_1=first, activation=activation, linear_2=last))


class ImageEmbedder(nn.Module):
    """The projection of CLIP tokens [B, 257, image_dim] (or 514 with first and last frame) to the model width."""

    def __init__(self, image_dim: int, dim: int, pos_embed_seq_len: int | None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(image_dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.ff = feed_forward(image_dim, image_dim, dim, approximate="none")
        self.pos_embed = None
        if pos_embed_seq_len is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, pos_embed_seq_len, image_dim))

    def forward(self, image: Tensor) -> Tensor:
        """Maps ``[B, n, image_dim]`` to ``[B, n, dim]``."""
        if self.pos_embed is not None:
            # Two images may come stacked on the batch axis, as diffusers hands them over.
            image = image.reshape(-1, self.pos_embed.shape[1], image.shape[-1]) + self.pos_embed
        return _layer_norm(self.ff(_layer_norm(image, self.norm1)), self.norm2)


class ConditionEmbedder(nn.Module):
    """The embeddings of the timestep, the text and the image."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = two_linears(config.freq_dim, config.dim, nn.SiLU())
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = two_linears(config.text_dim, config.dim, nn.GELU("tanh"))
        self.image_embedder = None
        if config.image_dim is not None:
            self.image_embedder = ImageEmbedder(config.image_dim, config.dim, config.pos_embed_seq_len)

    def embed_timestep(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Maps ``[B, T]`` to an embedding ``[B, T, C]`` (for the head) and modulation ``[B, T, 6, C]`` (for layers)."""
        half = self.freq_dim // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
        angle = timestep.float().unsqueeze(-1) * frequency
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1)
        embedding = self.time_embedder(wave.to(self.time_embedder.linear_1.weight.dtype)).to(dtype)
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))
