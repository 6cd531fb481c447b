"""The Wan video autoencoder, versions 2.1 (4x8x8, 16 channels) and 2.2 (4x16x16, 48 channels), streaming in time.

Both are causal: an output depends on its own and earlier frames only. Every temporal convolution therefore keeps the
last frames of its input in a *state*, and a clip may be pushed through in pieces of any length:

* the encoder takes the first frame and then groups of 4, one latent frame each;
* the decoder takes one latent frame at a time, the first of which gives 1 frame and every other 4.

A whole clip is the same code with all pieces in a row, so streaming changes nothing but rounding. The state is a plain
dictionary that belongs to one clip, from convolution to its last frames: the modules themselves hold weights only.

Module names are those of diffusers' ``AutoencoderKLWan``; see ``model/weights.py`` for the original key names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from model.config import VAEConfig

State = dict[nn.Module, Tensor]


class CausalConv3d(nn.Conv3d):
    """3D convolution padded in time at the front only, by zeros or by the frames that the state remembers."""

    def __init__(self, dim_in: int, dim_out: int, kernel: tuple[int, int, int]):
        super().__init__(dim_in, dim_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.history = kernel[0] - 1

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, C, T, h, w] -> [B, C', T, h, w]."""
        if self.history:
            past = state.get(self)
            if past is None:
                past = x.new_zeros(*x.shape[:2], self.history, *x.shape[3:])
            x = torch.cat((past, x), dim=2)
            state[self] = x[:, :, -self.history :].clone()
        return self._fold_time(x) if x.device.type == "cpu" else super().forward(x)

    def _fold_time(self, x: Tensor) -> Tensor:
        # On the CPU torch sends small 3D convolutions to a naive loop; as a 2D one over (channel, tap) the tiny
        # VAE decodes 5x faster (measured on a 2-core AMD EPYC).
        frames = rearrange(x.unfold(2, self.history + 1, 1), "b c t h w tap -> (b t) (c tap) h w")
        weight = rearrange(self.weight, "out c tap y x -> out (c tap) y x")
        y = F.conv2d(frames, weight, self.bias, padding=self.padding[1:])
        return rearrange(y, "(b t) c h w -> b c t h w", b=x.shape[0])


