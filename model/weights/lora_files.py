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

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError
from model.weights.files import looking_at, open_weights
from model.weights.keys import dit_name, dotted, is_dit_parameter
from model.weights.peft_config import AdapterConfig, finite
from model.weights.scaled import check_holds, largest
from model.weights.stored import FLOATS, StoredTensor

_PREFIXES = re.compile(
    r"(?:(?:base_model\.model|model|diffusion_model|transformer(?:_2)?|pipe\.dit|dit|module)\."
    r"|lora_(?:unet|transformer)_+|lycoris_+)*"
)
#: Modules that torch puts around others, also inside a model: by compiling, sharding, checkpointing.
_WRAPPERS = re.compile(r"(?:\b|(?<=_))_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]")
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
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".vera_lambda": "VeRA",
}
#: Scales are factors in float32, which must be able to hold them.
LARGEST_SCALE = torch.finfo(torch.float32).max
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

    ``faults`` are keys that no LoRA can have as they are. ``unmatched`` are those that no Wan DiT has a place for, one
    tuple for an addition or a tensor that is part of none; both are given with the reason. ``left_out`` counts the
    tensors of the expert that was not asked for.
    """

    path: Path
    deltas: dict[str, list[Delta]]
    faults: tuple[str, ...]
    unmatched: tuple[tuple[str, ...], ...]
    left_out: int

    def check_finite(self) -> None:
        """Reads all factors and differences.

        Raises:
            InputError: one has NaN or infinity.
        """
        for delta in chain.from_iterable(self.deltas.values()):
            for factor in delta.factors:
                largest(factor.read(), f"lora: {self.path}: {factor.key}")

    @property
    def ranks(self) -> Counter[int]:
        """The number of pairs of factors of every rank."""
        return Counter(delta.rank for deltas in self.deltas.values() for delta in deltas if delta.rank is not None)


def is_lora(keys: Collection[str]) -> bool:
    """Returns whether a file with these keys is a LoRA (or another adapter of its kind)."""
    parts = (_PART.search(key) for key in keys)
    certain = any(part is not None and part.lastgroup != "alpha" for part in parts)
    return certain or any(mark in key for key in keys for mark in _REFUSED)


def open_lora(path: Path, expert: int = 1) -> LoRAFile:
    """Opens a LoRA; reads no more of it than its header and its alphas.

    Args:
        path: a file, or a directory with ``adapter_model`` or ``pytorch_lora_weights`` or one safetensors file in it.
        expert: 1 or 2: the one whose tensors are taken where the file holds those of both experts of Wan2.2 A14B
            (``transformer.`` and ``transformer_2.``). A file without such prefixes is any expert's.

    Raises:
        InputError: there is no LoRA, none for this expert, or another kind of adapter (named).
    """
    with looking_at(path):
        path = _file(path)
    files = open_weights(path)
    for mark, kind in _REFUSED.items():
        found = [key for key in files.tensors if mark in key]
        if found:
            raise InputError(f"lora: {path} is {kind} ({found[0]}), which cannot be merged as a LoRA; expected a LoRA")
    if not is_lora(files.tensors):
        raise InputError(
            f"lora: {path} holds no LoRA; its tensors are named like {next(iter(files.tensors), 'nothing')}"
        )
    prefixes = {key: _split(key)[0] for key in files.tensors}
    second = {key for key, prefix in prefixes.items() if "transformer_2." in prefix}
    first = {key for key, prefix in prefixes.items() if "transformer." in prefix}
    if expert == 1 and second and not first:
        raise InputError(f"lora: {path} is for the second expert (transformer_2.), and was given for the first")
    left_out = (first if expert == 2 else second) if second else set()
    taken = {key: tensor for key, tensor in files.tensors.items() if key not in left_out}
    config = AdapterConfig.find(path, files.metadata, "transformer_2" if second and expert == 2 else "transformer")
    modules, strays = _group(path, taken)
    unmatched, faults = [(stray,) for stray in strays], []
    deltas: dict[str, list[Delta]] = defaultdict(list)
    for module, parts in modules.items():
        for name, delta in _take_deltas(path, module, parts, config, faults):
            if not is_dit_parameter(name):
                unmatched.append(tuple(f"{key} (no parameter of a Wan DiT)" for key in delta.keys))
                continue
            # A pair and a difference of one weight may stand beside each other; two of a kind are two adapters.
            for other in deltas[name]:
                if len(other.factors) == len(delta.factors):
                    raise _several(path, other.keys[0], delta.keys[0])
            deltas[name].append(delta)
        unmatched += [(f"{part.key} (its counterpart is missing)",) for part in parts.values()]
    return LoRAFile(path, dict(deltas), tuple(faults), tuple(unmatched), len(left_out))


def _file(path: Path) -> Path:
    """Returns the file of a directory that holds one LoRA, or the path of a file."""
    if not path.exists():
        raise InputError(f"lora: {path} does not exist")
    if not path.is_dir():
        return path
    found = [path / name for name in _FILES if (path / name).exists()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise InputError(f"lora: expected one LoRA in {path}, found {names}; name a file")
    return found[0]


def _group(path: Path, tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, dict[str, StoredTensor]], list[str]]:
    """Returns ``{module: {part: tensor}}``, and the keys that are no part of a LoRA."""
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    unmatched = []
    for key, tensor in tensors.items():
        name = _split(key)[1]
        found = _PART.search(name)
        if found is None:
            unmatched.append(f"{key} (no part of a LoRA)")
            continue
        parts, part = modules[dotted(name[: found.start()])], found.lastgroup
        if part in parts:
            raise _several(path, parts[part].key, key)
        parts[part] = tensor
    return modules, unmatched


def _several(path: Path, *keys: str) -> InputError:
    return InputError(f"lora: {path} holds several adapters ({', '.join(keys)}); expected one a file")


def _split(key: str) -> tuple[str, str]:
    """Returns what stands before a module's name in a key, and the rest."""
    key = _WRAPPERS.sub("", key)
    end = _PREFIXES.match(key).end()
    return key[:end], key[end:]


