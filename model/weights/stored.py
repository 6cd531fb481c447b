"""A tensor as a file holds it, whatever the file's format."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: The dtypes, by torch's names, that weights and factors may have.
FLOATS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")


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
