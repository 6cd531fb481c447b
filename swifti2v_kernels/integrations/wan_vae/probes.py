"""Trials of the replacements (:mod:`~swifti2v_kernels.integrations.probing`).

A layer is tried without a cache, and over four chunks of a clip. It must leave the slots and the index as the host's
does, and either code must go on from the other's slots, since a call may be the host's own at any time.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..probing import Forward, Probe, Trial, twin
from .layers import time_padding

#: dtypes, tolerances and entries of the batch. float64 shows any other computation, the others what a host does with
#: dtypes.
_PRECISIONS = ((torch.float64, 1e-5, 2), (torch.float32, 1e-4, 1), (torch.bfloat16, 0.1, 2))
#: Magnitudes of a row's pixels in every second entry: an epsilon shows in small ones alone.
_MAGNITUDES = (1.0, 1e-3, 1e-6, 1e-9, 0.0, 1.0, 1.0, 1.0)

#: Gives new frames of a number of channels and a count, equal ones for equal numbers.
Frames = Callable[[int, int], Tensor]


def _clips(made: nn.Module, frames: Frames, forward: Forward) -> Any:
    """Runs a layer without a cache."""
    given = [frames(_channels(made), n) for n in (1, 2, 3, 4)]
    return [forward(made, x) for x in given], given


def _chunks(made: nn.Module, frames: Frames, *forwards: Forward) -> Any:
    """Runs a layer over the chunks of a clip."""
    counts = (1, 2, 2, 4) if getattr(made, "mode", None) == "downsample3d" else (1, 1, 2, 4, 1)
    takes_final = "final" in inspect.signature(type(made).forward).parameters
    given = [frames(_channels(made), n) for n in counts]
    results, kept, slots = [], [], [None] * 6
    for i, (x, forward) in enumerate(zip(given, itertools.cycle(forwards), strict=False)):
        # Hosts pass one list of slots through all layers, so a layer's first one is anywhere.
        index, final = [1], {"final": i == len(given) - 1} if takes_final else {}
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
    three, start = x[:, :, :3], x[:, :, : max(1, made.kernel_size[0] - time_padding(made))]
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


def _norm(made: Any, frames: Frames, forward: Forward) -> Any:
    """Runs a norm over channels, of frames or of single ones as its weight says."""
    x = frames(made.gamma.numel(), 2)
    given = [x, x[:, :, :1]] if made.gamma.ndim == 4 else [x.transpose(1, 2).flatten(0, 1), x[:1, :, 0]]
    return [forward(made, x) for x in given], x


def _trials(runs: Sequence[Callable[..., Any]], module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of all precisions, in the mode that the module is in and always in evaluation.

    The run over chunks is also tried with both codes in turn.
    """
    for dtype, tolerance, batch in _PRECISIONS:
        made = twin(module, dtype).train(module.training and dtype == torch.float64)
        frames = partial(_frames, dtype=dtype, batch=batch)
        for run in runs:
            yield Trial(partial(run, made, frames), tolerance, in_turn=run is _chunks and dtype == torch.float64)


#: The probes of a layer with a cache, of a causal convolution, and of a norm.
layer_probe: Probe = partial(_trials, (_clips, _chunks))
conv_probe: Probe = partial(_trials, (_conv,))
norm_probe: Probe = partial(_trials, (_norm,))


def _frames(channels: int, count: int, dtype: torch.dtype, batch: int) -> Tensor:
    """Returns random ``[B, C, count, 4, 8]`` whose channels lie last in memory."""
    generator = torch.Generator().manual_seed(count)
    frames = torch.randn(2, count, 4, len(_MAGNITUDES), channels, generator=generator, dtype=torch.float64)
    frames[1] *= torch.tensor(_MAGNITUDES, dtype=torch.float64)[:, None]
    return frames[:batch].to(dtype).permute(0, 4, 1, 2, 3)


def _kind(slot: Any) -> Any:
    return "frames" if isinstance(slot, Tensor) else slot
