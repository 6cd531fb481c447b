"""Trials of the replacements for modules that only their names tell (:mod:`~swifti2v_kernels.integrations.probing`).

A layer is tried without a cache, and over four chunks of a clip. It must leave the slots and the index as the host's
does, and either code must go on from the other's slots, since a call may be the host's own at any time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..probing import CHANGES, RETURNS, Forward, Outcome, Trial, twin
from .layers import time_padding

#: dtypes, tolerances and entries of the batch. float64 shows any other computation, the others what a host does with
#: dtypes.
_PRECISIONS = ((torch.float64, 1e-5, 2), (torch.float32, 1e-4, 1), (torch.bfloat16, 0.1, 2))
_CACHE = "its cache is kept in another way"
#: Magnitudes of a row's pixels in every second entry: an epsilon shows in small ones alone.
_MAGNITUDES = (1.0, 1e-3, 1e-6, 1e-9, 0.0, 1.0, 1.0, 1.0)


def layer_probe(channels: Callable[[Any], int]) -> Callable[[nn.Module, Forward], Iterator[Trial]]:
    """Returns the probe of a layer with a cache; ``channels`` gives the number of channels that it takes.

    The layer is tried in the mode that it is in, training or evaluation, and always in evaluation.
    """

    def probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
        halves = getattr(module, "mode", None) == "downsample3d"
        counts = (1, 2, 2, 4) if halves else (1, 1, 2, 4, 1)
        takes_final = "final" in inspect.signature(type(module).forward).parameters
        for made, tolerance, frames in _twins(module):
            wholes, chunks = ([frames(channels(made), n) for n in ns] for ns in ((1, 2, 3, 4), counts))

            def whole(call: Forward, made: Any = made, clips: Any = wholes) -> Outcome:
                mine = [x.clone() for x in clips]
                return {RETURNS: [call(made, x) for x in mine], CHANGES: mine}

            def run(*forwards: Forward, made: Any = made, chunks: Any = chunks) -> Outcome:
                mine = [x.clone() for x in chunks]
                results, kept, slots = [], [], [None] * 6
                for i, chunk in enumerate(mine):
                    # Hosts pass one list of slots through all layers, so a layer's first one is anywhere.
                    index, last = [1], i == len(mine) - 1
                    final = {"final": last} if takes_final else {}
                    results.append(forwards[i % len(forwards)](made, chunk, slots, index, **final))
                    kept.append((index[0], [_kind(slot) for slot in slots]))
                return {RETURNS: results, _CACHE: kept, CHANGES: mine}

            host = type(module).forward
            yield Trial(partial(whole, host), [partial(whole, forward)], tolerance)
            mixtures = ((forward,), (forward, host), (host, forward))[: 3 if tolerance == _PRECISIONS[0][1] else 1]
            yield Trial(partial(run, host), [partial(run, *forwards) for forwards in mixtures], tolerance)

    return probe


def conv_probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of a causal convolution, with slots of one and two frames; ComfyUI's may take them itself."""
    takes_list = "cache_list" in inspect.signature(type(module).forward).parameters
    few = max(1, module.kernel_size[0] - time_padding(module))
    for made, tolerance, frames in _twins(module):
        x, past = (frames(made.in_channels, count) for count in (4, 2))

        def run(call: Forward, made: Any = made, x: Tensor = x, past: Tensor = past) -> Outcome:
            results, kept = [], []
            x, past = x.clone(), past.clone()
            three, start = x[:, :, :3], x[:, :, :few]
            for frames, slot in (
                *((frames, None) for frames in (start, three, x)),
                *((three, past[:, :, :1]), (three, past), (start, past), (x, past)),
            ):
                results.append(call(made, frames, slot))
                if takes_list:
                    slots = [None, slot]
                    results.append(call(made, frames, cache_list=slots, cache_idx=1))
                    kept.append([_kind(slot) for slot in slots])
            return {RETURNS: results, _CACHE: kept, CHANGES: [x, past]}

        yield Trial(partial(run, type(module).forward), [partial(run, forward)], tolerance)


def norm_probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of a norm over channels, of frames or of single ones as its weight says."""
    for made, tolerance, frames in _twins(module):
        x = frames(made.gamma.numel(), 2)
        given = [x, x[:, :, :1]] if module.gamma.ndim == 4 else [x.transpose(1, 2).flatten(0, 1), x[:1, :, 0]]

        def run(call: Forward, made: Any = made, given: Any = given) -> Outcome:
            mine = [x.clone() for x in given]
            return {RETURNS: [call(made, x) for x in mine], CHANGES: mine}

        yield Trial(partial(run, type(module).forward), [partial(run, forward)], tolerance)


def _twins(module: nn.Module) -> Iterator[tuple[Any, float, Callable[[int, int], Tensor]]]:
    """Yields twins of each precision, with the tolerance, and what makes frames of channels and a count for them."""
    for dtype, tolerance, batch in _PRECISIONS:
        made = twin(module, dtype).train(module.training and dtype == torch.float64)
        yield made, tolerance, partial(_frames, dtype=dtype, batch=batch)


def _frames(channels: int, count: int, dtype: torch.dtype, batch: int) -> Tensor:
    """Returns random ``[B, C, count, 4, 8]`` whose channels lie last in memory."""
    generator = torch.Generator().manual_seed(count)
    frames = torch.randn(2, count, 4, len(_MAGNITUDES), channels, generator=generator, dtype=torch.float64)
    frames[1] *= torch.tensor(_MAGNITUDES, dtype=torch.float64)[:, None]
    return frames[:batch].to(dtype).permute(0, 4, 1, 2, 3)


def _kind(slot: Any) -> Any:
    return "frames" if isinstance(slot, Tensor) else slot
