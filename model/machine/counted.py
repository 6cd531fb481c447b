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
_ATEN = torch.ops.aten
#: Operators of numbers one by one, with the results' shape and dtype those of the first operand.
_POINTWISE = {
    _ATEN.add.Tensor, _ATEN.add_.Tensor, _ATEN.add_.Scalar, _ATEN.clamp_.default, _ATEN.clamp_min.default,
    _ATEN.div.Tensor, _ATEN.floor_.default, _ATEN.mul.Tensor, _ATEN.pow.Tensor_Scalar, _ATEN.rsqrt.default,
    _ATEN.silu.default, _ATEN.sqrt.default, _ATEN.sub.Tensor,
}  # fmt: skip


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

    # Else torch would import torch._dynamo, which takes a second, to keep it away from this mode.
    _should_skip_dynamo = classmethod(lambda cls: False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN.addcmul.out and kwargs["out"].is_meta:
            result = kwargs["out"]  # there is nothing to write
        else:
            result = None if kwargs else _without_memory(func, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
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


def _without_memory(func: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    """Returns what a frequent operator makes of ``meta`` tensors; None if it is another one or not so simple.

    Torch finds the same in Python code, for which it imports sympy and torch._dynamo: most of the time of a plan.
    """
    if func is _ATEN.convolution.default and args[0].is_meta and not args[6]:
        x, weight, _, *numbers = args
        taps = zip(x.shape[2:], weight.shape[2:], *numbers[:3], strict=True)
        sizes = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k, stride, padding, dilation in taps]
        return x.new_empty((x.shape[0], weight.shape[0], *sizes))
    reduces = func in (_ATEN.mean.dim, _ATEN.sum.dim_IntList) and args[1]
    if reduces and args[0].is_meta and args[0].is_floating_point():
        gone, kept = [axis % args[0].ndim for axis in args[1]], args[2:] == (True,)
        return args[0].new_empty([1 if i in gone else n for i, n in enumerate(args[0].shape) if kept or i not in gone])
    if func is _ATEN.addmm.default and args[1].is_meta:
        return args[1].new_empty((args[1].shape[0], args[2].shape[1]))
    if func in (_ATEN.cat.default, _ATEN.stack.default):
        parts, first, dim = args[0], args[0][0], args[1] if len(args) > 1 else 0
        if all(part.is_meta and (part.dtype, part.ndim) == (first.dtype, first.ndim) for part in parts):
            shape = [*first.shape]
            if func is _ATEN.stack.default:
                shape.insert(dim % (first.ndim + 1), len(parts))
            else:
                shape[dim] = sum(part.shape[dim] for part in parts)
            return first.new_empty(shape)
    # What is expanded has strides of 0.
    if func not in _POINTWISE or not (args[0].is_meta and args[0].is_floating_point() and all(args[0].stride())):
        return None
    first, shape = args[0], args[0].shape
    for other in args[1:]:
        if isinstance(other, torch.Tensor):
            sizes = zip(other.shape[::-1], shape[::-1], strict=False)
            if other.dtype != first.dtype or other.ndim > first.ndim or any(n not in (1, m) for n, m in sizes):
                return None
    if func.name().split(".")[0].endswith("_"):
        return first
    # The axes of the result are in the order that those of the operand have in memory.
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    return first.new_empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(first.ndim)])
