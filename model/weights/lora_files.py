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
from collections.abc import Iterable, Iterator, Mapping
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
_ADAPTER = r"(?:\.[^.]+)?"
_PARTS = (
    ("down", re.compile(rf"\.(?:lora_A|lora_down|lora\.down){_ADAPTER}\.weight$")),
    ("up", re.compile(rf"\.(?:lora_B|lora_up|lora\.up){_ADAPTER}\.weight$")),
    ("up_bias", re.compile(rf"\.(?:lora_B|lora_up){_ADAPTER}\.bias$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("diff", re.compile(r"\.(?:diff|w_norm)$")),
    ("diff_b", re.compile(r"\.(?:diff_b|b_norm)$")),
    ("diff_m", re.compile(r"\.diff_m$")),
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
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8")
#: Scales are factors in float32, which must be able to hold them.
LARGEST_SCALE = torch.finfo(torch.float32).max
_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class Delta:
    """One addition to one parameter: ``scale`` times ``up @ down`` (two factors) or times a tensor (one).

    ``path`` is the file, ``alpha`` the key of the alpha, if any.
    """

    path: Path
    factors: tuple[StoredTensor, ...]
    scale: float = 1.0
    alpha: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the factors, in their order, and that of the alpha."""
        return *(factor.key for factor in self.factors), *((self.alpha,) if self.alpha else ())

    @property
    def rank(self) -> int | None:
        """The inner width of ``up @ down``; None for a tensor alone."""
        return self.factors[1].shape[0] if len(self.factors) == 2 else None

    @property
    def has_product(self) -> bool:
        """True where two factors have the same inner width, and for a tensor alone."""
        if len(self.factors) == 1:
            return True
        up, down = self.factors
        return up.numel == up.shape[0] * down.shape[0]

    def misfits(self, shape: tuple[int, ...]) -> list[str]:
        """Returns the keys that cannot be added to a parameter of this shape, with their shapes; none if they can."""
        if len(self.factors) == 1:
            fits = _plain_shape(self.factors[0].shape) == _plain_shape(shape)
        else:
            up, down = self.factors
            columns = down.shape[0] * math.prod(shape[1:])
            fits = len(shape) > 1 and self.has_product and up.shape[0] == shape[0] and down.numel == columns
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
    naming: str
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


def is_lora(keys: Iterable[str]) -> bool:
    """Returns whether a file with these keys is a LoRA (or another adapter of its kind)."""
    certain = [pattern for part, pattern in _PARTS if part != "alpha"]
    return any(any(pattern.search(key) for pattern in certain) or any(mark in key for mark in _REFUSED) for key in keys)


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
        faults += _take_unsound(parts)
        for name, delta in _take_deltas(path, module, parts, config):
            if not is_dit_parameter(name):
                unmatched.append(tuple(f"{key} (no parameter of a Wan DiT)" for key in delta.keys))
            elif not delta.has_product:
                shapes = " and ".join(str(list(factor.shape)) for factor in delta.factors)
                faults += [f"{key} (factors of {shapes} have no product)" for key in delta.keys[:2]]
            else:
                # A pair and a difference of one weight may stand beside each other; two of a kind are two adapters.
                for other in deltas[name]:
                    if len(other.factors) == len(delta.factors):
                        raise _several(path, other.keys[0], delta.keys[0])
                deltas[name].append(delta)
        unmatched += [(f"{part.key} (its counterpart is missing)",) for part in parts.values()]
    return LoRAFile(path, _naming(taken), dict(deltas), tuple(faults), tuple(unmatched), len(left_out))


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
        for part, pattern in _PARTS:
            match = pattern.search(name)
            if match is not None:
                parts = modules[dotted(name[: match.start()])]
                if part in parts:
                    raise _several(path, parts[part].key, key)
                parts[part] = tensor
                break
        else:
            unmatched.append(f"{key} (no part of a LoRA)")
    return modules, unmatched


def _several(path: Path, *keys: str) -> InputError:
    return InputError(f"lora: {path} holds several adapters ({', '.join(keys)}); expected one a file")


def _split(key: str) -> tuple[str, str]:
    """Returns what stands before a module's name in a key, and the rest."""
    key = _WRAPPERS.sub("", key)
    end = _PREFIXES.match(key).end()
    return key[:end], key[end:]


def _take_deltas(
    path: Path, module: str, parts: dict[str, StoredTensor], config: AdapterConfig
) -> Iterator[tuple[str, Delta]]:
    """Takes the parts of a module that add something, and yields their additions; the others stay in ``parts``."""
    weight, bias = dit_name(f"{module}.weight"), dit_name(f"{module}.bias")
    if {"up", "down"} <= parts.keys():
        up, down = parts.pop("up"), parts.pop("down")
        alpha = parts.pop("alpha", None)
        rank = down.shape[0]
        if alpha is not None:
            scale = _number(path, alpha) / rank
        else:
            # Names that are no parameter's are left out, and would be held against patterns at any length.
            scale = config.scale(module, rank) if is_dit_parameter(weight) else 1.0
        if abs(scale) > LARGEST_SCALE:
            raise InputError(f"lora: {path}: {module} has the scale {scale:g}; expected one that float32 can hold")
        yield weight, Delta(path, (up, down), scale, alpha and alpha.key)
        if "up_bias" in parts:
            yield bias, Delta(path, (parts.pop("up_bias"),), scale)
    # A parameter of its own may be named in full, as in ``head.modulation.diff``.
    whole = dit_name(module) if is_dit_parameter(dit_name(module)) else weight
    for kind, name in (("diff", whole), ("diff_b", bias), ("diff_m", dit_name(f"{module}.modulation"))):
        if kind in parts:
            yield name, Delta(path, (parts.pop(kind),))


def _take_unsound(parts: dict[str, StoredTensor]) -> list[str]:
    """Takes the factors and differences that can fit no parameter, and returns their keys with the reasons.

    The counterpart of such a factor goes with it, and so do their alpha and bias.
    """
    bad = {name: reason for name, part in parts.items() if (reason := _unsound(name, part)) is not None}
    faults = [f"{parts[name].key} ({reason})" for name, reason in bad.items()]
    with_it = ("up", "down", "up_bias", "alpha") if bad.keys() & {"up", "down"} else ()
    for name in {*bad, *with_it}:
        parts.pop(name, None)
    return faults


def _unsound(name: str, tensor: StoredTensor) -> str | None:
    """Returns why a tensor cannot be this part of any LoRA, or None."""
    if name == "alpha":
        return None
    if tensor.dtype not in FLOATS:
        return f"{tensor.dtype}, expected floats"
    least = 2 if name in ("up", "down") else 1
    if len(tensor.shape) < least or 0 in tensor.shape:
        return f"shape {list(tensor.shape)}, expected at least {least} {'sizes' if least > 1 else 'size'} above 0"
    return None


def _number(path: Path, tensor: StoredTensor) -> float:
    try:
        if tensor.numel != 1:
            raise ValueError(f"expected one number, got {list(tensor.shape)}")
        if tensor.dtype not in (*FLOATS, *_INTEGERS):
            raise ValueError(f"expected a number, got {tensor.dtype}")
        return finite(tensor.read().item())
    except ValueError as error:
        raise InputError(f"lora: {path}: {tensor.key}: {error}") from error


def _naming(keys: Iterable[str]) -> str:
    keys = list(keys)
    if any(key.startswith(("lora_unet_", "lora_transformer_", "lycoris_")) for key in keys):
        return "kohya, musubi, VideoX-Fun or LyCORIS (underscores)"
    original = re.compile(r"diffusion_model\.|(self|cross)_attn\.|\.ffn\.[02]\.|time_projection\.|head\.")
    if any(original.search(key) for key in keys):
        return "names of the Wan repositories, as LightX2V and ComfyUI write them"
    return "diffusers / PEFT"


def _plain_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape without leading ones, which some files drop."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
