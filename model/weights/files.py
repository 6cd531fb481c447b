"""The files of a checkpoint: they are found, and opened without reading more than their headers.

Only regular files are opened, so that a pipe is refused rather than waited for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from model.errors import InputError
from model.weights.formats import PICKLES, StoredTensor, open_file

_INDEX = ".index.json"
#: The names, without suffix, of files that are parts of one checkpoint: shards, LightX2V's blocks and chunks.
_PART = re.compile(r"(?P<stem>.*)-(?P<part>\d+)-of-(?P<count>\d+)|block_\d+|non_block|.*_part\d+")


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
        for key, tensor in open_file(file, metadata).items():
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
