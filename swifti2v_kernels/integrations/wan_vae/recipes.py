"""The Wan VAEs (2.1 and 2.2) of other people's code on our operators: which modules are known, and how each is read.

Known are diffusers' ``AutoencoderKLWan`` (:data:`RECIPES`) and, under their own names, the modules of the Wan
repositories (``wan/modules/vae.py``, ``vae2_1.py``, ``vae2_2.py``) and of ComfyUI (``comfy/ldm/wan``)
(:data:`ORIGINAL_RECIPES`). Only layers are replaced: chunks of a clip, tiles, slices and the model around the layers
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
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...common.tracing import constant_when_traced
from ..recipe import PARTS, Recipe
from ..sdpa import autocast
from .layers import (
    FeatCache,
    ResidualBlock,
    convolve,
    from_frames,
    normalize,
    resample,
    residual_block,
    time_padding,
    to_frames,
)
from .probes import conv_probe, layer_probe, norm_probe
from .weights import apart, unreadable, watched, without_autocast

Index = MutableSequence[int] | None
Reason = Callable[[nn.Module], str | None]

_ORIGINAL_RESIDUAL = ("RMS_norm", "SiLU", "CausalConv3d", "RMS_norm", "SiLU", "Dropout", "CausalConv3d")
_MODES = ("upsample2d", "upsample3d", "downsample2d", "downsample3d")


def _read(module: nn.Module) -> tuple[ResidualBlock, nn.Module, Sequence[nn.Module]]:
    """Returns the parts of a residual block, its dropout and its activations, as the host keeps them."""
    if hasattr(module, "residual"):
        norm1, act1, conv1, norm2, act2, dropout, conv2 = module.residual
        shortcut, activations = module.shortcut, (act1, act2)
    else:
        norm1, conv1, norm2, conv2 = module.norm1, module.conv1, module.norm2, module.conv2
        shortcut, dropout, activations = module.conv_shortcut, module.dropout, (module.nonlinearity,)
    shortcut = None if isinstance(shortcut, nn.Identity) else shortcut
    return ResidualBlock(norm1, conv1, norm2, conv2, shortcut), dropout, activations


def _residual_forward(
    module: nn.Module, x: Tensor, feat_cache: FeatCache = None, feat_idx: Index = None, final: bool = False
) -> Tensor | str:
    """Replaces the ``forward`` of a residual block; ComfyUI's (2.1) takes ``final`` and makes no use of it."""
    block, dropout, _ = _read(module)
    parts = [part for part in block if part is not None]
    convs = [part for part in (block.conv1, block.conv2, block.shortcut) if part is not None]
    if (reason := _obstacle(module, x, convs, parts)) is not None:
        return reason
    if dropout.training and dropout.p:
        return "dropout is on"
    with without_autocast(x):
        y = residual_block(autocast(x), block, feat_cache, feat_idx or [0], not _takes_final(type(module)))
    # Added to the input itself, the host's result has the wider dtype of the two.
    return y if block.shortcut is not None else y.to(torch.promote_types(y.dtype, x.dtype))


def _resample_forward(
    module: nn.Module, x: Tensor, feat_cache: FeatCache = None, feat_idx: Index = None, final: bool = False
) -> Tensor | str | None:
    """Replaces the ``forward`` of a resampling layer.

    ComfyUI's (2.1), known by its parameter ``final``, has a second slot where it halves the frame rate: a single frame
    waits there, and None is returned, until there are two or the clip ends. It also joins no frames of two chunks in a
    slot, and neither does its residual block.
    """
    joins = not _takes_final(type(module))
    waits = feat_cache is not None and module.mode == "downsample3d" and not joins
    # Only a frame that has been through the convolution in time may wait.
    starts = waits and feat_cache[feat_idx[0]] is None
    convs = [conv for conv in (module.resample[1], getattr(module, "time_conv", None)) if conv is not None]
    if (reason := _obstacle(module, x, convs, convs)) is not None:
        return reason
    with without_autocast(x):
        y = resample(autocast(x), module, feat_cache, feat_idx or [0], joins)
    if not waits:
        return y
    slot = feat_idx[0]
    feat_idx[0] += 1
    if starts:
        return y
    waiting, feat_cache[slot] = feat_cache[slot], None
    y = y if waiting is None else torch.cat((waiting, y), dim=2)
    if y.shape[2] > 1 or final:
        return y
    feat_cache[slot] = y
    return None


