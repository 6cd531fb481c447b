"""LoRA files: what they add to which parameter of a DiT, under this project's names.

Three spellings of a module are read: the Wan repositories' (LightX2V, ComfyUI, DiffSynth), diffusers' (PEFT), and
either of them with underscores for some or all dots (kohya, musubi, VideoX-Fun, LyCORIS). Before it may stand the names
of whatever held the model as it was trained. A file may hold for a module, and adds by that:

=============================================  ================================================================
``lora_down`` / ``lora_A`` [r, in],            ``scale * up @ down`` to the weight; of a convolution also in its own
``lora_up`` / ``lora_B`` [out, r]              shape, [r, in, t, h, w] and [out, r, 1, 1, 1]
``lora_B.bias`` [out]                          ``scale * it`` to the bias
``alpha``                                      no addition: ``scale = alpha / r``, else 1
``diff``, ``diff_b``, ``diff_m``               itself to the weight, the bias, the modulation table
``w_norm``, ``b_norm``                         itself to the weight, the bias (LyCORIS)
=============================================  ================================================================

PEFT writes alpha into a configuration instead (``lora_adapter_metadata`` in the header, or ``adapter_config.json``
beside the file), for all modules or by patterns, and with ``use_rslora`` the scale is ``alpha / sqrt(r)``. An
``alpha`` tensor counts before it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import InputError
from model.weights.files import open_weights, read_json
from model.weights.formats import FLOATS, StoredTensor
from model.weights.keys import dit_parameter, split_prefix
from model.weights.scaled import check_holds, largest

#: The end of a key, which says what part of a module's LoRA a tensor is; PEFT may name the adapter before ``.weight``.
_PART = re.compile(
    r"\.(?:(?P<down>(?:lora_A|lora_down|lora\.down)(?:\.[^.]+)?\.weight)"
    r"|(?P<up>(?:lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight)"
    r"|(?P<up_bias>(?:lora_B|lora_up)(?:\.[^.]+)?\.bias)"
    r"|(?P<alpha>alpha)|(?P<diff>diff|w_norm)|(?P<diff_b>diff_b|b_norm)|(?P<diff_m>diff_m))$"
)
#: Adapters that are no low-rank sums: what they would add depends on more than two factors.
_REFUSED = {
    ".lora_magnitude_vector": "DoRA",
    ".dora_scale": "DoRA",
    ".hada_w1": "LoHa",
    ".lokr_w": "LoKr",
    ".lora_mid.": "LoCon with a middle factor",
}
#: Scales are factors in float32, which must be able to hold them.
LARGEST_SCALE = torch.finfo(torch.float32).max
_METADATA = "lora_adapter_metadata"
#: The names that PEFT and diffusers give a LoRA, beside which a folder may hold other files.
_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class Delta:
    """One addition to one parameter: ``scale`` times ``up @ down`` (two factors) or a tensor (one) of a file."""

    path: Path
    factors: tuple[StoredTensor, ...]
    scale: float = 1.0

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the factors, in their order."""
        return tuple(factor.key for factor in self.factors)

    @property
    def rank(self) -> int | None:
        """The inner width of ``up @ down``; None for a tensor alone."""
        return self.factors[1].shape[0] if len(self.factors) == 2 else None

    def misfits(self, shape: tuple[int, ...]) -> list[str]:
        """Returns the keys that cannot be added to a parameter of this shape, with their shapes; none if they can."""
        if len(self.factors) == 1:
            fits = _plain_shape(self.factors[0].shape) == _plain_shape(shape)
        else:
            up, down = self.factors
            columns = down.shape[0] * math.prod(shape[1:])
            fits = len(shape) > 1 and up.shape[0] == shape[0] and down.numel == columns
        if fits:
            return []
        return [f"{factor.key} ({list(factor.shape)} for a parameter of {list(shape)})" for factor in self.factors]

    def add_to(self, total: Tensor, strength: float) -> None:
        """Adds ``strength`` times the addition to ``total``, contiguous and at least float32, in place.

        An addition for fewer columns than ``total`` has is one to the first of them (see
        :class:`~model.weights.lora.LoRAFit`).

        Raises:
            InputError: a factor has NaN, infinity or numbers that ``total`` cannot hold, which is then as it was.
        """
        factors = []
        for factor in self.factors:
            stored, called = factor.read(), f"lora: {self.path}: {factor.key}"
            check_holds(total.dtype, largest(stored, called), called)
            factors.append(stored.to(total.device, total.dtype))
        rows = total.view(total.shape[0], -1)
        if len(factors) == 1:
            addition = factors[0].reshape(len(rows), -1)
            rows[:, : addition.shape[1]].add_(addition, alpha=strength * self.scale)
        else:
            up, down = (factor.flatten(1) for factor in factors)
            rows[:, : down.shape[1]].addmm_(up, down, alpha=strength * self.scale)


