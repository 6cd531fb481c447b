"""Counts of our operators that launch kernels, by what is dispatched."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """A mode that counts calls of our operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "swifti2v":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
