"""Host memory, pinned and of exactly the size that is asked for, in which tensors wait while the device is needed."""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from model.machine.counted import elsewhere

PAGE = 4096


class Host:
    """Host memory to which tensors of ``device`` move while they wait, if ``enabled`` and the device is not the CPU.

    Copies are ordered with the work on the current stream; those to pinned memory do not stop it. Pinned buffers are
    given out again when the tensors in them are gone: everything that reads or writes them is on one stream, so a
    buffer's next use comes after its last. Of tensors on ``meta`` those that wait are there too, and do not count.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.device = device
        self.enabled = enabled and device.type != "cpu"
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns memory, not initialised, for what is assembled while tiles come and go."""
        if self.enabled and self.device.type == "cuda":
            return self._pinned(prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))
        with elsewhere() if self.enabled else nullcontext():
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def _pinned(self, size: int) -> Tensor:
        """Returns ``size`` bytes of pinned memory, uint8, which are free again when nothing looks at them."""
        free = self._free[size]
        flat = free.pop() if free else pinned_bytes(size, self.device)
        # The tensor that is given out holds the array, and the end of the array gives the buffer back.
        lease = flat.numpy()
        weakref.finalize(lease, _give_back, weakref.ref(self), flat).atexit = False
        return torch.from_numpy(lease)

    def near(self, target: Tensor) -> Tensor:
        """Returns memory on the device for what belongs into ``target``: ``target`` itself where nothing is moved."""
        return torch.empty(target.shape, dtype=target.dtype, device=self.device) if self.enabled else target

    def park(self, x: Tensor) -> Tensor:
        """Returns ``x`` in host memory, for later, or ``x`` itself where nothing is moved."""
        # The copy is dense even if ``x`` is a view into something larger.
        return self.empty(x.shape, x.dtype).copy_(x, non_blocking=True) if self.enabled else x

    def fetch(self, x: Tensor) -> Tensor:
        """Returns a parked tensor, or a part of it, on the device again."""
        return self.near(x).copy_(x, non_blocking=True) if self.enabled else x


def _give_back(host: weakref.ref[Host], flat: Tensor) -> None:
    alive = host()
    if alive is not None:
        alive._free[flat.numel()].append(flat)


def pinned_bytes(size: int, device: torch.device) -> Tensor:
    """Returns ``size`` bytes of host memory, uint8, that ``device``, if it is a GPU, copies from and to without a stop.

    torch's own pinned memory is rounded up to a power of two (706 MB become 1,074 MB) and never given back; this memory
    is registered as it is, in whole pages that it shares with nothing. Where registering fails, it stays ordinary
    memory, and a warning says that copies are slower.
    """
    if not size or device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    whole = -(-size // PAGE) * PAGE
    base = torch.empty(whole + PAGE, dtype=torch.uint8, device="cpu")
    start = -base.data_ptr() % PAGE
    flat = base[start : start + size]
    code = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), whole, 0))
    if code != 0:
        _clear_error(device)
        message = f"{size:,} bytes of host memory could not be pinned (CUDA error {code}); copies from them are slower"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return flat
    weakref.finalize(base.untyped_storage(), _unpin, flat.data_ptr(), device).atexit = False
    return flat


def _unpin(address: int, device: torch.device) -> None:
    # A copy may still read or write it.
    torch.cuda.synchronize(device)
    if int(torch.cuda.cudart().cudaHostUnregister(address)) != 0:
        _clear_error(device)


def _clear_error(device: torch.device) -> None:
    """Clears the error that a failed call has left, which the next launch, whatever it is, would report."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return  # this was the launch that reports it


def release(device: torch.device) -> None:
    """Gives back the memory of models that are no longer referenced, before the next one is loaded."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine_memory(root: Path = Path("/")) -> int:
    """Returns bytes of this machine's memory, or of the process's control group (version 2) where that has less.

    Args:
        root: the folder in which ``proc`` and ``sys`` are.
    """
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::"):
            own = groups / line[3:].lstrip("/")
            # The limits of the groups above hold too.
            inside = [folder for folder in (own, *own.parents) if folder.is_relative_to(groups)]
            sizes += [int(text) for folder in inside for text in _lines(folder / "memory.max") if text.isdecimal()]
    return min(sizes)


def _lines(path: Path) -> list[str]:
    """Returns the lines of one of the kernel's files; none where it does not exist or may not be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