@dataclass(frozen=True)
class LoRAFile:
    """The additions of a LoRA file, by parameter name.

    ``unmatched`` are keys that no Wan DiT has a place for, with the reason, one tuple for an addition or a tensor that
    is part of none. ``left_out`` counts the tensors of the expert that was not asked for.
    """

    path: Path
    deltas: dict[str, list[Delta]]
    unmatched: tuple[tuple[str, ...], ...]
    left_out: int


def is_lora(keys: Collection[str]) -> bool:
    """Returns whether a file with these keys is a LoRA (or another adapter of its kind)."""
    parts = (_PART.search(key) for key in keys)
    certain = any(part is not None and part.lastgroup != "alpha" for part in parts)
    return certain or any(mark in key for key in keys for mark in _REFUSED)


def open_lora(path: Path, expert: int = 1) -> LoRAFile:
    """Opens a LoRA; reads no more of it than its header and its alphas.

    Args:
        path: a file, or a directory with ``adapter_model`` or ``pytorch_lora_weights`` or one file of tensors in it.
        expert: 1 or 2: the one whose tensors are taken where the file holds those of both experts of Wan2.2 A14B
            (``transformer.`` and ``transformer_2.``). A file without such prefixes is any expert's.

    Raises:
        InputError: there is no LoRA, none for this expert, another kind of adapter (named), or a tensor that could
            be added to no parameter at all.
    """
    known = next((path / name for name in _FILES if os.path.isfile(path / name)), path)
    try:
        files = open_weights(known)
    except InputError as error:
        raise InputError(str(error).replace("weights:", "lora:", 1)) from error
    if len(files.files) > 1:
        raise InputError(f"lora: expected one file, got {', '.join(map(str, files.files))}")
    path = files.files[0]
    for mark, kind in _REFUSED.items():
        found = [key for key in files.tensors if mark in key]
        if found:
            raise InputError(f"lora: {path} is {kind} ({found[0]}), which cannot be merged as a LoRA; expected a LoRA")
    if not is_lora(files.tensors):
        raise InputError(
            f"lora: {path} holds no LoRA; its tensors are named like {next(iter(files.tensors), 'nothing')}"
        )
    prefixes = {key: split_prefix(key)[0] for key in files.tensors}
    second = {key for key, prefix in prefixes.items() if "transformer_2." in prefix}
    first = {key for key, prefix in prefixes.items() if "transformer." in prefix}
    if expert == 1 and second and not first:
        raise InputError(f"lora: {path} is for the second expert (transformer_2.), and was given for the first")
    left_out = (first if expert == 2 else second) if second else set()
    taken = {key: tensor for key, tensor in files.tensors.items() if key not in left_out}
    config = _AdapterConfig(path, files.metadata, "transformer_2" if second and expert == 2 else "transformer")
    modules, strays = _group(path, taken)
    unmatched = [(stray,) for stray in strays]
    deltas: dict[str, list[Delta]] = defaultdict(list)
    for module, parts in modules.items():
        for name, delta in _take_deltas(path, module, parts, config):
            if name is None:
                unmatched.append(tuple(f"{key} (no parameter of a Wan DiT)" for key in delta.keys))
                continue
            # A pair and a difference of one weight may stand beside each other; two of a kind are two adapters.
            for other in deltas[name]:
                if len(other.factors) == len(delta.factors):
                    raise _several(path, other.keys[0], delta.keys[0])
            deltas[name].append(delta)
        unmatched += [(f"{part.key} (its counterpart is missing)",) for part in parts.values()]
    return LoRAFile(path, dict(deltas), tuple(unmatched), len(left_out))


def _group(path: Path, tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, dict[str, StoredTensor]], list[str]]:
    """Returns ``{module: {part: tensor}}``, and the keys that are no part of a LoRA."""
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    unmatched = []
    for key, tensor in tensors.items():
        name = split_prefix(key)[1]
        found = _PART.search(name)
        if found is None:
            unmatched.append(f"{key} (no part of a LoRA)")
            continue
        parts, part = modules[name[: found.start()]], found.lastgroup
        if part in parts:
            raise _several(path, parts[part].key, key)
        parts[part] = tensor
    return modules, unmatched


def _several(path: Path, *keys: str) -> InputError:
    return InputError(f"lora: {path} holds several adapters ({', '.join(keys)}); expected one a file")


