"""Meters that watch a clip's memory while it is made, by the CUDA allocator's history or by counting tensors."""

from __future__ import annotations

import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from bench.memory.course import Course, Event, from_trace, label_of
from model.machine.counted import TensorMemory
from model.machine.host import Host
from model.machine.measure import StageTimer
from model.memory.vae_plan import CountedHost
from model.pipeline.clip import Item, Watcher

#: Entries of the allocator's history that are kept: a clip at 2K has some 100,000.
HISTORY = 1_000_000


class Meter(Watcher, ABC):
    """A watcher that times the stages and follows memory; ``course`` is complete after :meth:`watch`."""

    def __init__(self, device: torch.device):
        self.device, self.timer, self.course = device, StageTimer(device), Course()
        self._start = 0.0
        self._stages: list[str] = []

    def now(self) -> float:
        """Returns the seconds since the run began."""
        return time.perf_counter() - self._start

    def mark(self, label: str) -> None:
        """Marks that a stage or segment begins now."""
        self.course.marks.append((self.now(), label))

    @abstractmethod
    def watch(self) -> AbstractContextManager[None]:
        """Returns a context in which the run is followed."""

    @contextmanager
    def _within(self, label: str) -> Iterator[None]:
        """Marks when the body begins, and when the stage that it interrupts goes on."""
        self.mark(label)
        self._stages.append(label)
        try:
            yield
        finally:
            self._stages.pop()
            if self._stages:
                self.mark(self._stages[-1])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Marks and times the stage that is the body."""
        with self._within(name), self.timer.stage(name):
            yield

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items, timing each and marking when its making begins."""
        iterator, number = iter(items), 0
        while True:
            number += 1
            begun = len(self.course.marks)
            # The marks of segments have numbers.
            with self._within(f"{name} {number}" if name == "Stage II" else name), self.timer.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    del self.course.marks[begun]  # there was no further one
                    return
            yield item


class CudaMeter(Meter):
    """A meter by the CUDA allocator's own history, which costs some microseconds an allocation."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Records the allocator's history while the body runs."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.course.base = torch.cuda.memory_allocated()
        self._start = time.perf_counter()
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=HISTORY)
        try:
            yield
        finally:
            try:
                torch.cuda.synchronize()
                snapshot = torch.cuda.memory._snapshot()
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
            index = torch.cuda.current_device()
            self.course.events = from_trace(snapshot["device_traces"][index])


class CountingMeter(Meter):
    """A meter by the results of operators, on the CPU and for tensors without memory, where events are the time."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.memory = _Logged(self.course, self.now, device.type)

    def now(self) -> float:
        """Returns the seconds since the run began, or for tensors without memory the number of events."""
        return super().now() if self.device.type == "cpu" else float(len(self.course.events))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Counts tensors while the body runs."""
        self._start = time.perf_counter()
        with self.memory:
            yield

    def host(self, park: bool) -> Host:
        """Returns a host memory that does not count, for tensors without memory."""
        return CountedHost(park)


class _Logged(TensorMemory):
    """A count of tensors that logs when each memory is taken, by which place, and when it is given back."""

    def __init__(self, course: Course, now: Callable[[], float], kind: str):
        super().__init__()
        self._course, self._now, self._kind = course, now, kind

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, before = storage._cdata, self.live
        if storage.device.type != self._kind or key in self._sizes:
            return
        self._sizes[key] = self._counted(storage)
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        if self.live != before:
            self._course.events.append(Event(self._now(), key, self._sizes[key], _caller()))
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        self.live -= size
        if size:
            self._course.events.append(Event(self._now(), key, -size))


def _caller() -> str:
    frame, frames = sys._getframe(3), []
    while frame is not None and len(frames) < 40:
        frames.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return label_of(frames)


def make_meter(device: torch.device) -> Meter:
    """Returns the meter for a device: the allocator's on CUDA, else the one that counts."""
    return CudaMeter(device) if device.type == "cuda" else CountingMeter(device)
