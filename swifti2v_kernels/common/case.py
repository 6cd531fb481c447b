"""Named calls of an operator: what the compile report compiles and the benchmarks start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from swifti2v_kernels.common.cost import Work


@dataclass(frozen=True)
class Case:
    """One call: ``operator(*args, **kwargs)`` with ``args, kwargs = inputs(device)``, small tensors of fixed content.

    Sizes are small, but alignment, strides and numbers of views are those of real calls, so that the compiled code is
    the same.
    """

    name: str
    operator: Callable[..., Any]
    inputs: Callable[[torch.device], tuple[tuple[Any, ...], dict[str, Any]]]
    #: From a compiled kernel's constants.
    work: Callable[[Mapping[str, Any]], Work]

    def run(self, device: torch.device) -> Any:
        """The call itself."""
        args, kwargs = self.inputs(device)
        return self.operator(*args, **kwargs)
