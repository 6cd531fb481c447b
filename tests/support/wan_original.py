"""The Wan VAE under its original names: a stand-in for the modules of the Wan repositories.

What integrations look at is as published: names of classes and attributes, order of layers, signatures, and who caches
what in which slot. Versions 2.1 and 2.2, two files there, are one here (``residual``). Written for these tests from the
published behaviour; that it computes the Wan VAE is proved against diffusers
(tests/integrations/wan_vae/test_layers.py).
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


def last_two(x, slot=None):
    """Returns what a convolution leaves in its slot: its input's last two frames, the older perhaps from the slot."""
    frames = x[:, :, -2:].clone()
    if frames.shape[2] < 2 and slot is not None:
        frames = torch.cat((slot[:, :, -1:], frames), dim=2)
    return frames


def cached(conv, x, feat_cache, feat_idx):
    """Calls a convolution with the next slot, in the published way."""
    if feat_cache is None:
        return conv(x)
    index = feat_idx[0]
    frames = last_two(x, feat_cache[index])
    x = conv(x, feat_cache[index])
    feat_cache[index] = frames
    feat_idx[0] += 1
    return x


class CausalConv3d(nn.Conv3d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        time, rows, columns = self.padding
        self._padding = (columns, columns, rows, rows, 2 * time, 0)
        self.padding = (0, 0, 0)

    def forward(self, x, cache_x=None):
        padding = list(self._padding)
        if cache_x is not None and padding[4] > 0:
            x = torch.cat((cache_x, x), dim=2)
            padding[4] -= cache_x.shape[2]
        return super().forward(F.pad(x, padding))


class RMS_norm(nn.Module):
    def __init__(self, dim, channel_first=True, images=True, bias=False):
        super().__init__()
        shape = (dim, *(1, 1, 1)[images:]) if channel_first else (dim,)
        self.channel_first = channel_first
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else 0.0

    def forward(self, x):
        return F.normalize(x, dim=1 if self.channel_first else -1) * self.scale * self.gamma + self.bias


class Upsample(nn.Upsample):
    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class Resample(nn.Module):
    convolution = CausalConv3d

    def __init__(self, dim, mode, dim_out):
        super().__init__()
        self.dim = dim
        self.mode = mode
        if mode.startswith("upsample"):
            self.resample = nn.Sequential(
                Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), nn.Conv2d(dim, dim_out, 3, padding=1)
            )
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=(2, 2)))
        if mode == "upsample3d":
            self.time_conv = self.convolution(dim, 2 * dim, (3, 1, 1), padding=(1, 0, 0))
        elif mode == "downsample3d":
            self.time_conv = self.convolution(dim, dim, (3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0))

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        if self.mode == "upsample3d" and feat_cache is not None:
            x = self.double(x, feat_cache, feat_idx)
        x = self.frame_by_frame(x)
        if self.mode == "downsample3d" and feat_cache is not None:
            x = self.halve(x, feat_cache, feat_idx)
        return x

    def frame_by_frame(self, x):
        y = self.resample(x.transpose(1, 2).flatten(0, 1))
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def double(self, x, feat_cache, feat_idx):
        index = feat_idx[0]
        feat_idx[0] += 1
        slot = feat_cache[index]
        if slot is None:
            feat_cache[index] = "Rep"
            return x
        feat_cache[index] = self.remember(x, slot)
        x = self.time_conv(x) if isinstance(slot, str) else self.time_conv(x, slot)
        return x.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)

    def remember(self, x, slot):
        return last_two(x, torch.zeros_like(x) if isinstance(slot, str) else slot)

    def halve(self, x, feat_cache, feat_idx):
        index = feat_idx[0]
        feat_idx[0] += 1
        slot, feat_cache[index] = feat_cache[index], x[:, :, -1:].clone()
        return x if slot is None else self.time_conv(torch.cat((slot[:, :, -1:], x), dim=2))


class ResidualBlock(nn.Module):
    convolution = CausalConv3d

    def __init__(self, in_dim, out_dim, dropout=0.0):
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim
        conv = self.convolution
        self.residual = nn.Sequential(
            RMS_norm(in_dim, images=False), nn.SiLU(), conv(in_dim, out_dim, 3, padding=1),
            RMS_norm(out_dim, images=False), nn.SiLU(), nn.Dropout(dropout), conv(out_dim, out_dim, 3, padding=1),
        )  # fmt: skip
        self.shortcut = conv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        h = self.shortcut(x)
        for layer in self.residual:
            x = cached(layer, x, feat_cache, feat_idx) if isinstance(layer, self.convolution) else layer(x)
        return x + h


class AttentionBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.norm = RMS_norm(dim)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        y = x.transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_qkv(self.norm(y)).flatten(2).unsqueeze(1).transpose(2, 3).contiguous().chunk(3, dim=3)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(y.shape)
        return self.proj(out).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2) + x


class AvgDown3D(nn.Module):
    def __init__(self, in_channels, out_channels, factor_t, factor_s):
        super().__init__()
        self.out_channels, self.factor_t, self.factor_s = out_channels, factor_t, factor_s

    def forward(self, x):
        t, s = self.factor_t, self.factor_s
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % t, 0))
        x = x.unflatten(4, (-1, s)).unflatten(3, (-1, s)).unflatten(2, (-1, t))  # [B, C, T, t, h, s, w, s]
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return x.unflatten(1, (self.out_channels, -1)).mean(dim=2)


class DupUp3D(nn.Module):
    def __init__(self, in_channels, out_channels, factor_t, factor_s):
        super().__init__()
        self.out_channels, self.factor_t, self.factor_s = out_channels, factor_t, factor_s
        self.repeats = out_channels * factor_t * factor_s**2 // in_channels

    def forward(self, x, first_chunk=False):
        t, s = self.factor_t, self.factor_s
        x = x.repeat_interleave(self.repeats, dim=1).unflatten(1, (self.out_channels, t, s, s))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, t - 1 :] if first_chunk else x


class Down_ResidualBlock(nn.Module):
    def __init__(self, kit, in_dim, out_dim, mult, mode):
        super().__init__()
        self.avg_shortcut = AvgDown3D(in_dim, out_dim, 2 if mode == "downsample3d" else 1, 2 if mode else 1)
        layers = [kit.ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(mult)]
        self.downsamples = nn.Sequential(*layers, *([kit.Resample(out_dim, mode, out_dim)] if mode else []))

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        y = x.clone()
        for module in self.downsamples:
            y = module(y, feat_cache, feat_idx)
        return y + self.avg_shortcut(x)


class Up_ResidualBlock(nn.Module):
    def __init__(self, kit, in_dim, out_dim, mult, mode):
        super().__init__()
        self.avg_shortcut = DupUp3D(in_dim, out_dim, 2 if mode == "upsample3d" else 1, 2) if mode else None
        layers = [kit.ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(mult)]
        self.upsamples = nn.Sequential(*layers, *([kit.Resample(out_dim, mode, out_dim)] if mode else []))

    def forward(self, x, feat_cache=None, feat_idx=[0], first_chunk=False):  # noqa: B006
        y = x.clone()
        for module in self.upsamples:
            y = module(y, feat_cache, feat_idx)
        return y if self.avg_shortcut is None else y + self.avg_shortcut(x, first_chunk)


class Coder(nn.Module):
    """The parts that encoder and decoder share: ``conv1``, ``middle`` and ``head`` around or before the stages."""

    def __init__(self, kit, dim_in, first, middle, last, dim_out):
        super().__init__()
        self.kit = kit
        self.conv1 = kit.CausalConv3d(dim_in, first, 3, padding=1)
        self.middle = nn.Sequential(
            kit.ResidualBlock(middle, middle), AttentionBlock(middle), kit.ResidualBlock(middle, middle)
        )
        self.head = nn.Sequential(
            RMS_norm(last, images=False), nn.SiLU(), kit.CausalConv3d(last, dim_out, 3, padding=1)
        )

    def run_middle(self, x, feat_cache, feat_idx):
        for layer in self.middle:
            x = layer(x) if isinstance(layer, AttentionBlock) else layer(x, feat_cache, feat_idx)
        return x

    def run_head(self, x, feat_cache, feat_idx):
        norm, activation, conv = self.head
        return cached(conv, activation(norm(x)), feat_cache, feat_idx)


