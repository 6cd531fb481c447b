"""Named calls of an operator: what the compile report compiles, and what is checked, timed and tuned on hardware."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from swifti2v_kernels.common.cost import Cost, Work

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
