"""ComfyUI's copy of the Wan VAE (``comfy/ldm/wan``): a stand-in that differs from the original where ComfyUI does.

Signatures, slots, padding and chunks are as published; the rest is that of tests/support/wan_original.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tests.support.wan_original import Decoder3d, Encoder3d, Resample, ResidualBlock, WanVAE_, cached, last_two


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


class _ComfyEncoder21(Encoder3d):
    def forward(self, x, feat_cache=None, feat_idx=[0], final=False):  # noqa: B006
        return super().forward(x, feat_cache, feat_idx, final=final)


class _ComfyDecoder21(Decoder3d):
    """A decoder that goes on with two frames at a time where there are more, and returns the pieces."""

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        x = self.run_middle(cached(self.conv1, x, feat_cache, feat_idx), feat_cache, feat_idx)
        pieces = []
        self.run_up(0, x, feat_cache, feat_idx, pieces)
        return pieces

    def run_up(self, number, x, feat_cache, feat_idx, pieces):
        if number == len(self.upsamples):
            pieces.append(self.run_head(x, feat_cache, feat_idx))
            return
        layer = self.upsamples[number]
        x = layer(x, feat_cache, feat_idx)
        doubles = isinstance(layer, self.kit.Resample) and layer.mode == "upsample3d" and x.shape[2] > 2
        for piece in x.split(2, dim=2) if doubles else [x]:
            self.run_up(number + 1, piece, feat_cache, list(feat_idx) if doubles else feat_idx, pieces)


class WanVAE(WanVAE_):
    """The VAE of ComfyUI, in which version 2.1 takes two frames or latents a chunk, and a single image has no cache."""

    def __init__(self, *layout, residual):
        if residual:
            super().__init__(*layout, residual, COMFYUI_22)
        else:
            super().__init__(*layout, residual, COMFYUI_21, _ComfyEncoder21, _ComfyDecoder21)

    def encode(self, x):
        if self.patch_size == 2:
            return super().encode(x)
        chunks = [x[:, :, :1], *x[:, :, 1:].split(2, dim=2)] if x.shape[2] > 1 else [x]
        kinds = (self.encoder.kit.CausalConv3d, self.encoder.kit.Resample)
        layers = [m for m in self.encoder.modules() if isinstance(m, kinds)]
        slots = [None for m in layers if getattr(m, "mode", "downsample3d") == "downsample3d"]
        out = []
        for i, chunk in enumerate(chunks):
            final = {} if i == 0 else {"final": i == len(chunks) - 1}
            out.append(self.encoder(chunk, feat_cache=slots if len(chunks) > 1 else None, feat_idx=[0], **final))
        return self.conv1(torch.cat([y for y in out if y is not None], dim=2)).chunk(2, dim=1)[0]

    def decode(self, z):
        if self.patch_size == 2:
            return super().decode(z)
        x = self.conv2(z)
        chunks = [x[:, :, :1], *x[:, :, 1:].split(2, dim=2)] if x.shape[2] > 1 else [x]
        slots = self.slots(self.decoder) if len(chunks) > 1 else None
        return torch.cat([piece for chunk in chunks for piece in self.decoder(chunk, slots, [0])], dim=2)


for _name, _classes in {
    "CausalConv3d": [_ComfyCausalConv3d],
    "Resample": [_ComfyResample21, _ComfyResample22],
    "ResidualBlock": [_ComfyResidualBlock21, _ComfyResidualBlock22],
}.items():
    for _class in _classes:
        _class.__name__ = _name
COMFYUI_21 = SimpleNamespace(
    CausalConv3d=_ComfyCausalConv3d, Resample=_ComfyResample21, ResidualBlock=_ComfyResidualBlock21
)
COMFYUI_22 = SimpleNamespace(
    CausalConv3d=_ComfyCausalConv3d, Resample=_ComfyResample22, ResidualBlock=_ComfyResidualBlock22
)
