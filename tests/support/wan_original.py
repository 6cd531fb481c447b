"""The Wan VAE under its original names: a stand-in for the modules of the Wan repositories.

What integrations look at is as published: names of classes and attributes, order of layers, signatures, and who caches
what in which slot. Versions 2.1 and 2.2, two files there, are one here (``residual``). Written for these tests from the
published behaviour; the code around the layers is diffusers'. That together they compute the Wan VAE is proved against
diffusers (tests/integrations/wan_vae/test_original.py).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
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

    def __init__(self, dim, mode, upsample_out_dim=None):
        super().__init__()
        self.dim = dim
        self.mode = mode
        if mode.startswith("upsample"):
            self.resample = nn.Sequential(
                Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"),
                nn.Conv2d(dim, upsample_out_dim or dim // 2, 3, padding=1),
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

    def __init__(self, in_dim, out_dim, dropout=0.0, non_linearity="silu"):
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
    forward = autoencoder_kl_wan.WanAttentionBlock.forward

    def __init__(self, dim):
        super().__init__()
        self.norm, self.to_qkv, self.proj = RMS_norm(dim), nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)


def kit(conv, resample, residual_block):
    """Returns the classes that stand in diffusers' VAE under the names of its own."""
    kinds = {"CausalConv3d": conv, "Resample": resample, "ResidualBlock": residual_block}
    kinds |= {"RMS_norm": RMS_norm, "AttentionBlock": AttentionBlock}
    return {f"Wan{name}": kind for name, kind in kinds.items()}


class WanVAE_(AutoencoderKLWan):
    """The VAE itself, made by :func:`wan_vae`; it takes and gives tensors, and its latents are unscaled."""

    #: For the versions 2.1 and 2.2.
    kits = (kit(CausalConv3d, Resample, ResidualBlock),) * 2

    def encode(self, x):
        """Returns the means [B, z, 1 + n, h, w] of a clip [B, 3, 1 + 4n, H, W]."""
        return super().encode(x).latent_dist.mode()

    def decode(self, z):
        """Returns the clip [B, 3, 1 + 4n, H, W] of latents [B, z, 1 + n, h, w]."""
        return super().decode(z).sample


def wan_vae(kind=WanVAE_, residual=False, **config):
    """Returns a tiny random VAE of version 2.1, or of 2.2 with ``residual``, or of a configuration as diffusers has."""
    layout = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    layout |= {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True} if residual else {}
    layout |= {name: value for name, value in config.items() if not name.startswith("_")}
    with pytest.MonkeyPatch.context() as patch:
        for name, own in kind.kits[layout.get("is_residual", False)].items():
            patch.setattr(autoencoder_kl_wan, name, own)
        return kind(**layout).eval()


def original_state(theirs):
    """Returns the weights of diffusers' own VAE under the names that they have in :func:`wan_vae`'s."""
    names = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    names["conv_shortcut"] = "shortcut"
    return {
        ".".join(names.get(part, part) for part in name.split(".")): tensor
        for name, tensor in theirs.state_dict().items()
    }


def imitate(root: nn.Module, kind: str, forward) -> None:
    """Gives all modules of a kind another ``forward``, in a class of the same name, as look-alikes have."""
    classes: dict[type, type] = {}
    for module in root.modules():
        host = type(module)
        if host.__name__ == kind:
            module.__class__ = classes.setdefault(host, type(kind, (host,), {"forward": forward}))