class Encoder3d(Coder):
    def __init__(self, kit, channels, dim, z_dim, dim_mult, num_res_blocks, temperal_downsample, residual):
        dims = [dim * m for m in (1, *dim_mult)]
        super().__init__(kit, channels, dims[0], dims[-1], dims[-1], z_dim)
        stages = []
        for i, (in_dim, out_dim) in enumerate(pairwise(dims)):
            last = i == len(dim_mult) - 1
            mode = None if last else "downsample3d" if temperal_downsample[i] else "downsample2d"
            if residual:
                stages.append(Down_ResidualBlock(kit, in_dim, out_dim, num_res_blocks, mode))
                continue
            stages += [kit.ResidualBlock(in_dim if j == 0 else out_dim, out_dim) for j in range(num_res_blocks)]
            stages += [kit.Resample(out_dim, mode, out_dim)] if mode else []
        self.downsamples = nn.Sequential(*stages)

    def forward(self, x, feat_cache=None, feat_idx=[0], **options):  # noqa: B006
        x = cached(self.conv1, x, feat_cache, feat_idx)
        for layer in self.downsamples:
            x = layer(x, feat_cache, feat_idx, **options)
            if x is None:
                return None
        return self.run_head(self.run_middle(x, feat_cache, feat_idx), feat_cache, feat_idx)


class Decoder3d(Coder):
    def __init__(self, kit, channels, dim, z_dim, dim_mult, num_res_blocks, temperal_upsample, residual):
        dims = [dim * m for m in (dim_mult[-1], *reversed(dim_mult))]
        super().__init__(kit, z_dim, dims[0], dims[0], dims[-1], channels)
        stages = []
        for i, (in_dim, out_dim) in enumerate(pairwise(dims)):
            last = i == len(dim_mult) - 1
            mode = None if last else "upsample3d" if temperal_upsample[i] else "upsample2d"
            if residual:
                stages.append(Up_ResidualBlock(kit, in_dim, out_dim, num_res_blocks + 1, mode))
                continue
            in_dim = in_dim // 2 if i else in_dim
            stages += [kit.ResidualBlock(in_dim if j == 0 else out_dim, out_dim) for j in range(num_res_blocks + 1)]
            stages += [kit.Resample(out_dim, mode, out_dim // 2)] if mode else []
        self.upsamples = nn.Sequential(*stages)

    def forward(self, x, feat_cache=None, feat_idx=[0], first_chunk=False):  # noqa: B006
        x = self.run_middle(cached(self.conv1, x, feat_cache, feat_idx), feat_cache, feat_idx)
        for layer in self.upsamples:
            first = {"first_chunk": first_chunk} if isinstance(layer, Up_ResidualBlock) else {}
            x = layer(x, feat_cache, feat_idx, **first)
        return self.run_head(x, feat_cache, feat_idx)


WAN = SimpleNamespace(CausalConv3d=CausalConv3d, Resample=Resample, ResidualBlock=ResidualBlock)


class WanVAE_(nn.Module):
    """The VAE itself, whose latents are unscaled.

    ``residual``: version 2.2, whose pixels come and go in patches of 2x2.
    """

    def __init__(
        self, dim, dec_dim, z_dim, dim_mult, num_res_blocks, temperal_downsample, residual, kit=WAN,
        encoder=Encoder3d, decoder=Decoder3d,
    ):  # fmt: skip
        super().__init__()
        channels = 12 if residual else 3
        layout = (dim_mult, num_res_blocks)
        self.patch_size = 2 if residual else 1
        self.encoder = encoder(kit, channels, dim, 2 * z_dim, *layout, temperal_downsample, residual)
        self.decoder = decoder(kit, channels, dec_dim, z_dim, *layout, temperal_downsample[::-1], residual)
        self.conv1 = kit.CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = kit.CausalConv3d(z_dim, z_dim, 1)

    def slots(self, coder):
        return [None] * sum(isinstance(m, self.encoder.kit.CausalConv3d) for m in coder.modules())

    def encode(self, x):
        """Returns the means [B, z, 1 + n, h, w] of a clip [B, 3, 1 + 4n, H, W]."""
        x, slots = self.patchify(x), self.slots(self.encoder)
        chunks = [x[:, :, :1], *x[:, :, 1:].split(4, dim=2)] if x.shape[2] > 1 else [x]
        out = torch.cat([self.encoder(chunk, feat_cache=slots, feat_idx=[0]) for chunk in chunks], dim=2)
        return self.conv1(out).chunk(2, dim=1)[0]

    def decode(self, z):
        """Returns the clip [B, 3, 1 + 4n, H, W] of latents [B, z, 1 + n, h, w]."""
        slots = self.slots(self.decoder)
        out = [
            self.decoder(frame, feat_cache=slots, feat_idx=[0], first_chunk=i == 0)
            for i, frame in enumerate(self.conv2(z).split(1, dim=2))
        ]
        return self.unpatchify(torch.cat(out, dim=2))

    def patchify(self, x):
        p = self.patch_size
        return x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)

    def unpatchify(self, x):
        p = self.patch_size
        return x.unflatten(1, (-1, p, p)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
