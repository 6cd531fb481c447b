"""Time of the pipeline's stages and peak memory, on the CPU and on CUDA."""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from model.errors import InputError

Item = TypeVar("Item")


class StageTimer:
    """Adds up the time of named stages, each without the stages that run inside it.

    The stages of the pipeline are nested iterators (the file pulls frames from the decoder, which pulls blocks from the
    sampler); the time between two marks is charged to the innermost stage. On CUDA the marks are device events, so
    nothing waits for the GPU until :attr:`seconds` is read.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._stack: list[str] = []
        self._laps: list[tuple[str, object, object]] = []
        self._last: object = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charges the body to ``name``."""
        self._mark()
        self._stack.append(name)
        try:
            yield
        finally:
            self._mark()
            self._stack.pop()

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time that making each one takes is charged to ``name``."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, in the order in which the stages first ended."""
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for name, start, stop in self._laps:
            totals[name] += start.elapsed_time(stop) / 1000 if self._cuda else stop - start
        return dict(totals)

    def _mark(self) -> None:
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self._stack:
            self._laps.append((self._stack[-1], self._last, now))
        self._last = now


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Peak bytes so far and what they count: the CUDA allocator's peak, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident, whole process"


#: What libraries say when a card's memory does not suffice, beside torch's own error.
_DEVICE_IS_FULL = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "[CUDA]: out of memory",
)


def full_memory(error: BaseException) -> str | None:
    """``device`` or ``host``: whose lack of memory an exception is; None: it is something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    # The CPU allocator raises a plain RuntimeError.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return "host"
    return "device" if isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_IS_FULL) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a lack of memory, of the device or of the host."""
    return full_memory(error) is not None


def format_bytes(count: float) -> str:
    """``1.5 GiB``, ``12 MiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def parse_bytes(name: str, text: str) -> int:
    """``"4GB"`` (4 * 10**9), ``"4GiB"`` (4 * 2**30), ``"500MB"`` or a number of bytes.

    Raises:
        InputError: another form; the message begins with ``name``, the option that was given it.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None or (match[3] and not match[2]) or float(match[1]) <= 0:
        raise InputError(f"{name}: expected a size such as 12GB, 12GiB or 500MB, got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))
