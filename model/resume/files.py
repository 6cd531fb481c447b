"""Files of named tensors that carry a hash of their name, their run and their contents, so that damage is noticed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.errors import require
from model.io.durable import open_plain, replacing, writing
from model.resume.fingerprint import add_tensors

#: The shapes of tensors by name; None stands for any size.
Shapes = Mapping[str, tuple[int | None, ...]]


class DamagedError(Exception):
    """A file is not as it was written, or not what is needed, and the message says in which way."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], run: str) -> None:
    """Writes tensors, on any device, to a file that is there as a whole or not at all.

    Args:
        path: a name that ends in ``.safetensors``.
        tensors: the tensors by name.
        run: the digest of the run's job.
    """
    # Each tensor is copied, since safetensors does not write tensors that share memory.
    host = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    data = require("safetensors.torch", "generate").save(host, metadata={"sha256": _digest(host, path.stem, run)})
    # safetensors' own save_file writes to another temporary name, which nobody would clean up.
    with writing(f"run: {path}"), replacing(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: Path, run: str) -> dict[str, Tensor]:
    """Returns the tensors, on the CPU, that :func:`write_tensors` has written to ``path`` for this run.

    Raises:
        DamagedError: the file has changed since, or was written under another name or for another run.
    """
    safe_open = require("safetensors", "generate").safe_open
    try:
        os.close(open_plain(path))  # safe_open would follow a link and wait for a pipe
        with safe_open(path, framework="pt") as file:
            recorded = (file.metadata() or {}).get("sha256")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:
        # The error of a damaged header depends on its bytes, and safetensors' own is no OSError or ValueError.
        # Nothing but the reading of this file happens in here.
        raise DamagedError(f"not readable: {error}") from error
    if recorded is None:
        raise DamagedError("it has no sha256")
    if recorded != _digest(tensors, path.stem, run):
        raise DamagedError("sha256 differs")
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], wanted: Shapes) -> None:
    """Checks that the tensors are those of ``wanted``, in float32 and finite, as all that a run keeps is.

    Raises:
        DamagedError: one is missing, is there in addition, has another shape or dtype, or is not finite.
    """
    if tensors.keys() != wanted.keys():
        raise DamagedError(f"expected {', '.join(sorted(wanted))} in it, got {', '.join(sorted(tensors)) or 'nothing'}")
    for key, shape in wanted.items():
        tensor = tensors[key]
        fits = tensor.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.dtype != torch.float32:
            size = ", ".join("any" if n is None else str(n) for n in shape)
            raise DamagedError(f"expected {key} [{size}] float32, got {list(tensor.shape)} {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise DamagedError(f"{key} holds NaN or infinity")


def _digest(tensors: Mapping[str, Tensor], name: str, run: str) -> str:
    digest = hashlib.sha256(f"{name} of {run}".encode())
    for key, tensor in sorted(tensors.items()):
        add_tensors(digest, key, str(tensor.dtype), tuple(tensor.shape), [tensor])
    return digest.hexdigest()
