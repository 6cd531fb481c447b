"""The Wan diffusion transformer, with a timestep and a position of its own for every latent frame.

One *block* of tokens is one latent frame. Against the published model three things are generalised, and nothing else:

* ``timestep`` may be given per block, ``[B, T]``: conditioning blocks carry 0 and noisy blocks t, the convention of
  Wan2.2 TI2V-5B, stored per block instead of expanded per token;
* ``block_index`` gives the blocks' true indices in the clip, so that a window of blocks is rotated as in the clip;
* ``memory`` holds keys and values of blocks computed before, which self-attention reads as further sources (the causal
  ablation of CSG).

Module names are those of diffusers' ``WanTransformer3DModel``, so that its checkpoints load without a key map; order
of operations and roundings are its own too (Wan2.1 and Wan2.2; see ``model/weights.py`` for the original key names).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import DiTConfig
from swifti2v_kernels import Rope3D, gated_residual, norm_modulate, qk_norm_rope, rope_3d, segment_attention

KeyValue = tuple[Tensor, Tensor]

#: Parts of parameter names that stay in float32 whatever the model's dtype (as in diffusers): the timestep MLP, the
#: modulation tables and the norms' own weights are small, and rounding them costs accuracy.
FLOAT32_PARAMETERS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps)
    return y.to(x.dtype)


def _add_table(table: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
    """[1, n, C] + [B, T, n or 1, C], in float32 at least -> n tensors [B, T, C]."""
    wide = torch.promote_types(table.dtype, torch.float32)
    return (table.to(wide) + modulation.to(wide)).unbind(2)


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

    def _qkv(self, x: Tensor, context: Tensor, rope: Rope3D | None) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.norm_q.weight, self.norm_k.weight
        q, k = qk_norm_rope(self.to_q(x), self.to_k(context), *weights, rope, self.num_heads, eps=self.eps)
        return q, k, self.to_v(context).unflatten(2, (self.num_heads, -1))

    def self_attention(self, x: Tensor, rope: Rope3D, memory: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """``x`` [B, L, C] attends to itself and to ``memory``; also returns its own keys and values."""
        q, k, v = self._qkv(x, x, rope)
        sources = [(k, v)] if memory is None else [memory, (k, v)]
        return self.to_out[0](segment_attention(q, sources).flatten(2)), (k, v)

    def cross_attention(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        """``x`` attends to ``text`` and, by a second softmax whose result is added, to ``image``."""
        q, k, v = self._qkv(x, text, None)
        out = segment_attention(q, [(k, v)]).flatten(2)
        if image is not None:
            k, v = self.norm_added_k(self.add_k_proj(image)), self.add_v_proj(image)
            k, v = (y.unflatten(2, (self.num_heads, -1)) for y in (k, v))
            out = out + segment_attention(q, [(k, v)]).flatten(2)
        return self.to_out[0](out)


class _Projection(nn.Module):
    """``linear -> GELU`` under the name that diffusers gives it (``net.0.proj``)."""

    def __init__(self, dim_in: int, dim_out: int, approximate: str):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """``linear -> GELU -> linear``; the identity in the middle stands where diffusers has its dropout."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int, approximate: str = "tanh"):
        super().__init__()
        self.net = nn.Sequential(_Projection(dim_in, hidden, approximate), nn.Identity(), nn.Linear(hidden, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim_in] -> [..., dim_out]."""
        return self.net(x)


class TwoLinears(nn.Module):
    """``linear_1 -> activation -> linear_2`` of the timestep and text embedders."""

    def __init__(self, dim_in: int, dim_out: int, activation: nn.Module):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim_out), nn.Linear(dim_out, dim_out)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim_in] -> [..., dim_out]."""
        return self.linear_2(self.activation(self.linear_1(x)))


class ImageEmbedder(nn.Module):
    """CLIP tokens [B, 257, image_dim] (or 514 with first and last frame) to the model width."""

    def __init__(self, image_dim: int, dim: int, pos_embed_seq_len: int | None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(image_dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.ff = FeedForward(image_dim, image_dim, dim, approximate="none")
        self.pos_embed = None
        if pos_embed_seq_len is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, pos_embed_seq_len, image_dim))

    def forward(self, image: Tensor) -> Tensor:
        """[B, n, image_dim] -> [B, n, dim]."""
        if self.pos_embed is not None:
            # Two images may come stacked on the batch axis, as diffusers hands them over.
            image = image.reshape(-1, self.pos_embed.shape[1], image.shape[-1]) + self.pos_embed
        return _layer_norm(self.ff(_layer_norm(image, self.norm1)), self.norm2)


class ConditionEmbedder(nn.Module):
    """Embeddings of the timestep, the text and the image."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, config.dim, nn.SiLU())
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLinears(config.text_dim, config.dim, nn.GELU("tanh"))
        self.image_embedder = None
        if config.image_dim is not None:
            self.image_embedder = ImageEmbedder(config.image_dim, config.dim, config.pos_embed_seq_len)

    def embed_timestep(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[B, T]`` -> embedding ``[B, T, C]`` (for the head) and modulation ``[B, T, 6, C]`` (for the blocks)."""
        half = self.freq_dim // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
        angle = timestep.float().unsqueeze(-1) * frequency
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1)
        embedding = self.time_embedder(wave.to(self.time_embedder.linear_1.weight.dtype)).to(dtype)
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