def _conv_forward(
    module: nn.Module,
    x: Tensor,
    cache_x: Tensor | None = None,
    cache_list: MutableSequence[Any] | None = None,
    cache_idx: int | None = None,
) -> Tensor | str:
    """Replaces the ``forward`` of a causal convolution; ComfyUI's also takes its past out of a list."""
    # Hooks of the module itself are around this forward and have done their work.
    if (reason := apart(x, module) or _changed(module)) is not None:
        return reason
    if cache_list is not None and cache_idx is not None:
        cache_x, cache_list[cache_idx] = cache_list[cache_idx], None
    frames = to_frames(autocast(x))
    with without_autocast(x):
        return from_frames(convolve(frames, module, cache_x))


def _norm_forward(module: nn.Module, x: Tensor) -> Tensor | str:
    """Replaces the ``forward`` of ``WanRMS_norm`` and ``RMS_norm``."""
    if torch.is_autocast_enabled(x.device.type):
        return "autocast, under which the host norms in float32"
    if (reason := apart(x, module) or _changed(module)) is not None:
        return reason
    y = normalize(x, module)
    return "channels that do not lie last in memory" if y is None else y


def _obstacle(layer: nn.Module, x: Tensor, convs: Sequence[nn.Module], parts: Sequence[nn.Module]) -> str | None:
    """Returns why a layer is to be computed by its modules, not by us with the weights of its ``parts``, or None."""
    # An adapter that has taken the place of one shows its weight and computes more.
    if not all(isinstance(conv, (nn.Conv2d, nn.Conv3d)) for conv in convs):
        return "a convolution inside was replaced"
    return unreadable(x, *parts) or ("a hook on a layer inside" if watched(layer) else _changed(layer))


def _changed(layer: nn.Module) -> str | None:
    """Returns a reason if modules in a layer are of other classes than those that it was planned with, or patched."""
    planned, parts = getattr(layer, PARTS, None), tuple(layer.modules())
    same = planned in (None, tuple(map(type, parts)))
    patched = planned is not None and any("_conv_forward" in part.__dict__ for part in parts)
    return "a part of it was replaced" if patched or not same else None


# Constant for a trace: it is the class's.
@constant_when_traced
@functools.cache
def _takes_final(kind: type[nn.Module]) -> bool:
    return "final" in inspect.signature(kind.forward).parameters


def _norm_reason(norm: nn.Module) -> str | None:
    gamma, scale = getattr(norm, "gamma", None), getattr(norm, "scale", None)
    if not isinstance(gamma, Tensor) or not isinstance(scale, float):
        return f"{type(norm).__name__} is not the Wan VAE's norm: no gamma and scale"
    if not getattr(norm, "channel_first", True):
        return "its norm is over the last axis"
    if isinstance(getattr(norm, "bias", None), Tensor):
        return "its norm has a bias"
    if abs(scale**2 - gamma.numel()) > 1e-3:
        return f"its norm scales {gamma.numel()} channels by {scale}"
    return None


def _conv_reason(conv: nn.Module) -> str | None:
    if not isinstance(conv, nn.Conv3d) or not hasattr(conv, "_padding"):
        return f"{type(conv).__name__} is not the Wan VAE's causal convolution"
    if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
        return "its convolution has groups, dilation or a padding mode"
    lead = conv.kernel_size[0] - conv.stride[0] - time_padding(conv)
    if lead < 0 or (lead > 0 and time_padding(conv)):
        return f"kernel {conv.kernel_size[0]}, stride {conv.stride[0]} and padding {time_padding(conv)} in time"
    return None


