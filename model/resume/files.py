"""Files of named tensors that know what they are: a hash of their name, their run and their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.errors import require
from model.io.durable import replacing
from model.resume.fingerprint import add_tensors


class DamagedError(Exception):
    """What is wrong with a file."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], run: str) -> None:
    """Writes tensors, on any device, under a temporary name first.

    Args:
        path: ending in ``.safetensors``.
        tensors: by name.
        run: the digest of the run's job.
    """
    # Copies: safetensors does not write tensors that share memory.
    host = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    data = require("safetensors.torch", "generate").save(host, metadata={"sha256": _digest(host, path.stem, run)})
    # Not by its save_file, which writes to another temporary name, one that nobody would clean up.
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: Path, run: str) -> dict[str, Tensor]:
    """What :func:`write_tensors` wrote there for this run.

    Raises:
        DamagedError: it is not that any more, or was written under another name or for another run.
    """
    safe_open = require("safetensors", "generate").safe_open
    try:
        with safe_open(path, framework="pt") as file:
            recorded = (file.metadata() or {}).get("sha256")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:
        # What a damaged header does depends on its bytes, and safetensors' own error is no OSError or ValueError.
        # Nothing but the reading of this file happens in here.
        raise DamagedError(f"not readable: {error}") from error
    if recorded is None:
        raise DamagedError("it has no sha256")
    if recorded != _digest(tensors, path.stem, run):
        raise DamagedError("sha256 differs")
    return tensors


def _digest(tensors: Mapping[str, Tensor], name: str, run: str) -> str:
    digest = hashlib.sha256(f"{name} of {run}".encode())
    for key, tensor in sorted(tensors.items()):
        add_tensors(digest, key, str(tensor.dtype), tuple(tensor.shape), [tensor])
    return digest.hexdigest()
