"""The job of a run: what is made, of which inputs, by which software on which device; its file, and what differs in it.

A job is a dictionary of sections, which are dictionaries too, as JSON has them. Inputs are told by fingerprints: of
weights by samples, since reading 28 GB would take longer than a segment, and of every other file by all of it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import swifti2v_kernels
from model.errors import InputError, one_line
from model.io.durable import open_plain, write_text
from model.weights.files import open_weights
from model.weights.formats import StoredTensor
from model.weights.scaled import largest

#: Version of the layout of a run's folder and its files.
SCHEMA = 3
#: How the file of a job begins, by which it is told from a user's file of its name.
BEGINS = b'{\n  "schema": '
#: Sections in which a difference means that the rest of the run has other bits, not that it is another run.
INEXACT = ("software", "machine")
#: Sections that are kept for the reader and not compared, such as the command as it was given.
UNCOMPARED = ("arguments",)
#: Tensors up to this many bytes are read whole: norms, biases, modulations.
_WHOLE = 1 << 16


def complete_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a job as it comes back from its file, where tuples are lists, with the section ``software``."""
    return json.loads(json.dumps({**job, "software": software()}, allow_nan=False))


def job_digest(job: dict[str, Any]) -> str:
    """Returns the sha256 of a job, which binds the files of a run to it."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def write_job(path: Path, job: dict[str, Any]) -> None:
    """Writes the file of a job, which is there as a whole or not at all."""
    text = json.dumps({"schema": SCHEMA, "sha256": job_digest(job), "job": job}, indent=2)
    write_text(path, text + "\n")


def read_job(path: Path) -> dict[str, Any]:
    """Returns the job in a file that anybody may have written.

    Raises:
        InputError: it cannot be read, is of another schema, was changed, or is no job.
    """
    try:
        with os.fdopen(open_plain(path), encoding="utf-8") as file:
            stored = json.load(file)
        schema, digest, job = stored["schema"], stored["sha256"], stored["job"]
        found = job_digest(job)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"run: {path} is not readable as the job of a run: {error}") from error
    if schema != SCHEMA:
        raise InputError(
            f"run: {path} has schema version {schema!r}, this program reads {SCHEMA}: go on with the program that began"
            " the run, or begin anew"
        )
    if digest != found:
        raise InputError(f"run: {path} is damaged or was edited (sha256 differs)")
    if not isinstance(job, dict) or not all(isinstance(section, dict) for section in job.values()):
        raise InputError(f"run: {path} is not readable as the job of a run: expected sections, each an object")
    return job


def software() -> dict[str, str | None]:
    """Returns the versions of the software that computes and encodes; None for what is not installed."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "swifti2v_kernels": swifti2v_kernels.__version__,
    }
    for package in ("torch", "triton", "av"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def device_name(device: torch.device) -> str:
    """Returns the name of a device: the card's name, or the kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


class Changes(NamedTuple):
    """The differences between a stored job and another, a line each: ``request.seed: 7 in the stored run, now 8``.

    A run cannot go on as this job if there are any in ``forbidding``. With those in ``inexact`` it can, but what is
    still to come is not the same bit for bit as it would have been.
    """

    forbidding: list[str]
    inexact: list[str]


def changes_between(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Returns the differences between two jobs."""
    changes = Changes([], [])
    for section in sorted(stored.keys() | now.keys()):
        if section not in UNCOMPARED:
            found = _differences(one_line(section), stored.get(section, {}), now.get(section, {}))
            changes[section in INEXACT].extend(found)
    return changes


def _differences(where: str, stored: Any, now: Any) -> list[str]:
    if isinstance(stored, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(stored.keys() | now.keys()):
            name = f"{where}.{one_line(key)}"
            if key not in now:
                lines.append(f"{name}: {_shown(stored[key])} in the stored run, not given now")
            elif key not in stored:
                lines.append(f"{name}: not in the stored run, now {_shown(now[key])}")
            else:
                lines += _differences(name, stored[key], now[key])
        return lines
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        pairs = enumerate(zip(stored, now, strict=True))
        return [line for index, pair in pairs for line in _differences(f"{where}[{index}]", *pair)]
    # JSON tells 1 from 1.0 and from true, Python's == does not.
    if json.dumps(stored) == json.dumps(now):
        return []
    return [f"{where}: {_shown(stored)} in the stored run, now {_shown(now)}"]


def _shown(value: Any) -> str:
    text = one_line(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."


def fingerprint(path: str | Path) -> str:
    """Returns the fingerprint of a checkpoint that :func:`model.weights.files.open_weights` can open.

    It is a sha256 over ``config.json`` and, in the order of the keys, every tensor's key, dtype, shape and bytes: all
    bytes of a tensor of at most 65,536, those of the first and the last row of a larger one. Other training, another
    quantisation or merged LoRAs change some of these; damage between the rows that are read does not. The name of the
    file, its format (safetensors or pickle) and its division into shards are not part of it.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: there is nothing readable at ``path``, or one of the numbers that are read is not finite.
    """
    path = Path(path)
    checkpoint = open_weights(path)
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for key, stored in sorted(checkpoint.tensors.items()):
        try:
            sample = _sample(stored)
            add_tensors(digest, key, stored.dtype, stored.shape, sample)
        except Exception as error:
            # safetensors and torch say in many ways that they have no such dtype. Nothing but the reading happens here.
            raise InputError(f"weights: {path}: {key} ({stored.dtype}) cannot be read: {error}") from error
        # The loaders check all numbers; a model that is nothing but NaN is told of before the first stage.
        for part in sample if stored.is_float else []:
            largest(part, f"weights: {stored.file}: {key}")
    return digest.hexdigest()


def fingerprint_file(path: str | Path, what: str = "file") -> str:
    """Returns the sha256 of a whole file (a photograph, a LoRA, text embeddings), 64 hexadecimal digits.

    Raises:
        InputError: it cannot be read; the message begins with ``what``.
    """
    if not Path(path).is_file():  # a pipe would be waited for
        raise InputError(f"{what}: {path} {'is not a file' if os.path.lexists(path) else 'does not exist'}")
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise InputError(f"{what}: {path} cannot be read: {error}") from error
    return digest.hexdigest()


def add_tensors(digest: hashlib._Hash, key: str, dtype: str, shape: tuple[int, ...], tensors: Iterable[Tensor]) -> None:
    """Adds a tensor to a hash: its key, dtype and shape as JSON, then the bytes of its parts ``tensors``."""
    digest.update(json.dumps([key, dtype, list(shape)]).encode())
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _sample(stored: StoredTensor) -> list[Tensor]:
    if stored.nbytes <= _WHOLE or not stored.shape:
        return [stored.read()]
    last = stored.shape[0] - 1
    return [stored.read_rows(0, 1), stored.read_rows(last, last + 1)]
