"""The Wan VAEs (2.1 and 2.2) of other people's code on our operators: which modules are known, and how each is read.

Known are diffusers' ``AutoencoderKLWan`` and, under their own names, the modules of the Wan repositories
(``wan/modules/vae.py``, ``vae2_1.py``, ``vae2_2.py``) and of ComfyUI (``comfy/ldm/wan``). Only layers are replaced, and
only those that compute the same on tiny tensors (:mod:`~swifti2v_kernels.integrations.probing`): chunks of a clip,
tiles, slices and the model around the layers stay the host's. A layer keeps its signature, its cache
(:mod:`~swifti2v_kernels.integrations.wan_vae.layers`) and its weights, which are read at every call.

One call of a layer is the host's own where something would be missed otherwise: a convolution inside it has hooks (its
weights may be elsewhere until it is called), has been replaced (an adapter) or is quantised, or dropout is on. That is
asked at every call. Inputs that need gradients take the operators' differentiable path.

Autocast: a layer computes in the dtype that its convolutions have there, and with autocast off, since an operator takes
all its tensors in one dtype. Norms within a residual block then read what the convolutions have rounded, and their
weights are rounded too, where the hosts norm in float32. A norm by itself is the host's.

A layer is tried without a cache, and over the chunks of a clip. It must leave the slots and the index as the host's
does, and either code must go on from the other's slots, since a call may be the host's own at any time.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...common.registration import PACKAGE
from ...common.target import constant_when_traced
from ..probing import Forward, Trial, twin
from ..recipe import PATCH, Recipe, hooked
from ..sdpa import autocast
from .layers import ResidualBlock, convolve, from_frames, paddings, resample, residual_block, to_frames, unreadable

FeatCache, Index = MutableSequence[Any] | None, MutableSequence[int] | None
#: dtypes, tolerances and entries of the batch of trials. float64 shows any other computation, the others what a host
#: does with dtypes.
_PRECISIONS = ((torch.float64, 1e-5, 2), (torch.float32, 1e-4, 1), (torch.bfloat16, 0.1, 2))
#: Magnitudes of a row's pixels in every second entry: an epsilon shows in small ones alone.
_MAGNITUDES = (1.0, 1e-3, 1e-6, 1e-9, 0.0, 1.0, 1.0, 1.0)

#: Gives new frames of a number of channels and a count, equal ones for equal numbers.
Frames = Callable[[int, int], Tensor]


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
    if (reason := _obstacle(module, x, *block)) is not None:
        return reason
    if dropout.training and dropout.p:
        return "dropout is on"
    # Added to the input itself, the host's result has the input's dtype.
    frames = x if block.shortcut is None else autocast(x)
    with torch.autocast(x.device.type, enabled=False):
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
    if (reason := _obstacle(module, x, module.resample[1], getattr(module, "time_conv", None))) is not None:
        return reason
    frames = autocast(x)
    with torch.autocast(x.device.type, enabled=False):
        return resample(frames, module, feat_cache, feat_idx or [0], joins)


def _conv_forward(
    module: nn.Module,
    x: Tensor,
    cache_x: Tensor | None = None,
    cache_list: MutableSequence[Any] | None = None,
    cache_idx: int | None = None,
) -> Tensor | str:
    """Replaces the ``forward`` of a causal convolution; ComfyUI's also takes its past out of a list."""
    if (reason := _obstacle(module, x, module)) is not None:
        return reason
    if module.kernel_size[0] - module.stride[0] > paddings(module)[0]:
        return "a convolution that begins at the first frame"
    if cache_list is not None and cache_idx is not None:
        cache_x, cache_list[cache_idx] = cache_list[cache_idx], None
    frames = to_frames(autocast(x))
    with torch.autocast(x.device.type, enabled=False):
        return from_frames(convolve(frames, module, cache_x))


def _obstacle(layer: nn.Module, x: Tensor, *parts: nn.Module | None) -> str | None:
    """Returns why ``layer`` is to be computed by its modules, not by us with the weights of ``parts``, or None.

    Hooks of the layer itself are around our forward and have done their work.
    """
    inside = tuple(layer.modules())
    if any(_is_wrapped(module) for module in inside[1:]):
        return "a hook on a layer inside"
    # An adapter in the place of a convolution shows its weight and computes more.
    if (patch := getattr(layer, PATCH, None)) is not None and (
        patch.parts != tuple(map(type, inside)) or any("_conv_forward" in vars(part) for part in inside)
    ):
        return "a part of it was replaced"
    return next(filter(None, (unreadable(x, part) for part in parts if part is not None)), None)


