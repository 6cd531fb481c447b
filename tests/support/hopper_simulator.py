"""Runs a warp-specialised Gluon kernel on the CPU: one thread per partition, with mocks of TMA, mbarriers and wgmma.

Gluon has no interpreter. This one executes the kernel's own Python source with another ``gl``, and makes the hardware
as unkind as it may be:

* a TMA load makes its tile NaN at once and fills it a random moment later, when it also completes its barrier;
* an asynchronous matmul reads its operands either when it is issued or when it is waited for, at random;
* waiting for a barrier that nobody completes is reported as a deadlock.

It finds wrong indices, phases and masks, reads of tiles that are not there yet, and tiles given back too early. It
knows nothing of layouts, registers and the memory model.
"""

from __future__ import annotations

import random
import threading
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction


class ProtocolError(AssertionError):
    """The error that the kernel broke a rule of the hardware."""


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes are in."""

    def __init__(self, patience: float) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.parity = 0
        self.patience = patience

    def _advance(self) -> None:
        if self.count and self.pending == 0 and self.bytes == 0:
            self.parity ^= 1
            self.pending = self.count
            self.changed.notify_all()

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1, expected_bytes: int = 0) -> None:
        with self.changed:
            if self.pending < count:
                raise ProtocolError("more arrivals than the barrier counts")
            self.pending -= count
            self.bytes += expected_bytes
            self._advance()

    def complete(self, num_bytes: int) -> None:
        with self.changed:
            self.bytes -= num_bytes
            self._advance()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.parity != (parity & 1), self.patience):
                raise ProtocolError("deadlock: a barrier's phase never ends")


class Shared:
    """A shared-memory descriptor over a tensor."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape, self.dtype = data, tuple(data.shape), data.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    def load(self, layout: None) -> Tensor:
        return self.data.clone()


class Barriers(list):
    """A shared-memory descriptor over barriers."""

    def index(self, i: Any) -> Barrier:
        return self[int(i)]


@dataclass
class Pointer:
    """A pointer to elements of a storage: a base and an offset, which may be a tensor of offsets."""

    memory: Tensor
    offset: Any

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


