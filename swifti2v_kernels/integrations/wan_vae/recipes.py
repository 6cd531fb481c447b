"""The Wan VAEs (2.1 and 2.2) of other people's code on our operators: which modules are known, and how each is read.

Known are diffusers' ``AutoencoderKLWan`` (:data:`RECIPES`) and, under their own names, the modules of the Wan
repositories (``wan/modules/vae.py``, ``vae2_1.py``, ``vae2_2.py``) and of ComfyUI (``comfy/ldm/wan``)
(:data:`ORIGINAL_RECIPES`). Only layers are replaced, and only those that compute the same on tiny tensors
(:mod:`~swifti2v_kernels.integrations.wan_vae.probes`): chunks of a clip, tiles, slices and the model around the layers
stay the host's. A layer keeps its signature, its cache (:mod:`~swifti2v_kernels.integrations.wan_vae.layers`) and its
weights, which are read at every call.

One call of a layer is the host's own where something would be missed otherwise: a convolution inside it has hooks (its
weights may be elsewhere until it is called), has been replaced (an adapter) or is quantised, or dropout is on. Inputs
that need gradients take the operators' differentiable path.

Autocast: a layer computes in the dtype that its convolutions have there. Norms within a residual block then read what
the convolutions have rounded, and their weights are rounded too, where the hosts norm in float32; a norm by itself is
left to the host, as is one whose channels do not lie last in memory.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import MutableSequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...common.tracing import constant_when_traced
from ..recipe import Recipe
from ..sdpa import autocast
from .layers import ResidualBlock, convolve, from_frames, normalize, resample, residual_block, time_padding, to_frames
from .probes import conv_probe, layer_probe, norm_probe
from .weights import obstacle, without_autocast

FeatCache, Index = MutableSequence[Any] | None, MutableSequence[int] | None


def _read(module: nn.Module) -> tuple[ResidualBlock, nn.Module]:
    """Returns the parts of a residual block, and its dropout, as the host keeps them."""
    if hasattr(module, "residual"):
        norm1, _, conv1, norm2, _, dropout, conv2 = module.residual
        shortcut = module.shortcut
    else:
        norm1, conv1, norm2, conv2 = module.norm1, module.conv1, module.norm2, module.conv2
        shortcut, dropout = module.conv_shortcut, module.dropout
    return ResidualBlock(norm1, conv1, norm2, conv2, None if isinstance(shortcut, nn.Identity) else shortcut), dropout


def _residual_forward(
    module: nn.Module, x: Tensor, feat_cache: FeatCache = None, feat_idx: Index = None, final: bool = False
) -> Tensor | str:
    """Replaces the ``forward`` of a residual block; ComfyUI's (2.1) takes ``final`` and makes no use of it."""
    block, dropout = _read(module)
    if (reason := obstacle(module, x, *block)) is not None:
        return reason
    if dropout.training and dropout.p:
        return "dropout is on"
    # Added to the input itself, the host's result has the input's dtype.
    frames = x if block.shortcut is None else autocast(x)
    with without_autocast(x):
        return residual_block(frames, block, feat_cache, feat_idx or [0], not _takes_final(type(module)))


def _resample_forward(
    module: nn.Module, x: Tensor, feat_cache: FeatCache = None, feat_idx: Index = None, final: bool = False
) -> Tensor | str:
    """Replaces the ``forward`` of a resampling layer.

    ComfyUI's (2.1), known by its parameter ``final``, joins no frames of two chunks in a slot, and neither does its
    residual block. Where it halves the frame rate, it has a second slot for a frame that waits for the next chunk.
    """
    joins = not _takes_final(type(module))
    if feat_cache is not None and module.mode == "downsample3d" and not joins:
        return "frames that wait for the next chunk"
    if (reason := obstacle(module, x, module.resample[1], getattr(module, "time_conv", None))) is not None:
        return reason
    frames = autocast(x)
    with without_autocast(x):
        return resample(frames, module, feat_cache, feat_idx or [0], joins)


def _conv_forward(
    module: nn.Module,
    x: Tensor,
    cache_x: Tensor | None = None,
    cache_list: MutableSequence[Any] | None = None,
    cache_idx: int | None = None,
) -> Tensor | str:
    """Replaces the ``forward`` of a causal convolution; ComfyUI's also takes its past out of a list."""
    if (reason := obstacle(module, x, module)) is not None:
        return reason
    if module.kernel_size[0] - module.stride[0] > time_padding(module):
        return "a convolution that begins at the first frame"
    if cache_list is not None and cache_idx is not None:
        cache_x, cache_list[cache_idx] = cache_list[cache_idx], None
    frames = to_frames(autocast(x))
    with without_autocast(x):
        return from_frames(convolve(frames, module, cache_x))


def _norm_forward(module: nn.Module, x: Tensor) -> Tensor | str:
    """Replaces the ``forward`` of ``WanRMS_norm`` and ``RMS_norm``."""
    if torch.is_autocast_enabled(x.device.type):
        return "autocast, under which the host norms in float32"
    if (reason := obstacle(module, x, module)) is not None:
        return reason
    y = normalize(x, module)
    return "channels that do not lie last in memory" if y is None else y


# Constant for a trace: it is the class's.
@constant_when_traced
@functools.cache
def _takes_final(kind: type[nn.Module]) -> bool:
    return "final" in inspect.signature(kind.forward).parameters


#: Recipes for diffusers' ``AutoencoderKLWan``.
RECIPES = tuple(
    Recipe(host, "vae", by, needs, forward, package="diffusers", probe=probe)
    for host, by, needs, forward, probe in (
        (
            *("WanResidualBlock", "rms_norm_silu and causal_conv3d, with norm, residual and cached frames in them"),
            ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "nonlinearity", "dropout.p"),
            *(_residual_forward, layer_probe),
        ),
        ("WanResample", "upsample_conv2d and causal_conv3d", ("mode", "resample"), _resample_forward, layer_probe),
        (
            *("WanCausalConv3d", "causal_conv3d", ("_padding", "weight", "bias", "kernel_size", "stride")),
            *(_conv_forward, conv_probe),
        ),
        ("WanRMS_norm", "norm_modulate", ("gamma", "scale", "bias", "channel_first"), _norm_forward, norm_probe),
    )
)
#: Recipes for the modules of the Wan repositories and ComfyUI.
ORIGINAL_RECIPES = tuple(replace(r, host=r.host.removeprefix("Wan"), needs=(), package=None) for r in RECIPES)
