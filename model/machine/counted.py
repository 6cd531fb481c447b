"""Live bytes of tensors on the CPU, where torch's allocator keeps no count, and of ``meta`` tensors, which hold none.

A dispatch mode sees the result of every operator and follows the life of its memory. It cannot see buffers that an
operator allocates and frees inside itself (a convolution's workspace, for example).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_elsewhere = False


@contextmanager
def elsewhere() -> Iterator[None]:
    """Exempts what operators return in the body from all counts: it stands for memory that is not the device's."""
    global _elsewhere
    before, _elsewhere = _elsewhere, True
    try:
        yield
    finally:
        _elsewhere = before


class TensorMemory(TorchDispatchMode):
    """A mode that counts bytes alive: ``with TensorMemory(tensors) as memory: ...``, then ``memory.peak`` is the most.

    Counted are the given tensors, which existed before (weights, inputs), and all that operators return in the body;
    memory counts once, however many views of it there are.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in tensors:
            self._follow(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if storage.device.type not in ("cpu", "meta") or key in self._sizes:
            return
        self._sizes[key] = self._counted(storage)
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _counted(self, storage: torch.UntypedStorage) -> int:
        return 0 if _elsewhere else storage.nbytes()

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