class DiTBlock(nn.Module):
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
        modulation: Tensor,
        text: Tensor,
        image: Tensor | None,
        rope: Rope3D,
        memory: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """``x`` [B, L, C], ``modulation`` [B, T, 6, C] -> ``x`` and this layer's keys and values [B, L, H, D]."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = _add_table(self.scale_shift_table, modulation)
        update, key_value = self.attn1.self_attention(norm_modulate(x, shift, scale, eps=self.eps), rope, memory)
        x = gated_residual(x, update, gate)
        query = x if self.norm2 is None else _layer_norm(x, self.norm2)
        x = x + self.attn2.cross_attention(query, text, image)
        update = self.ffn(norm_modulate(x, ff_shift, ff_scale, eps=self.eps))
        return gated_residual(x, update, ff_gate), key_value


class WanDiT(nn.Module):
    """Wan DiT: Wan2.1 1.3B/14B (T2V, I2V), Wan2.2 A14B experts, TI2V-5B, and Stage II of SwiftI2V."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(config.dim, config.out_channels * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the large products (some small parameters stay in float32)."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.patch_embedding.weight.device

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        *,
        block_index: Sequence[int] | None = None,
        memory: Sequence[KeyValue] | None = None,
    ) -> Tensor:
        """Predicts the velocity ``noise - x_0``.

        Args:
            latents: ``[B, C_in, T, h, w]``; h and w are multiples of the patch.
            timestep: 0..1000, ``[B]`` or per block ``[B, T]``.
            text: ``[B, L, text_dim]``; padded positions are zero vectors and are attended to, as in Wan.
            image: ``[B, 257, image_dim]``, for models with the CLIP branch only.
            block_index: index in the clip of each of the T blocks; default ``0 .. T-1``.
            memory: keys and values per layer from :meth:`keys_values`, which every block here also attends to.

        Returns:
            ``[B, C_out, T, h, w]`` in the model's dtype.

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        x, embedding, _ = self._run(latents, timestep, text, image, block_index, memory, keep=False)
        shift, scale = _add_table(self.scale_shift_table, embedding.unsqueeze(2))
        x = self.proj_out(norm_modulate(x, shift, scale, eps=self.config.eps))
        (_, h, w), (pt, ph, pw) = self._grid(latents), self.config.patch_size
        pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return rearrange(x, pattern, h=h, w=w, pt=pt, ph=ph, pw=pw)

    def keys_values(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        *,
        block_index: Sequence[int] | None = None,
    ) -> list[KeyValue]:
        """Keys and values ``[B, L, H, D]`` of these blocks in every layer, to be passed on as ``memory``."""
        return self._run(latents, timestep, text, image, block_index, None, keep=True)[2]

    def _run(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image: Tensor | None,
        block_index: Sequence[int] | None,
        memory: Sequence[KeyValue] | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor, list[KeyValue]]:
        timestep, block_index = self._check(latents, timestep, text, image, block_index)
        embedder = self.condition_embedder
        text = text.to(self.dtype)
        embedding, modulation = embedder.embed_timestep(timestep, self.dtype)
        text = embedder.text_embedder(text)
        if image is not None:
            image = embedder.image_embedder(image.to(self.dtype))
            if not self.config.added_kv:
                text, image = torch.cat((image, text), dim=1), None
        _, height, width = self._grid(latents)
        rope = rope_3d(block_index, height, width, self.config.head_dim, device=latents.device)
        x = self.patch_embedding(latents.to(self.dtype)).flatten(2).transpose(1, 2).contiguous()
        kept = []
        for i, block in enumerate(self.blocks):
            x, key_value = block(x, modulation, text, image, rope, None if memory is None else memory[i])
            if keep:
                kept.append(key_value)
        return x, embedding, kept

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        (blocks, height, width), patch = latents.shape[2:], self.config.patch_size
        return blocks // patch[0], height // patch[1], width // patch[2]

    def _check(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image: Tensor | None,
        block_index: Sequence[int] | None,
    ) -> tuple[Tensor, Sequence[int]]:
        """Checks the arguments of ``forward``; returns the timestep as [B, 1] or [B, T] and the block indices."""
        config, patch = self.config, self.config.patch_size
        if latents.ndim != 5 or latents.shape[1] != config.in_channels:
            raise ValueError(f"latents: expected [B, {config.in_channels}, T, h, w], got {tuple(latents.shape)}")
        batch, _, num_blocks, height, width = latents.shape
        if height % patch[1] or width % patch[2]:
            raise ValueError(f"latents: {height} x {width} is not a multiple of the patch {patch[1]} x {patch[2]}")
        if timestep.shape not in ((batch,), (batch, num_blocks)):
            raise ValueError(f"timestep: expected [{batch}] or [{batch}, {num_blocks}], got {tuple(timestep.shape)}")
        if text.ndim != 3 or (text.shape[0], text.shape[2]) != (batch, config.text_dim):
            raise ValueError(f"text: expected [{batch}, L, {config.text_dim}], got {tuple(text.shape)}")
        if (image is None) != (config.image_dim is None):
            wanted = f"[B, 257, {config.image_dim}]" if image is None else "None: this model has no image embedding"
            raise ValueError(f"image: expected {wanted}, got {None if image is None else tuple(image.shape)}")
        if image is not None and (image.ndim != 3 or image.shape[2] != config.image_dim):
            raise ValueError(f"image: expected [{batch}, 257, {config.image_dim}], got {tuple(image.shape)}")
        if block_index is None:
            block_index = range(num_blocks)
        if len(block_index) != num_blocks:
            raise ValueError(f"block_index: expected {num_blocks} indices, got {len(block_index)}")
        return (timestep.unsqueeze(1) if timestep.ndim == 1 else timestep), block_index
