"""Host memory: pinned, of exactly the size that is asked for, and what waits in it while the device is needed."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from collections import defaultdict
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PAGE = 4096


class Host:
    """Moves tensors away from ``device`` while they wait, if ``enabled`` and the device is not the CPU itself.

    Copies are ordered with the work on the current stream; those to pinned memory do not stop it.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.device = device
        self.enabled = enabled and device.type != "cpu"
        self._pool = PinnedPool(device) if self.enabled and device.type == "cuda" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for what is assembled while tiles come and go."""
        if not self.enabled:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        if self._pool is None:
            return torch.empty(tuple(shape), dtype=dtype)
        return self._pool.take(prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))

    def near(self, target: Tensor) -> Tensor:
        """Memory on the device for what belongs into ``target``: itself where nothing is moved."""
        return torch.empty(target.shape, dtype=target.dtype, device=self.device) if self.enabled else target

    def park(self, x: Tensor) -> Tensor:
        """``x`` for later; itself where nothing is moved."""
        if not self.enabled:
            return x
        # A copy that stays dense even of a view into something larger.
        return self.empty(x.shape, x.dtype).copy_(x, non_blocking=True)

    def fetch(self, x: Tensor) -> Tensor:
        """What was parked, or a part of it, on the device again."""
        return x.to(self.device, non_blocking=True) if self.enabled else x


class PinnedPool:
    """Pinned buffers that are given out again when the tensors in them are gone.

    Everything that reads or writes them is on one stream, so a buffer's next use is behind its last.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def take(self, size: int) -> Tensor:
        """``size`` bytes, uint8; they come back by themselves."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        free = self._free[size]
        flat = free.pop() if free else pinned_bytes(size, self._device)
        # The tensor that is given out holds the lease, and the end of the lease gives the buffer back.
        lease = flat.numpy().view(_Lease)
        weakref.finalize(lease, _give_back, weakref.ref(self), flat).atexit = False
        return torch.from_numpy(lease)


def _give_back(pool: weakref.ref[PinnedPool], flat: Tensor) -> None:
    alive = pool()
    if alive is not None:
        alive._free[flat.numel()].append(flat)


class _Lease(np.ndarray):
    """A view that can be watched."""


def pinned_bytes(size: int, device: torch.device) -> Tensor:
    """``size`` bytes of host memory, uint8, that a GPU copies from and to without a stop.

    torch's own pinned memory is rounded up to a power of two (706 MB to 1 GiB) and never given back; this is registered
    as it is, in whole pages that it shares with nothing. Where registering fails, the memory is an ordinary one, and a
    warning says that copies are slower.
    """
    whole = -(-size // PAGE) * PAGE
    base = torch.empty(whole + PAGE, dtype=torch.uint8)
    start = -base.data_ptr() % PAGE
    flat = base[start : start + size]
    if not size:
        return flat
    code = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), whole, 0))
    if code != 0:
        _clear_error(device)
        message = f"{size:,} bytes of host memory could not be pinned (CUDA error {code}); copies from them are slower"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return flat
    weakref.finalize(base.untyped_storage(), _unpin, flat.data_ptr(), device).atexit = False
    return flat


def _unpin(address: int, device: torch.device) -> None:
    # A copy may still read it.
    torch.cuda.synchronize(device)
    if int(torch.cuda.cudart().cudaHostUnregister(address)) != 0:
        _clear_error(device)


def _clear_error(device: torch.device) -> None:
    """Takes back the error that a failed call has left, which the next launch, whatever it is, would report."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return  # this was that launch


def release(device: torch.device) -> None:
    """Gives the memory of a model that is no longer referenced back, before the next one arrives."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine_memory(root: Path = Path("/")) -> int | None:
    """Bytes of this machine's memory, or less where the process's control group has less; None: it cannot be told.

    Args:
        root: of the file system that ``proc`` and ``sys`` are read from.
    """
    sizes = []
    for line in _lines(root / "proc/meminfo"):
        if match := re.match(r"MemTotal:\s+(\d+) kB", line):
            sizes.append(1024 * int(match[1]))
    groups = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, names, path = line.split(":", 2)
        if number == "0":  # version 2: a limit of any group above it holds too
            own = groups / path.lstrip("/")
            inside = [own, *own.parents][: len(Path(path.lstrip("/")).parts) + 1]
            files = [folder / "memory.max" for folder in inside]
        elif "memory" in names.split(","):
            files = [
                groups / "memory" / path.lstrip("/") / "memory.limit_in_bytes",
                groups / "memory/memory.limit_in_bytes",
            ]
        else:
            continue
        sizes += [int(text) for file in files for text in _lines(file) if text.isdecimal()]
    return min(sizes, default=None)


def _lines(path: Path) -> list[str]:
    """Of a file of the kernel's; none where it does not exist or may not be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
