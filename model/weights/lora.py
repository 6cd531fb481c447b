"""LoRAs on a DiT: merged into its weights, or while a checkpoint is read.

Each addition is ``W += strength * (alpha / r) * up @ down`` (or ``strength * diff``, see
``model/weights/lora_files.py``). Those of all LoRAs are summed with the weight in float32 and rounded to its dtype
once, so that neither their order nor the number of LoRAs costs accuracy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from model.dit.model import WanDiT
from model.errors import InputError
from model.weights.lora_files import LARGEST_SCALE, Delta, LoRAFile, open_lora
from model.weights.scaled import check_holds, largest

_LISTED = 20
_LISTED_IN_WARNING = 3


@dataclass(frozen=True)
class LoRA:
    """A LoRA file and the strength with which it is added.

    Args:
        path: a file, or a directory that holds one (PEFT's ``adapter_model.safetensors`` with its configuration).
        strength: factor of everything that it adds; 0 adds nothing, and it may be negative.
        expert: 1 or 2: the expert of Wan2.2 A14B whose tensors are taken, where the file holds tensors for both.

    Keys that the model has no place for are left out with a :class:`LoRAWarning`, as long as at least half of the file
    fits (see :class:`LoRAFit`).

    Raises:
        InputError: the strength is no number that float32 can hold, or there is no such expert.
    """

    path: str | Path
    strength: float = 1.0
    expert: int = 1

    def __post_init__(self) -> None:
        strength = self.strength
        # NaN is not smaller than anything.
        if isinstance(strength, bool) or not isinstance(strength, Real) or not abs(strength) <= LARGEST_SCALE:
            raise InputError(f"strength: expected a number that float32 can hold, got {strength!r}")
        if self.expert not in (1, 2):
            raise InputError(f"expert: expected 1 or 2, got {self.expert}")


class LoRAWarning(UserWarning):
    """A warning of keys of a LoRA file that are left out, since the model has no place for them."""


class LoRAFit:
    """The part of a LoRA file that fits a model with the parameters ``shapes``, ``{name: shape}``; None: any Wan DiT.

    A pair of factors and a whole difference is one addition; a tensor that is part of none (a factor or an alpha
    alone, an unknown key) counts as one too. Those that the model has no place for are left out if there are at most
    as many of them as of those that fit. A file is refused if there are more, and always if one has another shape than
    its parameter. A patch embedding's addition may be for the latents' channels alone, which come first: a T2V LoRA
    then fits an I2V model.

    Attributes:
        additions: those that fit, by parameter.
        problem: why the file is refused, one line; None if it is not.
        warning: what is left out, one line; None if nothing is.
    """

    def __init__(self, file: LoRAFile, shapes: Mapping[str, tuple[int, ...]] | None, model: str):
        self.additions: dict[str, list[Delta]] = {}
        self.problem = self.warning = None
        misfits, left = [], list(file.unmatched)
        for name, deltas in file.deltas.items():
            for delta in deltas:
                if shapes is not None and name not in shapes:
                    left.append(tuple(f"{key} (the model has no {name})" for key in delta.keys))
                    continue
                found = [] if shapes is None else _misfits(name, delta, shapes)
                misfits += found
                if not found:
                    self.additions.setdefault(name, []).append(delta)
        fitting = sum(map(len, self.additions.values()))
        keys = [key for addition in left for key in addition]
        problems = [*misfits, *keys]
        if misfits or len(left) > fitting:
            share = f" ({fitting} of {fitting + len(left)} pairs and differences do; at least half must)"
            fault = f"{len(problems)} keys do not fit {model}{'' if misfits else share}"
            self.problem = f"{fault}: {listed(problems)}"
        elif left:
            self.warning = (
                f"{len(left)} of {fitting + len(left)} pairs and differences are left out:"
                f" {listed(keys, _LISTED_IN_WARNING)}"
            )


class LoRASet:
    """Several LoRAs, found to fit a model with these parameters: ``{name: shape}``.

    Warns with a :class:`LoRAWarning` for each file of which keys are left out.

    Raises:
        InputError: a file does not fit (:class:`LoRAFit`), cannot be read, is another kind of adapter, or has a scale
            that float32 cannot hold, times its strength.
    """

    def __init__(self, loras: Sequence[LoRA], shapes: Mapping[str, tuple[int, ...]]):
        self._deltas: dict[str, list[tuple[float, Delta]]] = {}
        self._finite: set[tuple[str, torch.dtype]] = set()
        for lora in loras:
            file = open_lora(Path(lora.path), lora.expert)
            fit = LoRAFit(file, shapes, "the model")
            if fit.problem is not None:
                raise InputError(f"lora: {file.path}: {fit.problem}")
            if fit.warning is not None:
                warnings.warn(f"lora: {file.path}: {fit.warning}", LoRAWarning, stacklevel=3)
            for name, deltas in fit.additions.items():
                self._deltas.setdefault(name, []).extend((lora.strength, delta) for delta in deltas)
        for strength, delta in chain.from_iterable(self._deltas.values()):
            if abs(strength * delta.scale) > LARGEST_SCALE:
                raise InputError(
                    f"lora: {delta.path}: strength {strength} times the scale {delta.scale:g} of {delta.keys[0]} is"
                    " more than float32 can hold"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._deltas

    def add_to(self, name: str, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Adds everything for the parameter ``name`` to ``total`` (contiguous, float32 or wider), in place.

        Returns:
            The sum, rounded to ``dtype``.

        Raises:
            InputError: a factor or a difference is not finite, or the sum is more than ``dtype`` can hold.
        """
        for strength, delta in self._deltas[name]:
            delta.add_to(total, strength)
        # Layers of files are read again in every pass; what was finite once is finite again.
        if (name, dtype) not in self._finite:
            added = (f"{delta.path}: {delta.keys[0]} at strength {strength}" for strength, delta in self._deltas[name])
            called = f"lora: {', '.join(added)}: {name} then"
            check_holds(dtype, largest(total, called), called)
            self._finite.add((name, dtype))
        return total.to(dtype)


def _misfits(name: str, delta: Delta, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns the keys of an addition that does not fit the parameter ``name``, with the reason; none if it fits."""
    misfits = delta.misfits(shapes[name])
    if misfits and name == "patch_embedding.weight":
        out, channels, *patch = shapes[name]
        latents = shapes["proj_out.weight"][0] // math.prod(patch)
        if latents < channels and not delta.misfits((out, latents, *patch)):
            return []
    return misfits


def listed(keys: Sequence[str], count: int = _LISTED) -> str:
    """Returns the first ``count`` keys as text, and how many more there are."""
    more = len(keys) - count
    return "; ".join(keys[:count]) + (f"; and {more} more" if more > 0 else "")


def merge_loras(dit: WanDiT, loras: Sequence[LoRA]) -> None:
    """Merges LoRAs into a model's weights, in place and for good.

    Every sum is computed twice: first to see that all of them fit and are finite, before the first weight changes, and
    then to be written. Each is summed in float32 and rounded once; the peak is one parameter in float32. Only a file
    that can be read the first time and not the second leaves some weights merged and others not. A
    :class:`~model.csg.denoiser.Denoiser` made before keeps text keys and modulations of the former weights: make a new
    one.

    Raises:
        InputError: as for :class:`LoRASet`; a number is not finite or beyond what the weight's dtype can hold; or the
            model's layers are streamed or in 8 bits.
    """
    if not dit.owns_weights:
        raise InputError("loras: this model's layers are streamed or in 8 bits; give load_dit the LoRAs instead")
    chosen = LoRASet(loras, {name: tuple(parameter.shape) for name, parameter in dit.named_parameters()})
    changed = {name: parameter for name, parameter in dit.named_parameters() if name in chosen}

    def merged(name: str) -> Tensor:
        # A contiguous copy in float32, or wider where the parameter is.
        kind = torch.promote_types(changed[name].dtype, torch.float32)
        wide = changed[name].detach().to(kind, copy=True, memory_format=torch.contiguous_format)
        return chosen.add_to(name, wide, changed[name].dtype)

    for name in changed:
        merged(name)
    with torch.no_grad():
        for name, parameter in changed.items():
            parameter.copy_(merged(name))
