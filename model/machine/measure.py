"""Measures the time of the pipeline's stages and peak memory, on the CPU and on CUDA."""

from __future__ import annotations

import math
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
#: The sizes of memory that :func:`parse_bytes` takes.
MB, MOST_BYTES = 10**6, 10**15


class StageTimer:
    """A clock that adds up the time of named stages, each without the stages that run inside it.

    The stages of the pipeline are nested iterators (the file pulls frames from the decoder, which pulls blocks from the
    sampler); the time between two marks is charged to the innermost stage. On CUDA the marks are device events, so
    nothing waits for the GPU until :attr:`seconds` is read.

    Attributes:
        failed: the innermost stage in which an error was raised; ``load`` only if there was no other.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._stack: list[str] = []
        self._laps: list[tuple[str, object, object]] = []
        self._last: object = None
        self.failed = "load"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charges the time of the body to ``name``."""
        self._mark()
        self._stack.append(name)
        self.failed = "load"  # whatever was raised before is dealt with
        try:
            yield
        except Exception:
            if self.failed == "load":
                self.failed = name
            raise
        finally:
            self._mark()
            self._stack.pop()

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and charges the time that making each one takes to ``name``."""
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
        """The seconds of each stage, in the order in which the stages first ended."""
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
    """Returns peak bytes so far and what they count: the CUDA allocator's peak, or the largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident, whole process"


#: Messages by which libraries say that a card's memory does not suffice, besides torch's own error.
_DEVICE_IS_FULL = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "[CUDA]: out of memory",
)


def full_memory(error: BaseException) -> str | None:
    """Returns ``device`` or ``host`` if an exception says that its memory is full, and None if it says otherwise."""
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    # The CPU allocator raises a plain RuntimeError.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return "host"
    return "device" if isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_IS_FULL) else None


def format_bytes(count: float) -> str:
    """Returns ``21.1 GB``, ``0.35 GB`` or ``4.1 MB``: units of 10^9 or 10^6 bytes, as cards are sold."""
    if count < 1e8:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else f"{count / 1e9:.2f} GB"


def format_enough(count: float) -> str:
    """Returns :func:`format_bytes` of a size rounded up, so that the text names a size that suffices."""
    unit = 1e5 if count < 1e8 else 1e8 if count >= 1e10 else 1e7
    return format_bytes(math.ceil(count / unit) * unit)


def format_seconds(seconds: float) -> str:
    """Returns ``about 13 minutes``: seconds as rough as an estimate is."""
    for size, unit in ((3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit}s"
    return f"about {seconds:.0f} seconds" if seconds >= 1.5 else "about a second"


def parse_bytes(name: str, text: str) -> int:
    """Returns the bytes that a text names: ``"4GB"`` is 4 * 10**9, ``"4GiB"`` 4 * 2**30, ``"2000000"`` as many.

    Raises:
        InputError: the text is no size from 1 MB to 1000 TB; the message begins with ``name``, the option that it was
            given to.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    if match is None or not text.isascii():
        raise InputError(f"{name}: expected a size such as 12GB, 12GiB or 500MB, got {text!r}")
    size = float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")
    if not MB <= size <= MOST_BYTES:
        meant = f", which is bytes; did you mean {match[1]}GB?" if match[2] is None and 1 <= size < MB else ""
        raise InputError(f"{name}: expected a size from 1MB to 1000TB, such as 12GB, got {text!r}{meant}")
    return int(size)
