"""Named calls of the operators, which are compiled, checked, timed and tuned, and the least cost of such a call."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .registration import PACKAGE

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiply-add is two) and bytes that must cross device memory at least once."""

    flops: int
    bytes_read: int
    bytes_written: int

    @property
    def bytes(self) -> int:
        """The least traffic in both directions, in bytes."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Work:
    """The work of one pass over a kernel's main loop, for all warps of a program; without a loop, of a whole program.

    ``fma`` are multiply-adds on the tensor cores; ``loaded`` bytes that the program fetches, which may come from L2.
    ``groups`` are the parts of a program that run through the loop without waiting for each other.
    """

    fma: int
    loaded: int
    groups: int = 1


@dataclass(frozen=True)
class RealSize:
    """The call of a case as a real model makes it: ``inputs`` are uninitialised tensors, ``cost`` is its least cost."""

    shape: str
    inputs: Callable[[torch.device], Arguments]
    cost: Cost


@dataclass(frozen=True)
class Case:
    """A named call, ``operator(*args, **kwargs)`` with ``args, kwargs = inputs(device)``: small tensors, fixed values.

    Sizes are small, but alignment, strides and numbers of views are those of real calls, so that the compiled code is
    the same. Where ``real`` is given, the case is timed and tuned at that size.
    """

    name: str
    operator: Callable[..., Any]
    inputs: Callable[[torch.device], Arguments]
    #: The work of one pass over the kernel's main loop, from the constants that it was compiled with.
    work: Callable[[Mapping[str, Any]], Work]
    real: RealSize | None = None
    #: The least capability of the GPUs that have this kernel: float8 needs 89. On older ones PyTorch computes the call.
    least_capability: int = 80

    def run(self, device: torch.device) -> Any:
        """Makes the call on ``device`` and returns its result."""
        args, kwargs = self.inputs(device)
        return self.operator(*args, **kwargs)


def all_cases() -> Iterator[Case]:
    """Yields the ``CASES`` of every family's ``cases.py``, in alphabetical order of the families."""
    folders = importlib.import_module(PACKAGE).__path__
    for file in sorted(path for folder in folders for path in Path(folder).glob("*/cases.py")):
        yield from importlib.import_module(f"{PACKAGE}.{file.parent.name}.cases").CASES
