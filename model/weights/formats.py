"""Formats of tensor files: safetensors, GGUF and pickles. Each is opened without reading more than its header.

Pickles are read with ``weights_only=True``; nothing is ever unpickled into code.

GGUF files, as ComfyUI-GGUF and its kin convert diffusion models, hold tensors in blocks of few bits. The package
``gguf`` reads the header of the memory-mapped file and multiplies blocks out in float32, a tensor (or some of its rows)
at a time; types that it does not multiply out are named. GGUF writes sizes in reverse order and, in most programs, at
most four of them, without leading ones. What is lost is told by ``comfy.gguf.orig_shape.<name>`` in the header, or else
by what Wan's tensors are: a patch embedding has one filter of a frame and 2 x 2 latent pixels for each number of its
bias, and tables have a leading size of 1.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError, printable, require

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: The dtypes, by torch's names, that weights and factors may have.
FLOATS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")
#: The dtypes of safetensors that torch calls otherwise.
_DTYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F4": "float4_e2m1fn_x2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
#: The types of GGUF that torch has, by either name.
_PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64} | {
    f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)
}
_SHAPE = "comfy.gguf.orig_shape."
_PATCH = (1, 2, 2)
_TABLES = re.compile(r"(?:.*\.)?(?:modulation|scale_shift_table|emb_pos|pos_embed)")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its key, its shape, the name of its dtype as torch has it, and functions that read it.

    ``read_rows`` reads from one index of the first dimension up to another, and nothing else of the file. A tensor in
    blocks of GGUF has the name of their type, such as ``Q4_K``, as dtype and ``packed_nbytes``; reading it multiplies
    the blocks out in float32.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    read_rows: Callable[[int, int], Tensor]
    packed_nbytes: int | None = None

    @property
    def is_float(self) -> bool:
        """Tells whether reading it gives floats that weights may have."""
        return self.dtype in FLOATS or self.packed_nbytes is not None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file."""
        if self.packed_nbytes is not None:
            return self.packed_nbytes
        kind = getattr(torch, self.dtype, None)
        return self.numel * (kind.itemsize if isinstance(kind, torch.dtype) else 1)


def open_file(file: Path, metadata: dict[str, str]) -> dict[str, StoredTensor]:
    """Opens one file and returns its tensors; what its header says beside them is added to ``metadata``."""
    if file.suffix == ".safetensors":
        return _open_safetensors(file, metadata)
    if file.suffix == ".gguf":
        return _open_gguf(file)
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

    def stored(key: str) -> StoredTensor:
        header = handle.get_slice(key)
        shape, dtype = tuple(header.get_shape()), _dtype_name(header.get_dtype())
        return StoredTensor(file, key, shape, dtype, lambda: handle.get_tensor(key), lambda i, j: header[i:j])

    return {key: stored(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)


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

    def stored(key: str, tensor: Tensor) -> StoredTensor:
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        return StoredTensor(file, key, shape, dtype, lambda: tensor, lambda start, stop: tensor[start:stop])

    return {key: stored(key, tensor) for key, tensor in tensors.items()}


def _open_gguf(file: Path) -> dict[str, StoredTensor]:
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
