"""Files of tensors: finding them, and opening them without reading more than their headers.

Safetensors and, with ``weights_only=True``, pickles; nothing is ever unpickled into code.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import InputError, require

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = ".index.json"
_DTYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F4": "float4_e2m1fn_x2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, the name of its dtype as torch has it, and a function that reads it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        kind = getattr(torch, self.dtype, None)
        return self.numel * (kind.itemsize if isinstance(kind, torch.dtype) else 1)


@dataclass(frozen=True)
class WeightFiles:
    """All tensors of one checkpoint under the keys that the files give them.

    ``metadata`` is that of the safetensors headers, ``config`` the ``config.json`` beside the files (or empty).
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    config: dict[str, Any]


def open_weights(path: Path) -> WeightFiles:
    """Opens a file, a sharded index or a directory.

    Raises:
        InputError: nothing readable there, shards are missing, or a key is in two of them.
    """
    if not path.exists():
        raise InputError(f"weights: {path} does not exist")
    config = read_json(path if path.is_dir() else path.parent, "config.json")
    files = tuple(weight_files(path))
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, header = _open(file)
        twice = tensors.keys() & found.keys()
        if twice:
            raise InputError(f"weights: {path} holds {', '.join(sorted(twice))} in more than one file")
        tensors.update(found)
        metadata.update(header)
    return WeightFiles(path, files, tensors, metadata, config)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in ``folder/name``; empty without such a file.

    Raises:
        InputError: the file is not JSON, or holds no object.
    """
    file = folder / name
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"weights: {file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"weights: {file} holds {type(config).__name__}, expected an object")
    return config


def weight_files(path: Path) -> list[Path]:
    """The files that together hold one model: those of a sharded index, one file, or all shards of one set.

    Raises:
        InputError: there is none, or more than one candidate; or shards are missing.
    """
    if path.is_file():
        return _shards(path) if path.name.endswith(_INDEX) else [path]
    # The plain name comes first: a directory may hold it beside a variant such as "...fp16.safetensors".
    plain = [path / f"diffusion_pytorch_model{suffix}" for suffix in (".safetensors", ".bin")]
    for file in plain:
        if file.exists():
            return [file]
    indices = sorted(path.glob(f"*{_INDEX}"), key=lambda file: (file.name.count("."), file.name))
    if indices:
        return _shards(indices[0])
    found = sorted(path.glob("*.safetensors")) or sorted(f for f in path.iterdir() if f.suffix in PICKLES)
    if not found:
        raise InputError(f"weights: no safetensors or {', '.join(PICKLES)} file in {path}")
    if len(found) > 1 and not all("-of-" in file.name for file in found):
        raise InputError(f"weights: {path} holds several candidates, name one: {', '.join(f.name for f in found)}")
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"weights: {index} is not a readable index of shards: {error}") from error
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise InputError(f"weights: {index.parent} lacks the shards {', '.join(missing)}")
    return [index.parent / name for name in names]


def _open(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file and the metadata of its header."""
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    if file.suffix == ".gguf":
        raise InputError(
            f"weights: {file} is GGUF, whose quantised blocks are not read here; expected safetensors, in 16 or 32 bits"
            " or float8"
        )
    if file.suffix not in PICKLES:
        raise InputError(f"weights: {file} is neither .safetensors nor one of {', '.join(PICKLES)}")
    return _open_pickle(file), {}


def _open_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    safetensors = require("safetensors", "generate")
    try:
        handle = safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"weights: {file} is not a readable safetensors file: {error}") from error
    tensors = {}
    for key in handle.keys():  # noqa: SIM118 (not a mapping)
        header = handle.get_slice(key)
        tensors[key] = StoredTensor(
            tuple(header.get_shape()), _dtype_name(header.get_dtype()), lambda key=key: handle.get_tensor(key)
        )
    return tensors, handle.metadata() or {}


def _dtype_name(name: str) -> str:
    """torch's name for a dtype of safetensors: ``F32`` -> ``float32``; lower case where torch has none."""
    if name in _DTYPES:
        return _DTYPES[name]
    kind = {"F": "float", "I": "int", "U": "uint"}.get(name[0])
    return f"{kind}{name[1:]}" if kind and name[1:].isdigit() else name.lower()


def _open_pickle(file: Path) -> dict[str, StoredTensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"weights: {file} cannot be loaded with weights_only=True: {reason}") from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"weights: {file} does not hold a plain dictionary of tensors")
    return {
        key: StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda tensor=tensor: tensor)
        for key, tensor in tensors.items()
    }
