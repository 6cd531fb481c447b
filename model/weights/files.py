"""Files of tensors: they are found, and opened without reading more than their headers.

Safetensors, GGUF (:mod:`model.weights.gguf_files`) and, with ``weights_only=True``, pickles; nothing is ever unpickled
into code. Only regular files are opened, so that a pipe is refused rather than waited for.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from model.errors import InputError, printable, require
from model.weights.gguf_files import open_gguf
from model.weights.stored import StoredTensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = ".index.json"
#: The names, without suffix, of files that are parts of one checkpoint: shards, LightX2V's blocks and chunks.
_PART = re.compile(r"(?P<stem>.*)-(?P<part>\d+)-of-(?P<count>\d+)|block_\d+|non_block|.*_part\d+")
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
class WeightFiles:
    """All tensors of one checkpoint under the keys that the files give them, all of printable characters.

    ``metadata`` is that of the safetensors headers, ``config`` the ``config.json`` beside the files (or empty).
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    config: dict[str, Any]


@contextmanager
def looking_at(path: Path) -> Iterator[None]:
    """Turns a system's refusal to look at a path (no permission, too long a name) into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"weights: {path} cannot be read: {error}") from error


def open_weights(path: Path) -> WeightFiles:
    """Opens a file, a sharded index or a directory.

    Raises:
        InputError: nothing readable is there, shards are missing, a key is in two of them, or a key has characters that
            no terminal should be sent.
    """
    files = tuple(weight_files(path))
    config = read_json(path if path.is_dir() else path.parent, "config.json")
    name = config.get("_class_name")
    if not isinstance(name, (str, type(None))):
        raise InputError(f"weights: config.json of {path}: _class_name: expected a string, got {name!r}")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        for key, tensor in _open(file, metadata).items():
            if not key.isprintable():
                raise InputError(f"weights: {file} has a tensor called {key!r}; expected printable characters")
            if key in tensors:
                raise InputError(f"weights: {path} holds {key} in more than one file")
            tensors[key] = tensor
    return WeightFiles(path, files, tensors, metadata, config)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Returns the object in ``folder/name``; empty without such a file.

    Raises:
        InputError: the file is not JSON, or holds no object.
    """
    file = folder / name
    with looking_at(file):
        if not file.exists() and not file.is_symlink():  # a link that leads nowhere is not the same as no file
            return {}
    _check_regular(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"weights: {file} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"weights: {file}: expected a JSON object, got {type(found).__name__}")
    return found


def _check_regular(file: Path) -> None:
    with looking_at(file):
        if not file.is_file():
            raise InputError(f"weights: {file} is no regular file; expected a file")


def weight_files(path: Path) -> list[Path]:
    """Returns the files that together hold one model: those of a sharded index, one file, or all shards of one set.

    Raises:
        InputError: there is none, or more than one candidate; or shards are missing or not named inside its folder.
    """
    with looking_at(path):
        if not path.exists():
            raise InputError(f"weights: {path} does not exist")
        if path.is_file():
            return _shards(path) if path.name.endswith(_INDEX) else [path]
        if not path.is_dir():
            raise InputError(f"weights: {path} is neither a file nor a directory")
        files = _files_of_directory(path)
    for file in files:
        _check_regular(file)
    return files


def _files_of_directory(path: Path) -> list[Path]:
    # The plain name comes first: a directory may hold it beside a variant such as "...fp16.safetensors".
    for suffix in (".safetensors", ".bin"):
        if (path / f"diffusion_pytorch_model{suffix}").exists():
            return [path / f"diffusion_pytorch_model{suffix}"]
    indices = sorted(path.glob(f"*{_INDEX}"), key=lambda file: (file.name.count("."), file.name))
    if indices:
        return _shards(indices[0])
    names = sorted(path.iterdir())
    # A safetensors file comes before a pickle of the same, and either before a GGUF file.
    groups = [[f for f in names if f.suffix in group] for group in ((".safetensors",), PICKLES, (".gguf",))]
    found = next((group for group in groups if group), [])
    if not found:
        raise InputError(f"weights: no safetensors or {', '.join((*PICKLES, '.gguf'))} file in {path}")
    parts = [_PART.fullmatch(file.stem) for file in found]
    listed = ", ".join(file.name for file in found)
    if len(found) > 1 and not all(parts):
        raise InputError(f"weights: {path} holds several candidates, name one: {listed}")
    counts = {int(part["count"]) for part in parts if part and part["count"]}
    if counts and counts != {len(found)}:
        expected = " or ".join(map(str, sorted(counts)))
        raise InputError(f"weights: {path} holds {len(found)} shards of {expected}: {listed}")
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index.parent, index.name)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"weights: {index} is no index of shards: {error!r}") from error
    if not names:
        raise InputError(f"weights: {index} names no shards")
    # Windows' rules know both slashes and drives.
    outside = [name for name in names if not isinstance(name, str) or PureWindowsPath(name).name != name]
    if outside:
        listed = ", ".join(map(repr, outside))
        raise InputError(f"weights: {index} names {listed}; expected names of files in its own folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"weights: {index.parent} lacks the shards {', '.join(missing)}")
    return [index.parent / name for name in names]


def _open(file: Path, metadata: dict[str, str]) -> dict[str, StoredTensor]:
    """Opens one file and returns its tensors; what its header says beside them is added to ``metadata``."""
    if file.suffix == ".safetensors":
        return _open_safetensors(file, metadata)
    if file.suffix == ".gguf":
        return open_gguf(file)
    if file.suffix not in PICKLES:
        raise InputError(f"weights: {file} is neither .safetensors nor one of {', '.join((*PICKLES, '.gguf'))}")
    return _open_pickle(file)


def _open_safetensors(file: Path, metadata: dict[str, str]) -> dict[str, StoredTensor]:
    safetensors = require("safetensors", "generate")
    try:
        handle = safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"weights: {file} is not a readable safetensors file: {error}") from error
    metadata.update(handle.metadata() or {})
    tensors = {}
    for key in handle.keys():  # noqa: SIM118 (not a mapping)
        header = handle.get_slice(key)
        tensors[key] = StoredTensor(
            file,
            key,
            tuple(header.get_shape()),
            _dtype_name(header.get_dtype()),
            lambda key=key: handle.get_tensor(key),
            lambda start, stop, header=header: header[start:stop],
        )
    return tensors


