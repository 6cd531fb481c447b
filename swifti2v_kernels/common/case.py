"""Named calls of an operator: what the compile report compiles, and what is checked, timed and tuned on hardware."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cost import Cost, Work
from .registration import PACKAGE

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class RealSize:
    """A case's call as a real model makes it: ``inputs`` are uninitialised tensors, ``cost`` is its least cost."""

    shape: str
    inputs: Callable[[torch.device], Arguments]
    cost: Cost


@dataclass(frozen=True)
class Case:
    """One call: ``operator(*args, **kwargs)`` with ``args, kwargs = inputs(device)``, small tensors of fixed content.

    Sizes are small, but alignment, strides and numbers of views are those of real calls, so that the compiled code is
    the same. Where ``real`` is given, the case is timed and tuned at that size.
    """

    name: str
    operator: Callable[..., Any]
    inputs: Callable[[torch.device], Arguments]
    #: From a compiled kernel's constants.
    work: Callable[[Mapping[str, Any]], Work]
    real: RealSize | None = None
    #: Of the GPUs that have this kernel at all: float8 needs 89. On older ones the call takes the PyTorch path.
    least_capability: int = 80

    def run(self, device: torch.device) -> Any:
        """The call itself."""
        args, kwargs = self.inputs(device)
        return self.operator(*args, **kwargs)


def all_cases() -> Iterator[Case]:
    """``CASES`` of every family's ``cases.py``, in alphabetical order of the families."""
    folders = importlib.import_module(PACKAGE).__path__
    for file in sorted(path for folder in folders for path in Path(folder).glob("*/cases.py")):
        yield from importlib.import_module(f"{PACKAGE}.{file.parent.name}.cases").CASES
