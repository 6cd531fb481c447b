"""A stand-in for ``wan/modules/model.py``: attention modules, layers, and a model that pads its sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.wan_standin.attention import flash_attention

#: 512 in the repositories.
T5_CONTEXT_TOKEN_NUMBER = 5


def rope_params(length: int, dim: int) -> Tensor:
    """Returns the angles as complex ``[length, dim / 2]``."""
    angle = torch.outer(torch.arange(length).double(), 10000.0 ** -(torch.arange(0, dim, 2).double() / dim))
    return torch.polar(torch.ones_like(angle), angle)


def rope_apply(x: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
    """Rotates every entry by its own grid, in float32; what comes after the grid stays as it is."""
    pairs = x.shape[3] // 2
    axes = freqs.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
    out = x.float()
    for i, grid in enumerate(grid_sizes.tolist()):
        places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, 3)
        turn = torch.cat([axis[places[:, j]] for j, axis in enumerate(axes)], dim=1)[:, None]
        tokens = x[i, : len(places)].double().unflatten(-1, (-1, 2)).contiguous()
        out[i, : len(places)] = torch.view_as_real(torch.view_as_complex(tokens) * turn).flatten(2).float()
    return out


class WanRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class WanLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


class WanSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, window_size=(-1, -1), qk_norm=True, eps=1e-6) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.num_heads, self.head_dim, self.window_size = num_heads, dim // num_heads, window_size
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (WanRMSNorm(dim, eps) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        q, k, v = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))
        q, k = rope_apply(q, grid_sizes, freqs), rope_apply(k, grid_sizes, freqs)
        x = flash_attention(q=q, k=k, v=v, k_lens=seq_lens, window_size=self.window_size)
        return self.o(x.flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim)


class WanT2VCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(context)))
        return self.o(flash_attention(q, k, self.heads(self.v(context)), k_lens=context_lens).flatten(2))


class WanCrossAttention(WanT2VCrossAttention):
    """A cross-attention under the name that 2.2 gives it."""


class WanI2VCrossAttention(WanSelfAttention):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), WanRMSNorm(dim, 1e-6)

    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:
        image, text = context.tensor_split([context.shape[1] - T5_CONTEXT_TOKEN_NUMBER], dim=1)
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(text)))
        k_img, v_img = self.heads(self.norm_k_img(self.k_img(image))), self.heads(self.v_img(image))
        of_image = flash_attention(q, k_img, v_img, k_lens=None)
        return self.o((flash_attention(q, k, self.heads(self.v(text)), k_lens=context_lens) + of_image).flatten(2))


class WanAttentionBlock(nn.Module):
    def __init__(
        self, cross: type[WanSelfAttention], dim: int, num_heads: int, cross_attn_norm=True, **options
    ) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.norm1, self.norm2 = (WanLayerNorm(dim, 1e-6, elementwise_affine=False) for _ in range(2))
        self.norm3 = WanLayerNorm(dim, 1e-6) if cross_attn_norm else nn.Identity()
        if cross_attn_norm:
            nn.init.normal_(self.norm3.weight, 1, 0.1)
            nn.init.normal_(self.norm3.bias, 0, 0.1)
        self.self_attn, self.cross_attn = WanSelfAttention(dim, num_heads, **options), cross(dim, num_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_lens: Tensor | None,
    ) -> Tensor:
        assert e.dtype == torch.float32
        if e.ndim == 3:  # 2.1
            e0, e1, e2, e3, e4, e5 = (self.modulation + e).chunk(6, dim=1)
        else:  # 2.2
            e0, e1, e2, e3, e4, e5 = (x.squeeze(2) for x in (self.modulation.unsqueeze(0) + e).chunk(6, dim=2))
        y = self.self_attn(self.norm1(x).float() * (1 + e1) + e0, seq_lens, grid_sizes, freqs)
        x = x + y * e2
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        return x + self.ffn(self.norm2(x).float() * (1 + e4) + e3) * e5


class WanModel(nn.Module):
    def __init__(self, cross=WanT2VCrossAttention, dim=64, num_heads=2, num_layers=2, **options) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.blocks = nn.ModuleList(WanAttentionBlock(cross, dim, num_heads, **options) for _ in range(num_layers))
        d = dim // num_heads
        spatial = 2 * (d // 6)
        # Not a buffer, so that no cast reaches it.
        self.freqs = torch.cat([rope_params(32, n) for n in (d - 2 * spatial, spatial, spatial)], dim=1)

    def forward(
        self, x: list[Tensor], grids: list[tuple[int, int, int]], e: Tensor, context: Tensor, seq_len: int
    ) -> Tensor:
        """Computes tokens ``[L_i, C]`` of every entry, padded to ``seq_len``; the rest of the model is left out."""
        seq_lens, grid_sizes = torch.tensor([len(u) for u in x]), torch.tensor(grids)
        padded = torch.stack([torch.cat([u, u.new_zeros(seq_len - len(u), u.shape[1])]) for u in x])
        for block in self.blocks:
            padded = block(padded, e, seq_lens, grid_sizes, self.freqs, context, None)
        return padded
