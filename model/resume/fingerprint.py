"""Fingerprints, by which a run knows whether its inputs are those that it was begun with.

Weights are told by samples, since reading 28 GB would take longer than a segment; every other file is read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError
from model.weights.files import open_weights
from model.weights.scaled import largest
from model.weights.stored import StoredTensor

#: Tensors up to this many bytes are read whole: norms, biases, modulations.
_WHOLE = 1 << 16


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
