"""Checkpoints in 8 bits: ``weight = stored * scale``, float8 or int8, with one scale a tensor or one a row.

ComfyUI has used two generations of names. The older files have ``<layer>.scale_weight`` and a marker tensor
``scaled_fp8``; the newer ones, and LightX2V's, have ``<layer>.weight_scale``, and ComfyUI's name the format of every
layer, in a uint8 tensor ``<layer>.comfy_quant`` holding JSON or in the header's ``_quantization_metadata``. Scales of
activations (``scale_input``, ``input_scale``) serve static 8-bit matmuls, which are not computed here, and are left
aside. Plain float8 files have no scales at all; a file in which some matrices in 8 bits have scales and others lack
them, or which says that there are scales and has none, is refused: without their scales weights are hundreds of times
too large. Everything else (4-bit floats, block-wise scales, rotations) is named as what it is and not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.errors import InputError, printable
from model.weights.files import WeightFiles
from model.weights.formats import StoredTensor

#: The dtypes of matrices that can be kept as they are stored (:mod:`model.streaming.placement`).
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "int8")

_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
_FORMAT = ".comfy_quant"
_LONGEST_FORMAT = 1 << 16
_MARKER = "scaled_fp8"
_METADATA = "_quantization_metadata"
#: Formats whose weight is ``stored * scale``, by the names that files give them.
_READ_FORMATS = (
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e5m2_rowwise"),
    "int8_tensorwise",
)
#: Companions of a weight that give away how it was quantised, where no format is written down.
_COMPANIONS = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".SCB": "bitsandbytes int8",
    ".weight_scale_2": "nvfp4",
}


def largest(tensor: Tensor, name: str) -> float:
    """Returns the largest magnitude in a tensor.

    Raises:
        InputError: it holds NaN or infinity; the message begins with ``name``.
    """
    if tensor.is_meta or not tensor.numel():
        return 0.0
    if tensor.dtype == torch.int8:
        return 128.0
    if tensor.itemsize == 1:
        # The order of magnitudes is that of bytes but for the sign: nothing as large as float32 is made.
        top = max(tensor.view(torch.int8).max().item(), tensor.view(torch.uint8).max().item() - 0x80)
        found = torch.tensor(top, dtype=torch.uint8, device="cpu").view(tensor.dtype).float().item()
    else:
        low, high = torch.aminmax(tensor)
        found = max(-low.item(), high.item()) if low <= high else math.nan
    if not math.isfinite(found):
        raise InputError(f"{name} holds NaN or infinity; expected finite numbers")
    return found


def check_scaled(tensor: ScaledTensor, found: float) -> None:
    """Raises InputError if a float8 tensor without a scale holds the largest number of its dtype, as scaled ones do."""
    kind = tensor.stored.dtype
    if tensor.scale is None and kind.startswith("float8") and found == torch.finfo(getattr(torch, kind)).max:
        raise InputError(
            f"{tensor.name} holds the largest number of {kind}, as weights do that have a scale; expected its scale in"
            " the file"
        )


def check_holds(dtype: torch.dtype, found: float, name: str) -> None:
    """Raises InputError if numbers of magnitude ``found`` would become infinite in ``dtype``."""
    if math.isfinite(torch.tensor(found, dtype=torch.float64, device="cpu").to(dtype).item()):
        return
    wider = next((kind for kind in ("bfloat16", "float32") if found <= torch.finfo(getattr(torch, kind)).max), None)
    allowed = f"expected at most {torch.finfo(dtype).max:g} in {str(dtype).removeprefix('torch.')}"
    raise InputError(f"{name} holds {found:g}; {allowed}" + (f" (dtype {wider} holds it)" if wider else ""))


@dataclass(frozen=True)
class ScaledTensor:
    """A tensor of a checkpoint, the scale that it is to be multiplied by, if any, and why it cannot be read, if so."""

    stored: StoredTensor
    scale: StoredTensor | None = None
    problem: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.stored.shape

    @property
    def is_float(self) -> bool:
        """True where what is read is floats, or becomes floats by its scale."""
        return self.stored.is_float or self.scale is not None

    @property
    def form(self) -> str | None:
        """The quantisation, if any, in words."""
        if self.problem is not None or self.scale is None:
            return self.problem
        return f"{self.stored.dtype}, one scale a {'tensor' if self.scale.numel == 1 else 'row'}"

    @property
    def name(self) -> str:
        """The beginning of an error about the tensor: its file, its key and that of its scale."""
        times = "" if self.scale is None else f" times {self.scale.key}"
        return f"weights: {self.stored.file}: {self.stored.key}{times}"

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
        return wide.mul_(self.scales().to(device).view(-1, *[1] * (wide.ndim - 1)))

    def scales(self) -> Tensor:
        """Returns one float32 scale a row, in host memory: of ones where there is none.

        Raises:
            InputError: the scale is not finite.
        """
        rows = self.shape[0]
        if self.scale is None:
            return torch.ones(rows, dtype=torch.float32, device="cpu")
        scale = self.scale.read().float()
        largest(scale, f"weights: {self.scale.file}: {self.scale.key}")
        return scale.flatten().expand(rows).contiguous()


def quantisation_problem(tensors: Iterable[ScaledTensor]) -> str | None:
    """Returns why these weights cannot be read as they are quantised, or None.

    They may be some of a file's, since one file may hold the parts of a whole pipeline, each quantised in its own way.
    """
    faults: dict[str, list[str]] = {}
    matrices = []
    for tensor in tensors:
        if tensor.problem is not None:
            faults.setdefault(tensor.problem, []).append(tensor.stored.key.removesuffix(".weight"))
        if _is_eight_bit_matrix(tensor.stored):
            matrices.append(tensor)
    if faults:
        parts = (f"{name} in {_some(layers)}" for name, layers in faults.items())
        return (
            f"quantised as {'; '.join(parts)};"
            " expected floats, or float8_e4m3fn, float8_e5m2 or int8 with one scale a tensor or a row"
        )
    bare = [tensor.stored.key for tensor in matrices if tensor.scale is None]
    if not bare or len(bare) == len(matrices):
        return None
    return (
        f"quantised in 8 bits with a scale for {len(matrices) - len(bare)} matrices and without one for {len(bare)}"
        f" ({_some(bare)}); expected a scale for each of them or for none"
    )


def plain_weights(files: WeightFiles) -> dict[str, ScaledTensor]:
    """Returns the weights of a checkpoint with their scales, without the tensors that only describe them.

    Raises:
        InputError: the description of how a layer is quantised cannot be read.
    """
    tensors = files.tensors
    named = _named_formats(files)
    scales = {
        weight: key
        for suffix in _WEIGHT_SCALES
        for key in tensors
        if key.endswith(suffix) and (weight := f"{key.removesuffix(suffix)}.weight") in tensors
    }
    markers = [key for key in tensors if key.split(".")[-1] == _MARKER]
    described = {*scales.values(), *markers, *(key for key in tensors if key.endswith((_FORMAT, *_INPUT_SCALES)))}
    # A marker announces scales for all weights beside it.
    marked = tuple(key.removesuffix(_MARKER) for key in markers)
    by_config = files.config.get("quantization_config")
    method = by_config.get("quant_method", "unnamed") if isinstance(by_config, dict) else by_config
    plain = {}
    for key, stored in tensors.items():
        if key in described:
            continue
        scale = tensors[scales[key]] if key in scales else None
        announced = named.get(key.removesuffix(".weight")) or (_MARKER if key.startswith(marked) else None)
        problem = _problem(stored, scale, announced, tensors) if key.endswith(".weight") else None
        if problem is None and by_config:
            problem = f"{method!r} (quantization_config of config.json)"
        plain[key] = ScaledTensor(stored, scale, problem)
    return plain


def _is_eight_bit_matrix(stored: StoredTensor) -> bool:
    return stored.key.endswith(".weight") and len(stored.shape) == 2 and stored.dtype in EIGHT_BITS


def _named_formats(files: WeightFiles) -> dict[str, str]:
    """Returns ``{layer: format}`` for the layers whose format the file names, and whether they were rotated before."""
    layers: dict[str, Any] = {}
    try:
        if _METADATA in files.metadata:
            layers.update(json.loads(files.metadata[_METADATA])["layers"])
        for key, stored in files.tensors.items():
            if key.endswith(_FORMAT):
                if stored.numel > _LONGEST_FORMAT:
                    raise ValueError(f"{key} has {stored.numel} numbers, expected at most {_LONGEST_FORMAT}")
                text = bytes(stored.read().to(torch.uint8).flatten().tolist())
                layers[key.removesuffix(_FORMAT)] = json.loads(text)
        return {
            layer: printable(str(entry["format"])) + (" with convrot" if entry.get("convrot") else "")
            for layer, entry in layers.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"weights: {files.path}: how its layers are quantised is not readable: {error!r}") from error


def _problem(
    stored: StoredTensor, scale: StoredTensor | None, announced: str | None, tensors: Collection[str]
) -> str | None:
    """Returns the name of a quantisation of a weight that cannot be read, or None."""
    if announced not in (None, _MARKER, *_READ_FORMATS):
        return announced
    for suffix, name in _COMPANIONS.items():
        if stored.key + suffix in tensors or stored.key.removesuffix(".weight") + suffix in tensors:
            return name
    if stored.dtype == "int8" and scale is None:
        return "int8 without a scale"
    if not stored.is_float and stored.dtype != "int8":
        return stored.dtype
    if scale is not None:  # it has to be one number, or one a row
        by_row = scale.shape[:1] in ((), (1,), stored.shape[:1]) and all(size == 1 for size in scale.shape[1:])
        if not (scale.is_float and by_row):
            return f"{stored.dtype} with {scale.dtype} scales of shape {list(scale.shape)}"
    if scale is None and announced and _is_eight_bit_matrix(stored):
        return f"{stored.dtype} without the scale that {announced} announces"
    return None


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return keys[0] + more
