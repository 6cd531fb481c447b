"""float8 checkpoints as ComfyUI ships them: ``weight = float8 * scale``, one scale a tensor or one a row.

Two generations of names are in use. The older files have ``<layer>.scale_weight`` and a marker tensor ``scaled_fp8``;
the newer ones have ``<layer>.weight_scale`` and name the format of every layer, in a uint8 tensor
``<layer>.comfy_quant`` holding JSON or in the header's ``_quantization_metadata``. Scales of activations
(``scale_input``, ``input_scale``) serve static 8-bit matmuls, which are not computed here, and are left aside. Plain
float8 files have no scales. Everything else (integers, 4-bit floats, block-wise scales) is named as what it is and not
read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.errors import InputError
from model.weights.files import FLOATS, StoredTensor, WeightFiles

#: The dtypes of matrices that can be kept as they are stored (:mod:`model.streaming.placement`).
EIGHT_BIT_FLOATS = ("float8_e4m3fn", "float8_e5m2")

_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
_FORMAT = ".comfy_quant"
_MARKER = "scaled_fp8"
_METADATA = "_quantization_metadata"
#: Formats whose weight is ``float8 * scale``, by the names that files give them.
_READ_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e5m2_rowwise")
#: Companions of a weight that give away how it was quantised, where no format is written down.
_COMPANIONS = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".SCB": "bitsandbytes int8",
    ".weight_scale_2": "nvfp4",
}


@dataclass(frozen=True)
class ScaledTensor:
    """A tensor of a checkpoint and, where it has one, the scale that it is to be multiplied by.

    ``scale_name`` says in errors which scale that is: its file and key.
    """

    stored: StoredTensor
    scale: StoredTensor | None = None
    scale_name: str = "scale"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.stored.shape

    def wide(self, device: torch.device | str) -> Tensor:
        """Returns a contiguous copy on the device, in float32 (float64 stays), the scale multiplied in.

        Raises:
            InputError: the scale is not finite.
        """
        raw = self.stored.read().to(device)
        kind = torch.promote_types(raw.dtype, torch.float32) if raw.itemsize > 1 else torch.float32
        wide = raw.to(kind, copy=True, memory_format=torch.contiguous_format)
        if self.scale is None:
            return wide
        scale = self.scale.read().to(wide.dtype)
        if not torch.isfinite(scale).all():
            raise InputError(f"weights: {self.scale_name}: expected finite numbers, got NaN or infinity")
        scale = scale.to(device)
        return wide.mul_(scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *[1] * (wide.ndim - 1)))

    def eight_bits(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Reads the float8 values of a matrix as they are stored, and one float32 scale a row, to the device.

        Raises:
            InputError: the scale is not finite.
        """
        rows = self.shape[0]
        if self.scale is None:
            scales = torch.ones(rows, dtype=torch.float32, device="cpu")
        else:
            scales = self.scale.read().float().flatten().expand(rows).contiguous()
        if not torch.isfinite(scales).all():
            raise InputError(f"weights: {self.scale_name}: expected finite numbers, got NaN or infinity")
        return self.stored.read().to(device), scales.to(device)

    def load(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Reads the tensor in ``dtype`` to the device, rounded once."""
        if self.scale is None:
            return self.stored.read().to(device, dtype)
        return self.wide(device).to(dtype)


@dataclass(frozen=True)
class PlainWeights:
    """The weights of a checkpoint, without the tensors that only describe them.

    ``formats`` counts the layers by quantisation, and ``problem`` says why some of them cannot be read, if so.
    """

    tensors: dict[str, ScaledTensor]
    formats: Counter[str] = field(default_factory=Counter)
    problem: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}


def plain_weights(files: WeightFiles) -> PlainWeights:
    """Pairs weights with their scales.

    Raises:
        InputError: the description of how a layer is quantised cannot be read.
    """
    tensors = files.tensors
    formats = _named_formats(files)
    scales = {
        f"{key.removesuffix(suffix)}.weight": key
        for suffix in _WEIGHT_SCALES
        for key in tensors
        if key.endswith(suffix) and f"{key.removesuffix(suffix)}.weight" in tensors
    }
    described = set(scales.values()) | {key for key in tensors if _describes(key)}
    counts: Counter[str] = Counter()
    problems: dict[str, list[str]] = {}
    plain = {}
    for key, stored in tensors.items():
        if key in described:
            continue
        scale = tensors[scales[key]] if key in scales else None
        layer = key.removesuffix(".weight")
        given = formats.get(layer) if key.endswith(".weight") else None
        problem = _problem(key, stored, scale, given, tensors)
        if problem is not None:
            problems.setdefault(problem, []).append(layer)
        if problem is not None or scale is not None or given is not None:
            counts[problem or f"{stored.dtype}, {_kind(scale)}"] += 1
        name = f"{files.path}: {scales[key]}" if key in scales else "no scale"
        plain[key] = ScaledTensor(stored, scale if problem is None else None, name)
    by_config = files.config.get("quantization_config")
    if by_config and not problems:
        name = by_config.get("quant_method", "unnamed") if isinstance(by_config, dict) else by_config
        problems[f"{name} (quantization_config of config.json)"] = ["all layers"]
    return PlainWeights(plain, counts, _sentence(problems) if problems else None)


def _describes(key: str) -> bool:
    """Returns whether a tensor describes others and is no weight itself."""
    return key.split(".")[-1] == _MARKER or key.endswith((_FORMAT, *_INPUT_SCALES))


def _named_formats(files: WeightFiles) -> dict[str, str]:
    """Returns ``{layer: format}`` for the layers whose format the file names."""
    layers: dict[str, Any] = {}
    try:
        if _METADATA in files.metadata:
            layers.update(json.loads(files.metadata[_METADATA])["layers"])
        for key, stored in files.tensors.items():
            if key.endswith(_FORMAT):
                if stored.dtype != "uint8":
                    raise ValueError(f"{key} is {stored.dtype}, expected uint8")
                text = bytes(stored.read().to(torch.uint8).flatten().tolist())
                layers[key.removesuffix(_FORMAT)] = json.loads(text)
        return {layer: str(entry["format"]) for layer, entry in layers.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"weights: {files.path}: how its layers are quantised is not readable: {error}") from error


def _problem(
    key: str,
    stored: StoredTensor,
    scale: StoredTensor | None,
    given: str | None,
    tensors: Mapping[str, StoredTensor],
) -> str | None:
    """Returns the name of a quantisation that cannot be read, or None."""
    if given is not None and given not in _READ_FORMATS:
        return given
    if not key.endswith(".weight"):
        return None
    layer = key.removesuffix(".weight")
    for suffix, name in _COMPANIONS.items():
        if key + suffix in tensors or layer + suffix in tensors:
            return name
    if stored.dtype not in FLOATS:
        return stored.dtype
    if scale is not None and (scale.dtype not in FLOATS or not _is_by_row(stored.shape, scale.shape)):
        return f"{stored.dtype} with {scale.dtype} scales of shape {list(scale.shape)}"
    return None


def _is_by_row(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Returns whether a scale is one number, or one a row (``[out]`` or ``[out, 1, ...]``)."""
    return all(size == 1 for size in scale) or (scale[:1] == weight[:1] and all(size == 1 for size in scale[1:]))


def _kind(scale: StoredTensor | None) -> str:
    if scale is None:
        return "no scale"
    return "one scale a tensor" if scale.numel == 1 else "one scale a row"


def _sentence(problems: Mapping[str, list[str]]) -> str:
    parts = []
    for name, layers in problems.items():
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        parts.append(f"{name} in {layers[0]}{more}")
    return (
        f"quantised as {'; '.join(parts)};"
        " expected floats, or float8_e4m3fn or float8_e5m2 with one scale a tensor or a row"
    )
