"""A clock that runs by what is computed: a second for every element that operators return.

The same work takes the same time on it, whatever else the machine does, so that what is said of times can be exact.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.csg import extrapolated
from bench.harness import timing
from tests.support.memory_requests import predict_nothing


class OperationClock(TorchDispatchMode):
    """A mode in which time passes for what the benchmark of clips measures."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def seconds(self) -> float:
        """Returns the time that it is now."""
        return float(self.elements)

    def install(self, patch: pytest.MonkeyPatch, *modules: ModuleType) -> OperationClock:
        """Makes this clock that of the benchmark.

        These modules collect no garbage and predict no memory, both of which take longer than toy sizes do.
        """
        predict_nothing(patch)
        for module in modules:
            patch.setattr(module, "release", lambda device: None)
        for module in (timing, extrapolated):
            patch.setattr(module, "time", SimpleNamespace(perf_counter=self.seconds, monotonic=self.seconds))
        return self
