"""Modules that look like the Wan VAE's in names, layers and parameters, and compute something else.

They are the stand-in's (tests/support/wan_original.py) with another ``forward``. :class:`DiffSynthVAE` stands in for
DiffSynth-Studio's VAE, whose layers hand the cache and the index back.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.wan_original import (
    AttentionBlock,
    CausalConv3d,
    Decoder3d,
    Encoder3d,
    Resample,
    ResidualBlock,
    RMS_norm,
    WanVAE_,
    cached,
)  # fmt: skip


def scaled_branch(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
    h = self.shortcut(x)
    return h + 0.7 * (ResidualBlock.forward(self, x, feat_cache, feat_idx) - h)


def other_activation(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
    norm1, _, conv1, norm2, _, _, conv2 = self.residual
    y = cached(conv1, F.gelu(norm1(x)), feat_cache, feat_idx)
    return cached(conv2, F.gelu(norm2(y)), feat_cache, feat_idx) + self.shortcut(x)


def other_order(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
    norm1, silu, conv1, norm2, _, _, conv2 = self.residual
    y = norm2(cached(conv1, silu(norm1(x)), feat_cache, feat_idx))
    return silu(cached(conv2, y, feat_cache, feat_idx)) + self.shortcut(x)


def one_slot(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
    """Keeps both convolutions' frames in one slot."""
    if feat_cache is None:
        return ResidualBlock.forward(self, x)
    slots, index = feat_cache[feat_idx[0]] or [None, None], [0]
    y = ResidualBlock.forward(self, x, slots, index)
    feat_cache[feat_idx[0]] = slots
    feat_idx[0] += 1
    return y


def slots_in_reverse(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
    if feat_cache is None:
        return ResidualBlock.forward(self, x)
    here = slice(feat_idx[0], feat_idx[0] + 2)
    slots = feat_cache[here][::-1]
    y = ResidualBlock.forward(self, x, slots, [0])
    feat_cache[here] = slots[::-1]
    feat_idx[0] += 2
    return y


def smooth(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
    y = Resample.forward(self, x, feat_cache, feat_idx)
    return y + 0.1 * y.roll(1, dims=-1) if self.mode.startswith("up") else y


def frames_in_other_order(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
    y = Resample.forward(self, x, feat_cache, feat_idx)
    return y.flip(2) if self.mode == "upsample3d" and feat_cache is not None else y


def first_frame_repeated(self, x, cache_x=None):
    if cache_x is None and self._padding[4]:
        cache_x = x[:, :, :1].repeat(1, 1, self._padding[4], 1, 1)
    return CausalConv3d.forward(self, x, cache_x)


def epsilon(self, x):
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.gamma


def float32(self, x):
    return RMS_norm.forward(self, x.float())


def needs_a_gpu(self, x):
    raise RuntimeError("no GPU here\nand more")


#: The kind that each imitates, and how what a report says begins.
LOOKALIKES = {
    scaled_branch: ("ResidualBlock", "its forward returns something else: other values"),
    other_activation: ("ResidualBlock", "its forward returns something else: other values"),
    other_order: ("ResidualBlock", "its forward returns something else: other values"),
    one_slot: ("ResidualBlock", "its cache is kept in another way: 2, not 3"),
    slots_in_reverse: ("ResidualBlock", "its forward returns something else: "),
    smooth: ("Resample", "its forward returns something else: other values"),
    frames_in_other_order: ("Resample", "its forward returns something else: other values"),
    first_frame_repeated: ("CausalConv3d", "its forward returns something else: other values"),
    epsilon: ("RMS_norm", "its forward returns something else: other values"),
    float32: ("RMS_norm", "its forward returns something else: torch.float32, not torch.bfloat16"),
    needs_a_gpu: ("RMS_norm", "its forward could not be tried: RuntimeError: no GPU here"),
}


def imitate(root: nn.Module, kind: str, forward) -> None:
    """Gives all modules of a kind another ``forward``, in a class of the same name."""
    classes: dict[type, type] = {}
    for module in root.modules():
        host = type(module)
        if host.__name__ == kind:
            module.__class__ = classes.setdefault(host, type(kind, (host,), {"forward": forward}))


class _ReturningBlock(ResidualBlock):
    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        return super().forward(x, feat_cache, feat_idx), feat_cache, feat_idx


class _ReturningResample(Resample):
    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        return super().forward(x, feat_cache, feat_idx), feat_cache, feat_idx


_ReturningBlock.__name__, _ReturningResample.__name__ = "ResidualBlock", "Resample"


def _run(layers, x, feat_cache, feat_idx):
    for layer in layers:
        x = layer(x) if isinstance(layer, AttentionBlock) else layer(x, feat_cache, feat_idx)[0]
    return x


class _Encoder(Encoder3d):
    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        x = cached(self.conv1, x, feat_cache, feat_idx)
        return self.run_head(_run([*self.downsamples, *self.middle], x, feat_cache, feat_idx), feat_cache, feat_idx)


class _Decoder(Decoder3d):
    def forward(self, x, feat_cache=None, feat_idx=[0], first_chunk=False):  # noqa: B006
        x = cached(self.conv1, x, feat_cache, feat_idx)
        return self.run_head(_run([*self.middle, *self.upsamples], x, feat_cache, feat_idx), feat_cache, feat_idx)


class DiffSynthVAE(WanVAE_):
    """The VAE of DiffSynth-Studio, version 2.1."""

    def __init__(self, *layout):
        kit = SimpleNamespace(CausalConv3d=CausalConv3d, Resample=_ReturningResample, ResidualBlock=_ReturningBlock)
        super().__init__(*layout, False, kit, _Encoder, _Decoder)