def _residual_reason(module: nn.Module) -> str | None:
    if (layers := getattr(module, "residual", None)) is not None or not hasattr(module, "conv_shortcut"):
        kinds = tuple(type(layer).__name__ for layer in layers) if isinstance(layers, nn.Sequential) else ()
        if kinds != _ORIGINAL_RESIDUAL or not hasattr(module, "shortcut"):
            return "not the Wan VAE's residual block"
    block, _, activations = _read(module)
    if not all(isinstance(activation, nn.SiLU) for activation in activations):
        return "its activation is not SiLU"
    convs = [conv for conv in (block.conv1, block.conv2, block.shortcut) if conv is not None]
    reasons = [_norm_reason(block.norm1), _norm_reason(block.norm2), *map(_conv_reason, convs)]
    if not any(reasons) and any(set(conv.stride) != {1} for conv in convs):
        return "its convolutions have strides"
    return next(filter(None, reasons), None)


def _resample_reason(module: nn.Module) -> str | None:
    mode, layers = getattr(module, "mode", None), getattr(module, "resample", None)
    if mode not in _MODES:
        return f"resampling mode {mode!r}"
    if not isinstance(layers, nn.Sequential) or len(layers) != 2 or not isinstance(layers[1], nn.Conv2d):
        return "not the Wan VAE's resampling layer"
    grows, conv = mode.startswith("up"), layers[1]
    if grows:
        factor = getattr(layers[0], "scale_factor", None)
        first = factor == (2.0, 2.0) and getattr(layers[0], "mode", None) in ("nearest", "nearest-exact")
    else:
        first = getattr(layers[0], "padding", None) == (0, 1, 0, 1)
    strides, padding = ((1, 1), (1, 1)) if grows else ((2, 2), (0, 0))
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if not first or not plain or (conv.kernel_size, conv.stride, conv.padding) != ((3, 3), strides, padding):
        return f"its {mode} is not by 2 and 3x3"
    if mode.endswith("2d"):
        return None
    conv = getattr(module, "time_conv", None)
    reason = _conv_reason(conv) if conv is not None else "it has no convolution in time"
    expected = ((3, 1, 1), (1, 1, 1), 2) if grows else ((3, 1, 1), (2, 1, 1), 0)
    if reason is None and (conv.kernel_size, conv.stride, time_padding(conv)) != expected:
        reason = f"its convolution in time has kernel {conv.kernel_size} and stride {conv.stride}"
    return reason


def _floating(reason: Reason) -> Reason:
    """Returns a check that gives what ``reason`` gives, or else that a module has integer weights."""

    def why(module: nn.Module) -> str | None:
        found = reason(module)
        return found or (None if all(p.is_floating_point() for p in module.parameters()) else "integer weights")

    return why


#: By diffusers' name of a module: what replaces it, what is read of it, its forward, check and probe.
_KNOWN = {
    "WanResidualBlock": (
        "rms_norm_silu and causal_conv3d, with norm, residual and cached frames in them",
        ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "nonlinearity", "dropout.p"),
        *(_residual_forward, _residual_reason, layer_probe(lambda module: module.residual[2].in_channels)),
    ),
    "WanResample": (
        "upsample_conv2d and causal_conv3d",
        ("mode", "resample"),
        *(_resample_forward, _resample_reason, layer_probe(lambda module: module.resample[1].in_channels)),
    ),
    "WanCausalConv3d": (
        "causal_conv3d",
        ("_padding", "weight", "bias", "kernel_size", "stride"),
        *(_conv_forward, _conv_reason, conv_probe),
    ),
    "WanRMS_norm": (
        "norm_modulate",
        ("gamma", "scale", "bias", "channel_first"),
        *(_norm_forward, _norm_reason, norm_probe),
    ),
}
#: Recipes for diffusers' ``AutoencoderKLWan``.
RECIPES = tuple(
    Recipe(host, "vae", by, needs, forward, fits=reason) for host, (by, needs, forward, reason, _) in _KNOWN.items()
)
#: Recipes for the modules of the Wan repositories and ComfyUI. Their names are common ones: a module that is not the
#: Wan VAE's, or not as it is known, or does not compute the same on tiny tensors, is left with the reason.
ORIGINAL_RECIPES = tuple(
    Recipe(host.removeprefix("Wan"), "vae", by, (), forward, fits=_floating(reason), probe=probe, common=True)
    for host, (by, _, forward, reason, probe) in _KNOWN.items()
)