def _dtype_name(name: str) -> str:
    """Returns torch's name for a dtype of safetensors (``float32`` for ``F32``); lower case where torch has none."""
    if name in _DTYPES:
        return _DTYPES[name]
    kind = {"F": "float", "I": "int", "U": "uint"}.get(name[0])
    return f"{kind}{name[1:]}" if kind and name[1:].isdigit() else name.lower()


def _open_pickle(file: Path) -> dict[str, StoredTensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's requests to report what it does not read
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        # What a file that is no pickle does to the unpickler depends on its bytes: KeyError, IndexError, struct.error,
        # UnicodeDecodeError and others were seen. Nothing but the reading of this file happens in here.
        held = re.search(r"GLOBAL (\S+)|(?:but )?got <class '([^']+)'>", str(error))
        holds = f"it holds {printable(held[1] or held[2])}" if held else f"damaged, or code ({type(error).__name__})"
        raise InputError(
            f"weights: {file} is no pickle of tensors alone: {holds}; code is never run here, expected tensors, best as"
            " safetensors"
        ) from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_cpu
        for key, tensor in tensors.items()
    ):
        raise InputError(f"weights: {file} does not hold a plain dictionary of names and dense tensors")
    return {
        key: StoredTensor(
            file,
            key,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            lambda tensor=tensor: tensor,
            lambda start, stop, tensor=tensor: tensor[start:stop],
        )
        for key, tensor in tensors.items()
    }
