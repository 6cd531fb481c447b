"""Timing of calls as the device takes them: warm, L2 flushed, in turns where several are compared.

On CUDA a call is captured as a graph where that works, and replays are timed: short kernels are otherwise as slow as
Python issues them, which is reported by itself (``launch``). L2 is flushed before every run. Calls to be compared take
turns, so that a drift of the clocks falls on all of them alike.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")
Call = Callable[[], Any]
#: A flush writes so many bytes: more than any L2.
FLUSH_BYTES = 256 * 2**20
#: Turns that each of the compared calls takes.
ROUNDS = 5
#: Seconds of work that bring an idle card's clocks up.
WAKING = 0.3
#: Calls that take longer than so many seconds are not captured: their launches are hidden.
LONG = 0.1


class Timing(NamedTuple):
    """Seconds of a call: median, 20th and 80th percentile of ``runs``; ``launch`` is the host's time to issue one."""

    median: float
    low: float
    high: float
    runs: int
    launch: float | None = None

    def row(self) -> dict[str, Any]:
        """Returns its fields of a row."""
        return {
            "seconds": self.median, "seconds_low": self.low, "seconds_high": self.high, "runs": self.runs,
            "launch_seconds": self.launch,
        }  # fmt: skip


#: What times several calls in turns, and returns one timing for each name.
Timer = Callable[[Mapping[str, Call]], dict[str, Timing]]


def summary(seconds: list[float], launch: float | None = None) -> Timing:
    """Returns median and percentiles of single runs."""
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1, launch)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[3], len(seconds), launch)


class WallTimer:
    """A timer of the wall time of calls on the CPU, for about ``milliseconds`` each."""

    def __init__(self, milliseconds: float):
        self.milliseconds = milliseconds

    def __call__(self, calls: Mapping[str, Call]) -> dict[str, Timing]:
        """Returns one timing for each name; the calls take turns."""
        prepared = {name: self._prepare(call) for name, call in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, (run, estimate, _) in prepared.items():
                seconds[name] += self._runs(run, max(round(self.milliseconds / 1e3 / max(estimate, 1e-6) / ROUNDS), 1))
        return {name: summary(seconds[name], prepared[name][2]) for name in calls}

    def _prepare(self, call: Call) -> tuple[Call, float, float | None]:
        """Returns what is timed, about how long it takes, and the host's time to issue it."""
        call()
        return call, self._runs(call, 1)[0], None

    def _runs(self, run: Call, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return seconds


class CudaTimer(WallTimer):
    """A timer of the device's time of calls, for about ``milliseconds`` each.

    Args:
        milliseconds: time that each call is run for, flushes and warm-up not counted.
        graphs: whether calls may be captured.
    """

    def __init__(self, milliseconds: float, graphs: bool = True):
        super().__init__(milliseconds)
        self.graphs, self._flush = graphs, torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def _prepare(self, call: Call) -> tuple[Call, float, float | None]:
        call()
        torch.cuda.synchronize()
        (first,) = self._runs(call, 1)
        if first >= LONG:
            return call, self._runs(call, 1)[0], None
        start = time.perf_counter()
        for _ in range(4):
            call()
        launch = (time.perf_counter() - start) / 4
        torch.cuda.synchronize()
        run = self._captured(call) or call
        return run, min(self._runs(run, 3)), launch

    def _captured(self, call: Call) -> Call | None:
        if not self.graphs:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # it synchronises, or its library does not take part: timed as issued
            torch.cuda.synchronize()
            return None
        return graph.replay

    def _runs(self, run: Call, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, stop in events:
            self._flush.zero_()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def wall_seconds(call: Call, device: torch.device) -> float:
    """Returns the wall time of one call, on CUDA until the device is done with it."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_timer(device: torch.device, milliseconds: float, graphs: bool = True) -> Timer:
    """Returns the timer for a device; ``graphs`` as for :class:`CudaTimer`."""
    return CudaTimer(milliseconds, graphs) if device.type == "cuda" else WallTimer(milliseconds)


def time_one(timer: Timer, call: Call) -> Timing:
    """Returns the timing of a single call."""
    return timer({"": call})[""]


class Ceilings(NamedTuple):
    """The limits that were measured on a machine: the bandwidth of a copy, and the rate of a square matmul."""

    copy_bytes_per_second: float
    matmul_tflops: float
    matmul_dtype: str


def measure_ceilings(
    device: torch.device, timer: Timer, *, copied_bytes: int | None = None, size: int | None = None
) -> Ceilings:
    """Measures both ceilings: the matmul in bf16 on CUDA, in float32 on a CPU, which has no bf16 to speak of.

    Args:
        device: what is measured.
        timer: a timer without graphs, in which a copy is another engine's and slower.
        copied_bytes: bytes that the copy reads once and writes once; default 2^30 on CUDA, 2^26 on a CPU.
        size: rows and columns of the matrices; default 8192 on CUDA, 1024 on a CPU.
    """
    cuda = device.type == "cuda"
    copied_bytes = copied_bytes or 2 ** (30 if cuda else 26)
    size, dtype = size or (8192 if cuda else 1024), torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    start = time.perf_counter()
    call = functools.partial(torch.matmul, a, b)
    while cuda and time.perf_counter() - start < WAKING:  # an idle card's clocks are low
        call()
        torch.cuda.synchronize()
    matmul = 2 * size**3 / time_one(timer, call).median / 1e12
    del a, b, call
    source, target = (torch.zeros(copied_bytes, device=device, dtype=torch.uint8) for _ in range(2))
    copy = 2 * copied_bytes / time_one(timer, functools.partial(target.copy_, source)).median
    return Ceilings(copy, matmul, str(dtype).removeprefix("torch."))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Keeps float32 convolutions in float32 while the block runs.

    ``torch.backends.cudnn.flags`` would switch cuDNN off as well.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def peak_of(call: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """Returns a call's result and the most bytes that it allocated beyond those before it; 0 where no count is kept."""
    if device.type != "cuda":
        return call(), 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@contextmanager
def limited(device: torch.device, limit: int | None) -> Iterator[None]:
    """Holds CUDA's allocator to a limit in bytes, reserved ones included, while the block runs.

    A large card so stands in for a small one, in capacity and not in speed. On a CPU nothing is held.
    """
    if device.type != "cuda" or limit is None:
        yield
        return
    # The allocator wants a device with a number.
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
