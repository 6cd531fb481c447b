"""Meters that watch a clip's memory while it is made, by the CUDA allocator's history or by counting tensors."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from bench.memory.course import Course, Event, from_trace, label_of
from model.machine.counted import TensorMemory
from model.machine.measure import StageTimer
from model.pipeline.clip import Item, Watcher

#: Entries of the allocator's history that are kept: a clip at 2K has some 100,000.
HISTORY = 1_000_000


class Meter(Watcher):
    """A watcher that times the stages; ``course`` has their marks, and after :meth:`watch` what memory did."""

    def __init__(self, device: torch.device):
        self.device, self.timer, self.course = device, StageTimer(device), Course()
        self._start = time.perf_counter()
        self._stages: list[str] = []

    def now(self) -> float:
        """Returns the seconds since the run began."""
        return time.perf_counter() - self._start

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Follows memory while the body runs."""
        self._start = time.perf_counter()
        yield

    @contextmanager
    def _within(self, label: str) -> Iterator[None]:
        """Marks when the body begins, and when the stage that it interrupts goes on."""
        self.course.marks.append((self.now(), label))
        self._stages.append(label)
        try:
            yield
        finally:
            self._stages.pop()
            if self._stages:
                self.course.marks.append((self.now(), self._stages[-1]))

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
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=HISTORY)
        try:
            with super().watch():
                yield
        finally:
            try:
                torch.cuda.synchronize()
                traces = torch.cuda.memory._snapshot()["device_traces"]
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
            self.course.events = from_trace(traces[torch.cuda.current_device()])


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
        with super().watch(), self.memory:
            yield


class _Logged(TensorMemory):
    """A count of tensors that logs when each memory is taken, by which place, and when it is given back."""

    def __init__(self, course: Course, now: Callable[[], float], kind: str):
        super().__init__()
        self._course, self._now, self._kind = course, now, kind

    def _counted(self, storage: torch.UntypedStorage) -> int:
        size = super()._counted(storage) if storage.device.type == self._kind else 0
        if size:
            self._course.events.append(Event(self._now(), storage._cdata, size, _caller()))
        return size

    def _forget(self, key: int) -> None:
        size = self._sizes.get(key, 0)
        super()._forget(key)
        if size:
            self._course.events.append(Event(self._now(), key, -size))


def _caller() -> str:
    """Returns the place that ran the operator whose result is counted, without the four frames of the count."""
    frame, frames = sys._getframe(4), []
    while frame is not None and len(frames) < 40:
        frames.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return label_of(frames)


def make_meter(device: torch.device) -> Meter:
    """Returns the meter for a device: the allocator's on CUDA, else the one that counts."""
    return CudaMeter(device) if device.type == "cuda" else CountingMeter(device)