def _take_deltas(
    path: Path, module: str, parts: dict[str, StoredTensor], config: _AdapterConfig
) -> Iterator[tuple[str | None, Delta]]:
    """Takes the parts of a module that add something, and yields their additions; the others stay in ``parts``.

    The names are those of the parameters, None for those that no Wan DiT has.
    """
    weight, bias = dit_parameter(f"{module}.weight"), dit_parameter(f"{module}.bias")
    if {"up", "down"} <= parts.keys():
        factors = _sound(path, parts.pop("up"), parts.pop("down"))
        alpha, up_bias = parts.pop("alpha", None), parts.pop("up_bias", None)
        rank = factors[1].shape[0]
        if alpha is not None:
            scale = _alpha(path, alpha) / rank
        else:
            # Names that are no parameter's are left out, and would be held against patterns at any length.
            scale = 1.0 if weight is None else config.scale(module, rank)
        if abs(scale) > LARGEST_SCALE:
            raise InputError(f"lora: {path}: {module} has the scale {scale:g}; expected one that float32 can hold")
        yield weight, Delta(path, factors, scale)
        if up_bias is not None:
            yield bias, Delta(path, _sound(path, up_bias), scale)
    # A parameter of its own may be named in full, as in ``head.modulation.diff``.
    whole = dit_parameter(module) or weight
    for kind, name in (("diff", whole), ("diff_b", bias), ("diff_m", dit_parameter(f"{module}.modulation"))):
        if kind in parts:
            yield name, Delta(path, _sound(path, parts.pop(kind)))


def _sound(path: Path, *factors: StoredTensor) -> tuple[StoredTensor, ...]:
    """Returns two factors, or a difference, if they can be added to a parameter of some shape."""
    least = len(factors)
    for factor in factors:
        if factor.dtype not in FLOATS:
            raise InputError(f"lora: {path}: {factor.key} is {factor.dtype}, expected floats")
        if len(factor.shape) < least or 0 in factor.shape:
            expected = f"expected at least {least} sizes above 0"
            raise InputError(f"lora: {path}: {factor.key} has the shape {list(factor.shape)}, {expected}")
    if least == 2 and factors[0].numel != factors[0].shape[0] * factors[1].shape[0]:
        shapes = " and ".join(f"{factor.key} {list(factor.shape)}" for factor in factors)
        raise InputError(f"lora: {path}: {shapes} have no product; expected [out, r] and [r, in]")
    return factors


def _alpha(path: Path, tensor: StoredTensor) -> float:
    try:
        return _finite(tensor.read().item())
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"lora: {path}: {tensor.key}: expected one finite number: {error}") from error


def _plain_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape without leading ones, which some files drop."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


class _AdapterConfig:
    """PEFT's description of an adapter, from which the scale comes if the file has no alphas."""

    def __init__(self, path: Path, metadata: Mapping[str, str], expert: str):
        """Reads the header, where diffusers may put the expert's name before every entry, or a file beside the LoRA."""
        self._path = path
        self._source = _METADATA if _METADATA in metadata else "adapter_config.json"
        try:
            if _METADATA in metadata:
                given = json.loads(metadata[_METADATA])
                values = {key.removeprefix(f"{expert}."): entry for key, entry in given.items()}
            else:
                values = read_json(path.parent, self._source)
            kind = "DoRA" if values.get("use_dora") else values.get("peft_type") or "LORA"
            if kind != "LORA":
                is_kind = f"{path} is {kind} ({self._source})"
                raise InputError(f"lora: {is_kind}, which cannot be merged as a LoRA; expected LORA")
            self._rooted = bool(values.get("use_rslora"))
            rank, alpha = (values.get(name) for name in ("r", "lora_alpha"))
            # Ranks by patterns are seen in the factors; one for all tells whether this is about another file.
            self._rank = None if rank is None or values.get("rank_pattern") else _finite(rank)
            self._alpha = None if alpha is None else _finite(alpha)
            self._alphas = [
                (re.compile(rf"(.*\.)?({_bounded(pattern)})$"), _finite(value))
                for pattern, value in (values.get("alpha_pattern") or {}).items()
            ]
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error) as error:
            raise InputError(f"lora: {path}: {self._source} is not understood: {error}") from error

    def scale(self, module: str, rank: int) -> float:
        """Returns the scale of a module's ``up @ down``, 1 where nothing is said.

        Raises:
            InputError: the module has another rank than this says, so that it describes another file.
        """
        alpha = next((alpha for pattern, alpha in self._alphas if pattern.match(module)), self._alpha)
        if alpha is None:
            return 1.0
        if self._rank not in (None, rank):
            raise InputError(
                f"lora: {self._path}: {module} has rank {rank}, but {self._source} says {self._rank:g}:"
                " it describes another file"
            )
        return alpha / (math.sqrt(rank) if self._rooted else rank)


def _bounded(pattern: str) -> str:
    """Returns a pattern of PEFT if it is matched against a module's name in a moment.

    Python tries every way to divide the name, so that with each repetition the time grows by the length of the name,
    and with a repeated group without bounds. Others are a ValueError.
    """
    if len(re.findall(r"[*+{?|]", pattern)) > 4 or re.search(r"\)[*+{]", pattern):
        raise ValueError(
            f"the pattern {pattern[:80]!r}: expected at most 4 repetitions and choices, and none of a group"
        )
    return pattern


def _finite(value: Any) -> float:
    """Returns a value as a number; ValueError if it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value}")
    return number