def _take_deltas(
    path: Path, module: str, parts: dict[str, StoredTensor], config: AdapterConfig, faults: list[str]
) -> Iterator[tuple[str, Delta]]:
    """Takes the parts of a module that add something, and yields their additions; the others stay in ``parts``.

    Those that can fit no parameter are only added to ``faults``.
    """
    weight, bias = dit_name(f"{module}.weight"), dit_name(f"{module}.bias")

    def is_sound(*factors: StoredTensor) -> bool:
        found = _unsound(factors)
        faults.extend(found)
        return not found

    if {"up", "down"} <= parts.keys():
        up, down = parts.pop("up"), parts.pop("down")
        alpha, up_bias = parts.pop("alpha", None), parts.pop("up_bias", None)
        if is_sound(up, down):
            rank = down.shape[0]
            if alpha is not None:
                scale = _alpha(path, alpha) / rank
            else:
                # Names that are no parameter's are left out, and would be held against patterns at any length.
                scale = config.scale(module, rank) if is_dit_parameter(weight) else 1.0
            if abs(scale) > LARGEST_SCALE:
                raise InputError(f"lora: {path}: {module} has the scale {scale:g}; expected one that float32 can hold")
            yield weight, Delta(path, (up, down), scale)
            if up_bias is not None and is_sound(up_bias):
                yield bias, Delta(path, (up_bias,), scale)
    # A parameter of its own may be named in full, as in ``head.modulation.diff``.
    whole = dit_name(module) if is_dit_parameter(dit_name(module)) else weight
    for kind, name in (("diff", whole), ("diff_b", bias), ("diff_m", dit_name(f"{module}.modulation"))):
        if kind in parts and is_sound(difference := parts.pop(kind)):
            yield name, Delta(path, (difference,))


def _unsound(factors: Sequence[StoredTensor]) -> list[str]:
    """Returns the keys of two factors, or of a difference, that can fit no parameter, with the reasons."""
    least, faults = len(factors), []
    for factor in factors:
        if factor.dtype not in FLOATS:
            faults.append(f"{factor.key} ({factor.dtype}, expected floats)")
        elif len(factor.shape) < least or 0 in factor.shape:
            faults.append(f"{factor.key} (shape {list(factor.shape)}, expected at least {least} sizes above 0)")
    if not faults and least == 2 and factors[0].numel != factors[0].shape[0] * factors[1].shape[0]:
        shapes = " and ".join(str(list(factor.shape)) for factor in factors)
        faults = [f"{factor.key} (factors of {shapes} have no product)" for factor in factors]
    return faults


def _alpha(path: Path, tensor: StoredTensor) -> float:
    try:
        return finite(tensor.read().item())
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"lora: {path}: {tensor.key}: expected one finite number: {error}") from error


def _plain_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape without leading ones, which some files drop."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
