"""GGUF files, as ComfyUI-GGUF and its kin convert diffusion models: tensors in blocks of few bits.

The header is read here and trusted in nothing: counts, lengths, shapes and offsets are held against the file, which is
memory-mapped, before anything is made of them. Blocks are multiplied out in float32 by the ``gguf`` package, a tensor
(or the blocks of some of its rows) at a time; types that it does not multiply out are named.

GGUF writes sizes in reverse order and, in most programs, at most four of them, without leading ones. What is lost is
told by ``comfy.gguf.orig_shape.<name>`` in the header, or else by what Wan's tensors are: a patch embedding has one
filter of a frame and 2 x 2 latent pixels for each number of its bias, and tables have a leading size of 1.
"""

from __future__ import annotations

import functools
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError, require
from model.weights.stored import StoredTensor

#: Files are refused whose header goes on beyond this many bytes: those of Wan have 0.2 MB.
_LONGEST_HEADER = 16 << 20
_MOST_SIZES = 8
#: struct's letters of the types of values in a header; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: Types that torch has, by the names that GGUF and torch give them.
_PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64} | {
    f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)
}
_SHAPE = "comfy.gguf.orig_shape."
_PATCH = (1, 2, 2)
_TABLES = re.compile(r"(?:.*\.)?(?:modulation|scale_shift_table|emb_pos|pos_embed)")


def open_gguf(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a GGUF file by their names, having read its header alone.

    Raises:
        InputError: the package ``gguf`` is not installed, the header says what cannot be, or the file ends early.
    """
    gguf = require("gguf", "gguf")
    try:
        return _Header(file, np.asarray(np.memmap(file, mode="r", dtype=np.uint8)), gguf).tensors()
    except InputError:
        raise
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"weights: {file} is not a readable GGUF file: {error}") from error


class _Header:
    """A header that is read from its start to its end."""

    def __init__(self, file: Path, data: np.ndarray, gguf: Any) -> None:
        self._file, self._data, self._gguf, self._at = file, data, gguf, 0

    def tensors(self) -> dict[str, StoredTensor]:
        if bytes(self._data[:4]) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version, num_tensors, num_values = self._take("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3 in little-endian order")
        values = {}
        for _ in range(num_values):
            key = self._string()
            values[key] = self._value(key, *self._take("I"))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self._string()
            (rank,) = self._take("I")
            if rank > _MOST_SIZES:
                raise ValueError(f"{name!r} has {rank} sizes, expected at most {_MOST_SIZES}")
            *sizes, kind, offset = self._take(f"{rank}QIQ")
            if name in found:
                raise ValueError(f"it holds {name!r} twice")
            found[name] = tuple(reversed(sizes)), kind, offset
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, expected a power of 2 of at least 8")
        start = -(-self._at // alignment) * alignment
        return {
            name: self._tensor(name, written, _shape(name, written, values, found), kind, start + offset)
            for name, (written, kind, offset) in found.items()
        }

    def _take(self, kinds: str) -> tuple[Any, ...]:
        """Reads numbers that follow each other."""
        taken = struct.Struct(f"<{kinds}")
        return taken.unpack(self._bytes(taken.size))

    def _bytes(self, count: int) -> bytes:
        end = self._at + count
        if end > min(len(self._data), _LONGEST_HEADER):
            raise ValueError(f"its header goes on beyond byte {min(len(self._data), _LONGEST_HEADER)}")
        taken, self._at = bytes(self._data[self._at : end]), end
        return taken

    def _string(self) -> str:
        return self._bytes(*self._take("Q")).decode()

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"{key!r} has the type {kind}, which GGUF has not")
        inner, count = self._take("IQ")
        if inner == _STRING:
            for _ in range(count):
                self._string()
            return None
        if inner not in _SCALARS:
            raise ValueError(f"{key!r} is an array of type {inner}, expected numbers or strings")
        values = self._bytes(count * struct.calcsize(_SCALARS[inner]))
        return struct.unpack(f"<{count}{_SCALARS[inner]}", values) if key.startswith(_SHAPE) else None

    def _tensor(self, name: str, written: tuple[int, ...], shape: tuple[int, ...], kind: int, at: int) -> StoredTensor:
        types, sizes = self._gguf.GGMLQuantizationType, self._gguf.GGML_QUANT_SIZES
        if kind not in types._value2member_map_ or types(kind) not in sizes:
            raise ValueError(f"{name!r} has the type {kind}, which this version of the package gguf does not know")
        block, block_nbytes = sizes[types(kind)]
        numel, last = math.prod(written), written[-1] if written else 1
        if last % block:
            raise ValueError(
                f"{name!r} has rows of {last} numbers, expected a multiple of {types(kind).name}'s {block}"
            )
        nbytes = numel // block * block_nbytes
        if at + nbytes > len(self._data):
            raise ValueError(f"{name!r} ends at byte {at + nbytes}, beyond the file's {len(self._data)}")
        data, dtype = self._data[at : at + nbytes], _PLAIN.get(types(kind).name)
        if dtype is None and not _multiplies_out(types(kind)):
            raise ValueError(f"{name!r} is {types(kind).name}, which the package gguf does not multiply out")

        def rows(start: int, stop: int) -> Tensor:
            row = numel // shape[0] if shape and shape[0] else 0
            first, end = (start * row, stop * row) if shape else (0, 1)
            if dtype is not None:
                flat = torch.from_numpy(data[first * dtype.itemsize : end * dtype.itemsize].copy()).view(dtype)
            else:
                begin = first // block
                blocks = data[begin * block_nbytes : -(-end // block) * block_nbytes]
                # The package works through some rows at a time: those of the file, where they are whole.
                width = last // block * block_nbytes
                blocks = blocks.reshape(-1, block_nbytes if len(blocks) % width else width)
                with np.errstate(all="ignore"):  # what is not finite is named by who checks weights
                    wide = self._gguf.quants.dequantize(blocks, types(kind)).reshape(-1)
                flat = torch.from_numpy(wide[first - begin * block : end - begin * block])
            return flat.reshape(stop - start, *shape[1:]) if shape else flat.reshape(())

        name_of_dtype = types(kind).name if dtype is None else str(dtype).removeprefix("torch.")
        whole = functools.partial(rows, 0, shape[0] if shape else 1)
        return StoredTensor(self._file, name, shape, name_of_dtype, whole, rows, nbytes if dtype is None else None)


@functools.cache
def _multiplies_out(kind: Any) -> bool:
    gguf = require("gguf", "gguf")
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _shape(name: str, written: tuple[int, ...], values: dict[str, Any], found: dict[str, Any]) -> tuple[int, ...]:
    """Returns the shape that a tensor had before it was written."""
    given = values.get(_SHAPE + name)
    if given is not None:
        if not isinstance(given, tuple) or not all(type(size) is int and size >= 0 for size in given):
            raise ValueError(f"{_SHAPE}{name} is {given!r}, expected sizes")
        if math.prod(given) != math.prod(written):
            raise ValueError(f"{_SHAPE}{name} is {list(given)}, and the tensor has {list(written)}")
        return given
    if name.endswith("patch_embedding.weight") and len(written) < 5:
        (filters,) = found.get(name.replace("weight", "bias"), ((0,),))[0] or (0,)
        each, rest = divmod(math.prod(written), max(filters, 1) * math.prod(_PATCH))
        if filters and not rest:
            return filters, each, *_PATCH
    if _TABLES.fullmatch(name) and len(written) == 2:
        return 1, *written
    return written
