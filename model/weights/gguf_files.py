"""GGUF files, as ComfyUI-GGUF and its kin convert diffusion models: tensors in blocks of few bits.

The package ``gguf`` reads the header of the memory-mapped file and multiplies blocks out in float32, a tensor (or some
of its rows) at a time; types that it does not multiply out are named.

GGUF writes sizes in reverse order and, in most programs, at most four of them, without leading ones. What is lost is
told by ``comfy.gguf.orig_shape.<name>`` in the header, or else by what Wan's tensors are: a patch embedding has one
filter of a frame and 2 x 2 latent pixels for each number of its bias, and tables have a leading size of 1.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError, require
from model.weights.stored import StoredTensor

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

    class Reader(gguf.GGUFReader):
        """The package's reader, to which what lies beyond the end of a file is a value of no bytes, for ever."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, before what its header says")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(file)
        if reader.byte_order != "I":
            raise ValueError("expected little-endian numbers")
        written = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
        given = {tensor.name: reader.fields.get(_SHAPE + tensor.name) for tensor in reader.tensors}
        shapes = {
            name: _shape(name, written) if field is None else tuple(int(field.parts[i][0]) for i in field.data)
            for name, field in given.items()
        }
        for name, shape in shapes.items():
            if min(shape, default=0) < 0 or math.prod(shape) != math.prod(written[name]):
                raise ValueError(f"{_SHAPE}{name} is {list(shape)}, and the tensor has {list(written[name])}")
        return {tensor.name: _stored(file, tensor, shapes[tensor.name], gguf.quants) for tensor in reader.tensors}
    except (OSError, ValueError, LookupError, OverflowError, RecursionError, AttributeError) as error:
        # AttributeError: versions of the package before 0.16 with numpy 2, for numbers of the other byte order.
        raise InputError(f"weights: {file} is not a readable GGUF file: {error}") from error


def _stored(file: Path, tensor: Any, shape: tuple[int, ...], quants: Any) -> StoredTensor:
    kind = tensor.tensor_type
    dtype = _PLAIN.get(kind.name)
    if dtype is None and not _multiplies_out(kind):
        raise ValueError(f"{tensor.name!r} is {kind.name}, which the package gguf does not multiply out")

    def values(data: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        if dtype is not None:
            return torch.from_numpy(np.array(data).reshape(-1).view(np.uint8)).view(dtype).reshape(shape)
        with np.errstate(all="ignore"):  # what is not finite is named by who checks weights
            return torch.from_numpy(quants.dequantize(data, kind)).reshape(shape)

    def read_rows(start: int, stop: int) -> Tensor:
        if tensor.data.shape[:1] != shape[:1]:  # it was written in another shape: a patch embedding or a table
            return read()[start:stop]
        return values(tensor.data[start:stop], (stop - start, *shape[1:]))

    read = functools.partial(values, tensor.data, shape)
    name = kind.name if dtype is None else str(dtype).removeprefix("torch.")
    return StoredTensor(file, tensor.name, shape, name, read, read_rows, tensor.n_bytes if dtype is None else None)


@functools.cache
def _multiplies_out(kind: Any) -> bool:
    gguf = require("gguf", "gguf")
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # gguf's own answer for a kind that it only writes
        return False
    return True


def _shape(name: str, written: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape that a tensor had before it was written, by what Wan's tensors are."""
    shape = written[name]
    if name.endswith("patch_embedding.weight") and len(shape) < 5:
        filters = math.prod(written.get(name.replace("weight", "bias"), (0,)))
        each, rest = divmod(math.prod(shape), max(filters, 1) * math.prod(_PATCH))
        if filters and not rest:
            return filters, each, *_PATCH
    return (1, *shape) if _TABLES.fullmatch(name) and len(shape) == 2 else shape
