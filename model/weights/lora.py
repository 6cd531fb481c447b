"""LoRAs on a DiT: merged for good, merged while a checkpoint is read, or applied so that they can be taken off again.

Each addition is ``W += strength * (alpha / r) * up @ down`` (or ``strength * diff``, see
``model/weights/lora_files.py``). Those of all LoRAs are summed with the weight in float32 and rounded to its dtype
once, so that neither their order nor the number of LoRAs costs accuracy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import TracebackType
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from model.dit.model import WanDiT
from model.errors import InputError
from model.weights.lora_files import LARGEST_SCALE, Delta, LoRAFile, open_lora
from model.weights.scaled import check_holds, largest

_LISTED = 20
_LISTED_IN_WARNING = 3
#: LoRAs that can still be taken off, by the id of their model, which they keep alive.
_APPLIED: WeakValueDictionary[int, AppliedLoRAs] = WeakValueDictionary()


@dataclass(frozen=True)
class LoRA:
    """A LoRA file and the strength with which it is added.

    Args:
        path: a file, or a directory that holds one (PEFT's ``adapter_model.safetensors`` with its configuration).
        strength: factor of everything that it adds; 0 adds nothing, and it may be negative.
        expert: 1 or 2: the expert of Wan2.2 A14B whose tensors are taken, where the file holds tensors for both.
        strict: a key that the model has no place for is an error. Else such keys are left out with a
            :class:`LoRAWarning`, as long as at least half of the file fits (see :class:`LoRAFit`).

    Raises:
        InputError: the strength is no finite number that float32 can hold, or there is no such expert.
    """

    path: str | Path
    strength: float = 1.0
    expert: int = 1
    strict: bool = False

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        if self.expert not in (1, 2):
            raise InputError(f"expert: expected 1 or 2, got {self.expert}")


class LoRAMismatch(InputError):
    """An error for a LoRA that does not fit a model. ``problems`` has all its keys that do not, with the reasons."""

    def __init__(self, message: str, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__(message)


class LoRAWarning(UserWarning):
    """A warning of keys of a LoRA file that are left out, since the model has no place for them."""


class LoRAFit:
    """The part of a LoRA file that fits a model with the parameters ``shapes``, ``{name: shape}``; None: any Wan DiT.

    A pair of factors and a whole difference is one addition; a tensor that is part of none (a factor or an alpha
    alone, an unknown key) counts as one too. Those that the model has no place for are left out if there are at most
    as many of them as of those that fit. A file is refused if there are more; if some are to be left out and ``strict``
    is given; and always if one has another shape than its parameter, or cannot be read. A patch embedding's addition
    may be for the latents' channels alone, which come first: a T2V LoRA then fits an I2V model.

    Attributes:
        additions: those that fit, by parameter.
        problem: why the file is refused, one line; None if it is not.
        problems: the keys that do not fit, with the reasons.
        warning: what is left out, one line; None if nothing is.
    """

    def __init__(self, file: LoRAFile, shapes: Mapping[str, tuple[int, ...]] | None, *, strict: bool, model: str):
        self.additions: dict[str, list[Delta]] = {}
        self.problem = self.warning = None
        faults, left = list(file.faults), list(file.unmatched)
        for name, deltas in file.deltas.items():
            for delta in deltas:
                if shapes is not None and name not in shapes:
                    left.append(tuple(f"{key} (the model has no {name})" for key in delta.keys))
                    continue
                misfits = [] if shapes is None else _misfits(name, delta, shapes)
                faults += misfits
                if not misfits:
                    self.additions.setdefault(name, []).append(delta)
        fitting = sum(map(len, self.additions.values()))
        keys = [key for addition in left for key in addition]
        self.problems = (*faults, *keys)
        if faults or len(left) > fitting or (strict and left):
            asked = "all must, as it is strict" if strict else "at least half must"
            share = "" if faults else f" ({fitting} of {fitting + len(left)} pairs and differences do; {asked})"
            self.problem = f"{len(self.problems)} keys do not fit {model}{share}: {_listed(self.problems, _LISTED)}"
        elif left:
            self.warning = (
                f"{len(left)} of {fitting + len(left)} pairs and differences are left out:"
                f" {_listed(keys, _LISTED_IN_WARNING)}"
            )


class LoRASet:
    """Several LoRAs, found to fit a model with these parameters: ``{name: shape}``.

    Warns with a :class:`LoRAWarning` for each file of which keys are left out.

    Raises:
        LoRAMismatch: a file does not fit (:class:`LoRAFit`).
        InputError: a file cannot be read, is another kind of adapter, or has a scale that float32 cannot hold.
    """

    def __init__(self, loras: Sequence[LoRA], shapes: Mapping[str, tuple[int, ...]]):
        self.loras = tuple(loras)
        self._deltas: dict[str, list[tuple[int, Delta]]] = {}
        self._finite: dict[str, tuple[torch.dtype, tuple[float, ...]]] = {}
        for i, lora in enumerate(self.loras):
            file = open_lora(Path(lora.path), lora.expert)
            fit = LoRAFit(file, shapes, strict=lora.strict, model="the model")
            if fit.problem is not None:
                raise LoRAMismatch(f"lora: {file.path}: {fit.problem}", fit.problems)
            if fit.warning is not None:
                warnings.warn(f"lora: {file.path}: {fit.warning}", LoRAWarning, stacklevel=3)
            for name, deltas in fit.additions.items():
                self._deltas.setdefault(name, []).extend((i, delta) for delta in deltas)
        self.check_strengths([lora.strength for lora in self.loras])

    def check_strengths(self, strengths: Sequence[float]) -> None:
        """Checks that these strengths, one for each LoRA, can be multiplied by the scales in the files.

        Raises:
            InputError: a strength is no finite number, or a product is one that float32 cannot hold.
        """
        for strength in strengths:
            _check_strength(strength)
        for deltas in self._deltas.values():
            for i, delta in deltas:
                if abs(strengths[i] * delta.scale) > LARGEST_SCALE:
                    raise InputError(
                        f"lora: {delta.path}: strength {strengths[i]} times the scale {delta.scale:g} of"
                        f" {delta.keys[0]} is more than float32 can hold"
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that something is added to."""
        return tuple(self._deltas)

    def __contains__(self, name: str) -> bool:
        return name in self._deltas

    def add_to(self, name: str, total: Tensor, dtype: torch.dtype, strengths: Sequence[float] | None = None) -> Tensor:
        """Adds everything for the parameter ``name`` to ``total`` (contiguous, float32 or wider), in place.

        Returns:
            The sum, rounded to ``dtype``.

        Raises:
            InputError: a factor or a difference is not finite, or the sum is more than ``dtype`` can hold.
        """
        strengths = tuple(strengths or [lora.strength for lora in self.loras])
        for i, delta in self._deltas[name]:
            delta.add_to(total, strengths[i])
        # Layers of files are read again in every pass; what was finite once is finite again.
        if self._finite.get(name) != (dtype, strengths):
            added = (f"{delta.path}: {delta.keys[0]} at strength {strengths[i]}" for i, delta in self._deltas[name])
            called = f"lora: {', '.join(added)}: {name} then"
            check_holds(dtype, largest(total, called), called)
            self._finite[name] = dtype, strengths
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


def _listed(keys: Sequence[str], count: int) -> str:
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
        LoRAMismatch, InputError: as for :class:`LoRASet`; a number is not finite or beyond what the weight's dtype can
            hold; or LoRAs are applied to this model already.
    """
    _check_free(dit)
    chosen = LoRASet(loras, _shapes(dit))
    with torch.no_grad():
        parameters = {name: parameter for name, parameter in dit.named_parameters() if name in chosen}
        for name, parameter in parameters.items():
            chosen.add_to(name, _wide(parameter), parameter.dtype)
        for name, parameter in parameters.items():
            parameter.copy_(chosen.add_to(name, _wide(parameter), parameter.dtype))


def apply_loras(dit: WanDiT, loras: Sequence[LoRA]) -> AppliedLoRAs:
    """Merges LoRAs as :func:`merge_loras` does, but strengths can be changed and the LoRAs taken off again.

    The steps of :class:`~model.dit.model.WanDiT` read weights in fused matmuls and in captured CUDA graphs, where no
    hook of a module is called, and matmuls of its own for each LoRA would cost every step two more multiplications
    and a buffer outside the planned workspace. So the weights are merged in place here as well, at the addresses that
    graphs know, and the former weights are kept in host memory: as many bytes as the parameters that the LoRAs touch
    (for all attention and feed-forward weights of a 14B in bfloat16 about 28 GB). Steps then cost what they cost
    without LoRAs.

    Raises:
        LoRAMismatch, InputError: as for :func:`merge_loras`.
    """
    _check_free(dit)
    return AppliedLoRAs(dit, LoRASet(loras, _shapes(dit)))


class AppliedLoRAs:
    """The LoRAs on a model, made by :func:`apply_loras`; as a context manager it takes them off at the end.

    The files must stay where they are, since changed strengths read them again. A
    :class:`~model.csg.denoiser.Denoiser` made before a change keeps text keys and modulations of the former weights.
    """

    def __init__(self, dit: WanDiT, loras: LoRASet):
        self.dit, self._loras = dit, loras
        parameters = dict(dit.named_parameters())
        self._kept = {name: parameters[name].detach().to("cpu", copy=True) for name in loras.names}
        self._strengths = tuple(lora.strength for lora in loras.loras)
        _APPLIED[id(dit)] = self
        self._write_or_remove()

    @property
    def strengths(self) -> tuple[float, ...]:
        """The present strengths, in the order of the LoRAs."""
        return self._strengths

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Merges again, from the weights as they were, with other strengths: one for each LoRA.

        If that fails half-way, the former strengths are merged again; if their files cannot be read any more either,
        the LoRAs are taken off. Either way the weights are those of one state.

        Raises:
            InputError: not as many numbers, one is not finite or beyond float32, a weight would be beyond its dtype, or
                the LoRAs have been removed.
        """
        self._check_on()
        if len(strengths) != len(self._strengths):
            raise InputError(f"strengths: expected {len(self._strengths)}, one for each LoRA, got {len(strengths)}")
        self._loras.check_strengths(strengths)
        try:
            self._write(strengths)
        except BaseException:
            self._write_or_remove()
            raise
        self._strengths = tuple(strengths)

    def _write_or_remove(self) -> None:
        try:
            self._write(self._strengths)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Puts the former weights back, bit for bit.

        Raises:
            InputError: they have been put back already.
        """
        self._check_on()
        with torch.no_grad():
            for name, parameter in self.dit.named_parameters():
                if name in self._kept:
                    parameter.copy_(self._kept[name])
        self._kept.clear()
        del _APPLIED[id(self.dit)]

    def __enter__(self) -> AppliedLoRAs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_on():
            self.remove()

    def _is_on(self) -> bool:
        return _APPLIED.get(id(self.dit)) is self

    def _check_on(self) -> None:
        if not self._is_on():
            raise InputError("loras: these have been removed from the model")

    def _write(self, strengths: Sequence[float]) -> None:
        with torch.no_grad():
            for name, parameter in self.dit.named_parameters():
                if name in self._kept:
                    total = _wide(self._kept[name].to(parameter.device))
                    parameter.copy_(self._loras.add_to(name, total, parameter.dtype, strengths))


def _shapes(dit: WanDiT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in dit.named_parameters()}


def _wide(parameter: Tensor) -> Tensor:
    """Returns a contiguous copy in float32, or wider where the parameter is."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(wide, copy=True, memory_format=torch.contiguous_format)


def _check_free(dit: WanDiT) -> None:
    if not dit.owns_weights:
        raise InputError("loras: this model's layers are streamed or in 8 bits; give load_dit the LoRAs instead")
    if id(dit) in _APPLIED:
        raise InputError("loras: some are applied to this model already; remove() them first, or give all in one call")


def _check_strength(strength: float) -> None:
    if isinstance(strength, bool) or not isinstance(strength, Real):
        raise InputError(f"strength: expected a number, got {strength!r}")
    # NaN is not smaller than anything.
    if not abs(strength) < math.inf:
        raise InputError(f"strength: expected a finite number, got {strength}")
    if abs(strength) > LARGEST_SCALE:
        raise InputError(f"strength: expected a number that float32 can hold, got {strength}")