class RMSNorm(nn.Module):
    """``x / |x| * sqrt(C) * gamma`` over channels (dimension 1)."""

    def __init__(self, dim: int, spatial_dims: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises in float32 and rounds before the gain, as diffusers does."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        length = y.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
        return (y / length).to(x.dtype) * self.gamma.shape[0] ** 0.5 * self.gamma


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the (projected) input."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim_in), RMSNorm(dim_out)
        self.conv1 = CausalConv3d(dim_in, dim_out, (3, 3, 3))
        self.conv2 = CausalConv3d(dim_out, dim_out, (3, 3, 3))
        self.conv_shortcut = CausalConv3d(dim_in, dim_out, (1, 1, 1)) if dim_in != dim_out else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, C, T, h, w] -> [B, C', T, h, w]."""
        y = self.conv1(F.silu(self.norm1(x)), state)
        y = self.conv2(F.silu(self.norm2(y)), state)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x, state))


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, spatial_dims=2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, h, w] -> the same shape."""
        batch, height = x.shape[0], x.shape[3]
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (qkv c) h w -> qkv n 1 (h w) c", qkv=3).contiguous()
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=height)
        return x + rearrange(self.proj(out), "(b t) c h w -> b c t h w", b=batch)


class Downsample(nn.Module):
    """Halves the frame and, if ``temporal``, the frame rate after the clip's first frame."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, C, T, h, w] -> [B, C, T', h/2, w/2]."""
        batch = x.shape[0]
        x = rearrange(self.resample(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", b=batch)
        if self.time_conv is None:
            return x
        # The clip's first frame passes as it is and is the history of the next: windows of 3 with stride 2 after it.
        first, past = self not in state, state.get(self)
        state[self] = x[:, :, -1:].clone()
        if first:
            return x if x.shape[2] == 1 else torch.cat((x[:, :, :1], self.time_conv(x)), dim=2)
        return self.time_conv(torch.cat((past, x), dim=2))


class Upsample(nn.Module):
    """Doubles the frame and, if ``temporal``, the frame rate after the clip's first frame."""

    def __init__(self, dim: int, dim_out: int, temporal: bool):
        super().__init__()
        upsample = nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
        self.resample = nn.Sequential(upsample, nn.Conv2d(dim, dim_out, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, C, T, h, w] -> [B, C', T', 2h, 2w]."""
        if self.time_conv is not None:
            x = self._double_frames(x, state)
        batch = x.shape[0]
        x = self.resample(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(x, "(b t) c h w -> b c t h w", b=batch)

    def _double_frames(self, x: Tensor, state: State) -> Tensor:
        head = None
        if self not in state:
            # The clip's first frame is neither doubled nor part of the history of the second.
            state[self] = x.new_empty(0)
            head, x = x[:, :, :1], x[:, :, 1:]
            if x.shape[2] == 0:
                return head
        x = rearrange(self.time_conv(x, state), "b (two c) t h w -> b c (t two) h w", two=2)
        return x if head is None else torch.cat((head, x), dim=2)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(dim, dim) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, C, T, h, w] -> the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, state)), state)


class ResidualDownStage(nn.Module):
    """An encoder stage of Wan2.2: residual blocks and downsampling, plus the stage's averaged input."""

    def __init__(self, dim_in: int, dim_out: int, num_blocks: int, down: bool, temporal: bool):
        super().__init__()
        dims = [dim_in] + [dim_out] * num_blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(dims))
        self.downsampler = Downsample(dim_out, temporal) if down else None
        self.dim_out, self.factor_t, self.factor_s = dim_out, 2 if temporal else 1, 2 if down else 1

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, C, T, h, w] -> [B, C', T', h', w']."""
        shortcut = self._average(x)
        for block in self.resnets:
            x = block(x, state)
        return shortcut + (x if self.downsampler is None else self.downsampler(x, state))

    def _average(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.factor_t, 0))
        folded = "b c (t ft) (h fs) (w gs) -> b (c ft fs gs) t h w"
        x = rearrange(x, folded, ft=self.factor_t, fs=self.factor_s, gs=self.factor_s)
        return reduce(x, "b (c group) t h w -> b c t h w", "mean", c=self.dim_out)


class ResidualUpStage(nn.Module):
    """A decoder stage of Wan2.2: residual blocks and upsampling, plus the stage's repeated input."""

    def __init__(self, dim_in: int, dim_out: int, num_blocks: int, up: bool, temporal: bool):
        super().__init__()
        dims = [dim_in] + [dim_out] * num_blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(dims))
        self.upsampler = Upsample(dim_out, dim_out, temporal) if up else None
        self.dim_out, self.factor_t = dim_out, 2 if temporal else 1

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, C, T, h, w] -> [B, C', T', h', w']."""
        if self.upsampler is None:
            shortcut = None
        else:
            shortcut = self._repeat(x, first=self not in state)
            state[self] = x.new_empty(0)
        for block in self.resnets:
            x = block(x, state)
        return x if self.upsampler is None else shortcut + self.upsampler(x, state)

    def _repeat(self, x: Tensor, first: bool) -> Tensor:
        copies = self.dim_out * self.factor_t * 4 // x.shape[1]
        x = repeat(x, "b c t h w -> b (c copies) t h w", copies=copies)
        x = rearrange(x, "b (c ft fs gs) t h w -> b c (t ft) (h fs) (w gs)", ft=self.factor_t, fs=2, gs=2)
        return x[:, :, self.factor_t - 1 :] if first else x


class PlainUpStage(nn.Module):
    """A decoder stage of Wan2.1: residual blocks, then upsampling to half the channels."""

    def __init__(self, dim_in: int, dim_out: int, num_blocks: int, up: bool, temporal: bool):
        super().__init__()
        dims = [dim_in] + [dim_out] * num_blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(dims))
        self.upsamplers = nn.ModuleList([Upsample(dim_out, dim_out // 2, temporal)] if up else [])

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, C, T, h, w] -> [B, C', T', h', w']."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, state)
        return x


class Encoder(nn.Module):
    """Pixels [B, 3 or 12, T, h, w] to the moments of the latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConv3d(config.pixel_channels, dims[0], (3, 3, 3))
        self.down_blocks = nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(itertools.pairwise(dims)):
            down, temporal = i != last, i != last and config.temporal_downsample[i]
            if config.residual:
                stage = ResidualDownStage(dim_in, dim_out, config.num_res_blocks, down, temporal)
                self.down_blocks.append(stage)
                continue
            for j in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(dim_in if j == 0 else dim_out, dim_out))
            if down:
                self.down_blocks.append(Downsample(dim_out, temporal))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, (3, 3, 3))

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, C, T, h, w] -> [B, 2z, T', h', w']."""
        x = self.conv_in(x, state)
        for layer in (*self.down_blocks, self.mid_block):
            x = layer(x, state)
        return self.conv_out(F.silu(self.norm_out(x)), state)


class Decoder(nn.Module):
    """Latents [B, z, T, h, w] to pixels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.decoder_base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        temporal_upsample = (*reversed(config.temporal_downsample), False)
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConv3d(config.z_dim, dims[0], (3, 3, 3))
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(itertools.pairwise(dims)):
            # In Wan2.1 the upsampling before has halved the channels already.
            stage, width = (
                (ResidualUpStage, dim_in) if config.residual else (PlainUpStage, dim_in // 2 if i else dim_in)
            )
            self.up_blocks.append(stage(width, dim_out, config.num_res_blocks + 1, i != last, temporal_upsample[i]))
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.pixel_channels, (3, 3, 3))

    def forward(self, x: Tensor, state: State) -> Tensor:
        """[B, z, T, h, w] -> [B, 3 or 12, T', h', w']."""
        x = self.mid_block(self.conv_in(x, state), state)
        for stage in self.up_blocks:
            x = stage(x, state)
        return self.conv_out(F.silu(self.norm_out(x)), state)


class WanVAE(nn.Module):
    """Encoder and decoder between video [B, 3, F, H, W] in -1..1 and normalised latents [B, z, T, h, w]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.quant_conv.weight.device

    def encode(self, video: Tensor) -> Tensor:
        """Video ``[B, 3, F, H, W]`` in -1..1 to latents ``[B, z, T, h, w]``: the mode, normalised per channel.

        ``F = 1 + n * temporal_stride`` frames give ``T = 1 + n``; H and W are multiples of the spatial stride.

        Raises:
            ValueError: the shape of ``video`` does not fit.
        """
        num_frames, stride = video.shape[2], self.config.temporal_stride
        if (num_frames - 1) % stride:
            raise ValueError(f"video: expected 1 + {stride}n frames, got {num_frames}")
        pieces = [1] + [stride] * ((num_frames - 1) // stride)
        return torch.cat(list(self.encode_stream(video.split(pieces, dim=2))), dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B, z, T, h, w]`` to video ``[B, 3, F, H, W]``, clamped to -1..1.

        Raises:
            ValueError: the shape of ``latents`` does not fit.
        """
        return torch.cat(list(self.decode_stream(latents.split(1, dim=2))), dim=2)

    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """As :meth:`encode`, piece by piece: yields latents ``[B, z, t, h, w]`` as soon as their frames are there.

        The first piece has ``1 + n * temporal_stride`` frames (1 is usual), every other ``n * temporal_stride``.
        """
        config, state = self.config, State()
        for i, video in enumerate(pieces):
            self._check_video(video, first=i == 0)
            x = video.to(self.device, self.dtype)
            if config.patch_size > 1:
                x = rearrange(x, "b c t (h y) (w x) -> b (c x y) t h w", x=config.patch_size, y=config.patch_size)
            mode = self.quant_conv(self.encoder(x, state), state)[:, : config.z_dim]
            mean, std = self._statistics(mode)
            yield (mode - mean) / std

    def decode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """As :meth:`decode`, piece by piece: yields the frames ``[B, 3, f, H, W]`` of each piece of latents."""
        config, state = self.config, State()
        for latents in pieces:
            if latents.ndim != 5 or latents.shape[1] != config.z_dim:
                raise ValueError(f"latents: expected [B, {config.z_dim}, T, h, w], got {tuple(latents.shape)}")
            latents = latents.to(self.device, self.dtype)
            mean, std = self._statistics(latents)
            x = self.decoder(self.post_quant_conv(latents * std + mean, state), state)
            if config.patch_size > 1:
                x = rearrange(x, "b (c x y) t h w -> b c t (h y) (w x)", x=config.patch_size, y=config.patch_size)
            yield x.clamp(-1, 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (like.new_tensor(values) for values in (self.config.latents_mean, self.config.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def _check_video(self, video: Tensor, first: bool) -> None:
        stride, temporal = self.config.spatial_stride, self.config.temporal_stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video: expected [B, 3, F, H, W], got {tuple(video.shape)}")
        frames, height, width = video.shape[2:]
        if height % stride or width % stride:
            raise ValueError(f"video: height and width must be multiples of {stride}, got {height} x {width}")
        if (frames - first) % temporal or frames < 1:
            wanted = f"1 + {temporal}n" if first else f"a multiple of {temporal}"
            raise ValueError(f"video: expected {wanted} frames in this piece, got {frames}")