def _is_wrapped(module: nn.Module) -> bool:
    """Returns whether something happens when ``module`` is called that reading its weights would miss."""
    forward = module.__dict__.get("forward")
    ours = isinstance(forward, MethodType) and forward.__func__.__module__.startswith(f"{PACKAGE}.integrations.")
    return hooked(module) or (forward is not None and not ours)


# Constant for a trace: it is the class's.
@constant_when_traced
@functools.cache
def _takes_final(kind: type[nn.Module]) -> bool:
    return "final" in inspect.signature(kind.forward).parameters


def _clips(made: nn.Module, frames: Frames, forward: Forward) -> Any:
    """Runs a layer without a cache."""
    given = [frames(_channels(made), n) for n in (1, 2, 3, 4)]
    return [forward(made, x) for x in given], given


def _chunks(made: nn.Module, frames: Frames, *forwards: Forward) -> Any:
    """Runs a layer over the chunks of a clip."""
    counts = (1, 2, 2, 4) if getattr(made, "mode", None) == "downsample3d" else (1, 1, 2, 4, 1)
    given = [frames(_channels(made), n) for n in counts]
    results, kept, slots = [], [], [None] * 6
    for i, (x, forward) in enumerate(zip(given, itertools.cycle(forwards), strict=False)):
        # Hosts pass one list of slots through all layers, so a layer's first one is anywhere.
        index, final = [1], {"final": i == len(given) - 1} if _takes_final(type(made)) else {}
        results.append(forward(made, x, slots, index, **final))
        kept.append((index[0], [_kind(slot) for slot in slots]))
    return results, kept, given


def _channels(layer: Any) -> int:
    if hasattr(layer, "residual"):
        return layer.residual[2].in_channels
    return (layer.conv1 if hasattr(layer, "conv1") else layer.resample[1]).in_channels


def _conv(made: Any, frames: Frames, forward: Forward) -> Any:
    """Runs a causal convolution with slots of one and two frames; ComfyUI's may take them itself."""
    takes_list = "cache_list" in inspect.signature(type(made).forward).parameters
    x, past = (frames(made.in_channels, count) for count in (4, 2))
    three, start = x[:, :, :3], x[:, :, : max(1, made.kernel_size[0] - paddings(made)[0])]
    results, kept = [], []
    for clip, slot in (
        *((clip, None) for clip in (start, three, x)),
        *((three, past[:, :, :1]), (three, past), (start, past), (x, past)),
    ):
        results.append(forward(made, clip, slot))
        if takes_list:
            slots = [None, slot]
            results.append(forward(made, clip, cache_list=slots, cache_idx=1))
            kept.append([_kind(slot) for slot in slots])
    return results, kept, x, past


def _trials(runs: Sequence[Callable[..., Any]], module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of all precisions, in the mode that the module is in and always in evaluation.

    The run over chunks is also tried with both codes in turn.
    """
    for dtype, tolerance, batch in _PRECISIONS:
        made = twin(module, dtype).train(module.training and dtype == torch.float64)
        frames = partial(_frames, dtype=dtype, batch=batch)
        for run in runs:
            yield Trial(partial(run, made, frames), tolerance, in_turn=run is _chunks and dtype == torch.float64)


def _frames(channels: int, count: int, dtype: torch.dtype, batch: int) -> Tensor:
    """Returns random ``[B, C, count, 4, 8]`` whose channels lie last in memory."""
    generator = torch.Generator().manual_seed(count)
    frames = torch.randn(2, count, 4, len(_MAGNITUDES), channels, generator=generator, dtype=torch.float64)
    frames[1] *= torch.tensor(_MAGNITUDES, dtype=torch.float64)[:, None]
    return frames[:batch].to(dtype).permute(0, 4, 1, 2, 3)


def _kind(slot: Any) -> Any:
    return "frames" if isinstance(slot, Tensor) else slot


_BY = "rms_norm_silu and causal_conv3d, with norm, residual and cached frames in them"
#: Recipes for the layers, by diffusers' names and by those of the Wan repositories and ComfyUI.
RECIPES = tuple(
    Recipe(prefix + host, "vae", by, forward, probe=partial(_trials, runs))
    for prefix in ("Wan", "")
    for host, by, forward, runs in (
        ("ResidualBlock", _BY, _residual_forward, (_clips, _chunks)),
        ("Resample", "upsample_conv2d and causal_conv3d", _resample_forward, (_clips, _chunks)),
        ("CausalConv3d", "causal_conv3d", _conv_forward, (_conv,)),
    )
)
