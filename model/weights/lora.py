"""LoRAs on a DiT: merged for good, merged while a checkpoint is read, or applied so that they can be taken off again.

Each addition is ``W += strength * (alpha / r) * up @ down`` (or ``strength * diff``, see
``model/weights/lora_files.py``). Those of all LoRAs are summed with the weight in float32 and rounded to its dtype
once, so that neither their order nor the number of LoRAs costs accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import TracebackType
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from model.dit.model import WanDiT
from model.errors import InputError
from model.weights.lora_files import LARGEST_SCALE, Delta, LoRAFile, open_lora

_LISTED = 20
#: Models with LoRAs that can still be taken off.
_APPLIED: WeakKeyDictionary[WanDiT, ref[AppliedLoRAs]] = WeakKeyDictionary()


@dataclass(frozen=True)
class LoRA:
    """A LoRA file and the strength with which it is added.

    Args:
        path: a file, or a directory that holds one (PEFT's ``adapter_model.safetensors`` with its configuration).
        strength: factor of everything that it adds; 0 adds nothing, and it may be negative.
        expert: 1 or 2: the expert of Wan2.2 A14B whose tensors are taken, where the file holds tensors for both.

    Raises:
        InputError: the strength is no finite number that float32 can hold, or there is no such expert.
    """

    path: str | Path
    strength: float = 1.0
    expert: int = 1

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        if self.expert not in (1, 2):
            raise InputError(f"expert: expected 1 or 2, got {self.expert}")


class LoRAMismatch(InputError):
    """An error for LoRAs that do not fit a model. ``problems`` has all faults; the message lists the first 20."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        listed = "; ".join(self.problems[:_LISTED])
        more = len(self.problems) - _LISTED
        super().__init__(
            f"lora: {len(self.problems)} keys do not fit the model: {listed}{f'; and {more} more' if more > 0 else ''}"
        )


class LoRASet:
    """Several LoRAs, found to fit a model with these parameters: ``{name: shape}``.

    Raises:
        LoRAMismatch: some key of some file matches no parameter, or has another shape.
        InputError: a file cannot be read, is another kind of adapter, or has a scale that float32 cannot hold.
    """

    def __init__(self, loras: Sequence[LoRA], shapes: Mapping[str, tuple[int, ...]]):
        self.loras = tuple(loras)
        self._deltas: dict[str, list[tuple[int, Delta]]] = {}
        problems = []
        for i, lora in enumerate(self.loras):
            file = open_lora(Path(lora.path), lora.expert)
            problems += misfits(file, shapes)
            for name, deltas in file.deltas.items():
                self._deltas.setdefault(name, []).extend((i, delta) for delta in deltas)
        if problems:
            raise LoRAMismatch(problems)
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
                        f"lora: {self.loras[i].path}: strength {strengths[i]} times the scale {delta.scale:g} of"
                        f" {delta.keys[0]} is more than float32 can hold"
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that something is added to."""
        return tuple(self._deltas)

    def __contains__(self, name: str) -> bool:
        return name in self._deltas

    def add_to(self, name: str, total: Tensor, strengths: Sequence[float] | None = None) -> Tensor:
        """Adds everything for the parameter ``name`` to ``total`` (contiguous, float32 or wider), in place."""
        strengths = strengths or [lora.strength for lora in self.loras]
        for i, delta in self._deltas.get(name, ()):
            delta.add_to(total, strengths[i])
        return total


def misfits(file: LoRAFile, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns every key of a LoRA file that does not fit a model with these parameters, with the reason."""
    where = file.path.name
    problems = [f"{where}: {key}" for key in file.unmatched]
    for name, deltas in file.deltas.items():
        for delta in deltas:
            if name not in shapes:
                problems += [f"{where}: {key} (the model has no {name})" for key in delta.keys]
            else:
                problems += [f"{where}: {misfit}" for misfit in delta.misfits(shapes[name])]
    return problems


def merge_loras(dit: WanDiT, loras: Sequence[LoRA]) -> None:
    """Merges LoRAs into a model's weights, in place and for good.

    Nothing is changed unless everything fits. Each parameter is summed in float32 and rounded once; the peak is one
    parameter in float32. A :class:`~model.csg.denoiser.Denoiser` made before keeps text keys and modulations of the
    former weights: make a new one.

    Raises:
        LoRAMismatch, InputError: as for :class:`LoRASet`; or LoRAs are applied to this model already.
    """
    _check_free(dit)
    chosen = LoRASet(loras, _shapes(dit))
    with torch.no_grad():
        parameters = dict(dit.named_parameters())
        for name in chosen.names:
            parameters[name].copy_(chosen.add_to(name, _wide(parameters[name])))


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
        _APPLIED[dit] = ref(self)
        try:
            self._write(self._strengths)
        except BaseException:
            self.remove()
            raise

    @property
    def strengths(self) -> tuple[float, ...]:
        """The present strengths, in the order of the LoRAs."""
        return self._strengths

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Merges again, from the weights as they were, with other strengths: one for each LoRA.

        If that fails half-way, the former strengths are merged again; if their files cannot be read any more either,
        the LoRAs are taken off. Either way the weights are those of one state.

        Raises:
            InputError: not as many numbers, one is not finite or beyond float32, or the LoRAs have been removed.
        """
        self._check_on()
        if len(strengths) != len(self._strengths):
            raise InputError(f"strengths: expected {len(self._strengths)}, one for each LoRA, got {len(strengths)}")
        self._loras.check_strengths(strengths)
        try:
            self._write(strengths)
        except BaseException:
            self._restore()
            raise
        self._strengths = tuple(strengths)

    def _restore(self) -> None:
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
        del _APPLIED[self.dit]

    def __enter__(self) -> AppliedLoRAs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_on():
            self.remove()

    def _is_on(self) -> bool:
        applied = _APPLIED.get(self.dit)
        return applied is not None and applied() is self

    def _check_on(self) -> None:
        if not self._is_on():
            raise InputError("loras: these have been removed from the model")

    def _write(self, strengths: Sequence[float]) -> None:
        with torch.no_grad():
            for name, parameter in self.dit.named_parameters():
                if name in self._kept:
                    total = _wide(self._kept[name].to(parameter.device))
                    parameter.copy_(self._loras.add_to(name, total, strengths))


def _shapes(dit: WanDiT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in dit.named_parameters()}


def _wide(parameter: Tensor) -> Tensor:
    """Returns a contiguous copy in float32, or wider where the parameter is."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(wide, copy=True, memory_format=torch.contiguous_format)


def _check_free(dit: WanDiT) -> None:
    if not dit.owns_weights:
        raise InputError("loras: this model's layers are streamed or in 8 bits; give load_dit the LoRAs instead")
    applied = _APPLIED.get(dit)
    if applied is not None and applied() is not None:
        raise InputError("loras: some are applied to this model already; remove() them first, or give all in one call")


def _check_strength(strength: float) -> None:
    if isinstance(strength, bool) or not isinstance(strength, Real):
        raise InputError(f"strength: expected a number, got {strength!r}")
    # NaN is not smaller than anything.
    if not abs(strength) < math.inf:
        raise InputError(f"strength: expected a finite number, got {strength}")
    if abs(strength) > LARGEST_SCALE:
        raise InputError(f"strength: expected a number that float32 can hold, got {strength}")
