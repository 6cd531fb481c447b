"""ComfyUI's copy of the Wan VAE (``comfy/ldm/wan``): a stand-in that differs from the original where ComfyUI does.

Signatures, slots, padding and chunks are as published; the rest is that of tests/support/wan_original.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tests.support.wan_original import Resample, ResidualBlock, WanVAE_, cached, kit, last_two


class _ComfyCausalConv3d(nn.Conv3d):
    """A convolution that leaves the padding of frames to torch's, and may take its past out of the list of slots."""

    comfy_cast_weights = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight_function, self.bias_function = [], []
        self._padding = 2 * self.padding[0]
        self.padding = (0, *self.padding[1:])

    def forward(self, x, cache_x=None, cache_list=None, cache_idx=None):
        if cache_list is not None:
            cache_x, cache_list[cache_idx] = cache_list[cache_idx], None
        if self._padding:
            cache_x = x[:, :, :0] if cache_x is None else cache_x
            missing = self._padding - cache_x.shape[2]
            zeros = x.new_zeros(*x.shape[:2], missing, *x.shape[3:])
            x = torch.cat((zeros, cache_x, x), dim=2)
        return self.compute(x)

    def compute(self, x):
        if not self.comfy_cast_weights:
            return super().forward(x)
        import comfy.ops  # the stand-in that a test has put there

        weight, bias, loan = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        y = self._conv_forward(x, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, loan)
        return y


class _ComfyResidualBlock22(ResidualBlock):
    convolution = _ComfyCausalConv3d

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        before = x
        for layer in self.residual:
            if isinstance(layer, self.convolution) and feat_cache is not None:
                index = feat_idx[0]
                frames = self.remember(x, feat_cache[index])
                x = layer(x, cache_list=feat_cache, cache_idx=index)
                feat_cache[index] = frames
                feat_idx[0] += 1
            else:
                x = layer(x)
        return x + self.shortcut(before)

    def remember(self, x, slot):
        return last_two(x, slot)


class _ComfyResample22(Resample):
    convolution = _ComfyCausalConv3d


class _ComfyResidualBlock21(_ComfyResidualBlock22):
    def forward(self, x, feat_cache=None, feat_idx=[0], final=False):  # noqa: B006
        return super().forward(x, feat_cache, feat_idx)

    def remember(self, x, slot):
        return last_two(x)


class _ComfyResample21(_ComfyResample22):
    """A resampling that halves the frame rate with a second slot, where a single frame waits for its partner."""

    def forward(self, x, feat_cache=None, feat_idx=[0], final=False):  # noqa: B006
        if self.mode != "downsample3d" or feat_cache is None:
            return super().forward(x, feat_cache, feat_idx)
        index = feat_idx[0]
        starts = feat_cache[index] is None
        x = self.halve(self.frame_by_frame(x), feat_cache, feat_idx)
        feat_idx[0] += 1
        if starts:
            return x
        waiting, feat_cache[index + 1] = feat_cache[index + 1], None
        x = x if waiting is None else torch.cat((waiting, x), dim=2)
        if x.shape[2] == 1 and not final:
            feat_cache[index + 1] = x
            return None
        return x

    def remember(self, x, slot):
        return last_two(x)


for _class in (_ComfyCausalConv3d, _ComfyResample21, _ComfyResample22, _ComfyResidualBlock21, _ComfyResidualBlock22):
    _class.__name__ = _class.__name__.removeprefix("_Comfy").rstrip("12")


class WanVAE(WanVAE_):
    """The VAE of ComfyUI, in which version 2.1 takes two frames or latents a chunk, and a single image has no cache."""

    kits = (
        kit(_ComfyCausalConv3d, _ComfyResample21, _ComfyResidualBlock21),
        kit(_ComfyCausalConv3d, _ComfyResample22, _ComfyResidualBlock22),
    )

    def _encode(self, x):
        if self.config.is_residual:
            return super()._encode(x)
        chunks = _chunks(x)
        slots = [None] * 64 if len(chunks) > 1 else None
        out = [self._encode_chunk(chunk, slots, i == len(chunks) - 1) for i, chunk in enumerate(chunks)]
        return self.quant_conv(torch.cat([y for y in out if y is not None], dim=2))

    def _encode_chunk(self, x, slots, final):
        part, index = self.encoder, [0]
        x = cached(part.conv_in, x, slots, index)
        for layer in part.down_blocks:
            x = layer(x, slots, index, final=final)
            if x is None:
                return None
        x = part.nonlinearity(part.norm_out(part.mid_block(x, slots, index)))
        return cached(part.conv_out, x, slots, index)

    def _decode(self, z, return_dict=True):
        if self.config.is_residual:
            return super()._decode(z)
        chunks = _chunks(self.post_quant_conv(z))
        slots = [None] * 64 if len(chunks) > 1 else None
        return SimpleNamespace(sample=torch.cat([self.decoder(x, slots, [0]) for x in chunks], dim=2))


def _chunks(x):
    return [x[:, :, :1], *x[:, :, 1:].split(2, dim=2)] if x.shape[2] > 1 else [x]