class Product:
    """An asynchronous matmul that has perhaps not read its operands yet."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.value, self.done = compute, None, False

    def run(self) -> Tensor | None:
        if not self.done:
            self.value, self.done = self.compute(), True
        return self.value


#: The matmuls in flight, per partition.
_warps = threading.local()


def _load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    mask = mask.expand_as(pointer.offset)
    out = torch.full(pointer.offset.shape, other, dtype=pointer.memory.dtype)
    out[mask] = pointer.memory[pointer.offset[mask]]
    return out


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    mask = mask.expand_as(pointer.offset)
    pointer.memory[pointer.offset[mask]] = value.to(pointer.memory.dtype)[mask]


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Tensor) and condition.ndim:
        return torch.where(condition, a, torch.tensor(b, dtype=a.dtype))
    return a if condition else b


def _tma_load(descriptor: Any, coordinates: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    """Loads a tile [1, 1, rows, D] of a tensor [B, H, L, D]."""
    b, h, row, column = (int(x) for x in coordinates)
    tile = target.data
    if column or tile.shape != descriptor.tile:
        raise ProtocolError(f"TMA tile {tuple(tile.shape)} at column {column} does not fit the descriptor")
    tile.fill_(float("nan"))

    def land() -> None:
        time.sleep(random.random() * 0.002)
        rows = descriptor.base[b, h, row : row + tile.shape[2]]
        tile.zero_()
        tile[0, 0, : len(rows)] = rows
        barrier.complete(tile.numel() * tile.element_size())

    threading.Thread(target=land, daemon=True).start()


def _mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    def compute() -> Tensor:
        left = a.data if isinstance(a, Shared) else a
        product = left.float() @ b.data.float()
        return product + (acc.run() if isinstance(acc, Product) else acc) if use_acc else product

    product = Product(compute)
    in_flight = vars(_warps).setdefault("products", [])
    in_flight.append(product)
    if random.random() < 0.5:
        for earlier in in_flight:
            earlier.run()
    return product


def _mma_wait(left: int, deps: Sequence[Any]) -> Any:
    while len(_warps.products) > left:
        _warps.products.pop(0).run()
    if any(x in _warps.products for x in deps if isinstance(x, Product)):
        raise ProtocolError("the result of a product that may still be in flight")
    results = tuple(x.value if isinstance(x, Product) else x for x in deps)
    return results[0] if len(results) == 1 else results


class _MBarrier:
    MBarrierLayout = staticmethod(lambda: None)
    init = staticmethod(lambda barrier, count: barrier.init(count))
    expect = staticmethod(lambda barrier, num_bytes: barrier.arrive(1, num_bytes))

    @staticmethod
    def arrive(barrier: Barrier, count: int) -> None:
        barrier.arrive(count)
        time.sleep(random.random() * 0.002)  # time for the others to use what was given back

    @staticmethod
    def wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
        if pred:
            barrier.wait(int(phase))


def _language(program: tuple[int, ...], patience: float, start: Callable[..., None]) -> SimpleNamespace:
    def allocate(dtype: torch.dtype, shape: Sequence[int], layout: None) -> Shared:
        if dtype is torch.int64:
            return Barriers(Barrier(patience) for _ in range(shape[0]))
        return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype))

    layout = MagicMock(return_value=None)
    return SimpleNamespace(
        float32=torch.float32, int64=torch.int64, constexpr=None, static_range=range, warp_specialize=start,
        program_id=lambda axis: torch.tensor(program[axis]), allocate_shared_memory=allocate,
        load=_load, store=_store, where=_where, exp2=torch.exp2, log2=torch.log2, maximum=torch.maximum,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        expand_dims=lambda x, axis: x.unsqueeze(axis), convert_layout=lambda x, layout: x,
        arange=lambda a, b, layout: torch.arange(a, b), zeros=lambda shape, dtype, layout: torch.zeros(shape),
        full=lambda shape, value, dtype, layout: torch.full(shape, value),
        NVMMADistributedLayout=layout, NVMMASharedLayout=layout, SliceLayout=layout, DotOperandLayout=layout,
        BlockedLayout=layout,
    )  # fmt: skip


class SimulatedKernel:
    """Stands in for a ``@gluon.jit`` kernel: ``kernel[grid](*args, **kwargs)`` runs every program in turn."""

    def __init__(self, module: ModuleType, kernel: GluonJITFunction, patience: float = 10.0) -> None:
        self.module, self.kernel, self.patience = module, kernel, patience

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
            values = [self._argument(x) for x in args]
            for program in ((x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])):
                self._run(program, values, constants)

        return launch

    @classmethod
    def _argument(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cls._argument(x) for x in value)
        if isinstance(value, Tensor):
            flat = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
            return Pointer(flat, torch.tensor(value.storage_offset()))
        if hasattr(value, "block_shape"):
            base = value.base
            return SimpleNamespace(base=base, tile=tuple(value.block_shape), dtype=base.dtype, layout=None)
        return value

    def _run(self, program: tuple[int, ...], values: Sequence[Any], constants: dict[str, Any]) -> None:
        errors: list[BaseException] = []

        def start(partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *resources: Any) -> None:
            def work(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
                try:
                    function(*arguments)
                except BaseException as error:  # re-raised by the launching thread
                    errors.append(error)

            threads = [threading.Thread(target=work, args=partition) for partition in partitions]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if errors:
                raise errors[0]

        names = vars(self.module) | {
            "gl": _language(program, self.patience, start), "mbarrier": _MBarrier, "tma_load": _tma_load,
            "warpgroup_mma": _mma, "warpgroup_mma_wait": _mma_wait, "fence_async_shared": lambda: None,
        }  # fmt: skip
        for name, value in vars(self.module).items():
            if isinstance(value, GluonJITFunction):
                names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        kernel = self.kernel.fn
        types.FunctionType(kernel.__code__, names, kernel.__name__, kernel.__defaults__)(*values, **constants)
