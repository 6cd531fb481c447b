"""Timing with a clock that the tests wind, so that turns, counts and percentiles are exact; and whose code is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import environment, timing
from bench.harness.environment import capture, energy_joules, git_state, machine_state, process_memory
from bench.harness.timing import ROUNDS, CudaTimer, limited, make_timer, measure_ceilings, peak_of, summary, time_one
from tests.support.bench_session import CPU, timer

CUDA = torch.device("cuda")


class Clock:
    """Seconds that pass only where a call takes them, and what was called in which order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def call(self, name: str, seconds: float | Callable[[], float]) -> Callable[[], None]:
        """A call that takes so long."""

        def run() -> None:
            self.log.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


@pytest.mark.parametrize("count", [1, 2, 6, 25])
def test_a_summary_is_the_median_and_the_20th_and_80th_percentile(count: int) -> None:
    """Median and percentiles are numpy's, whatever the order of the runs; one run has no spread."""
    seconds = np.random.default_rng(count).exponential(size=count)
    found = summary(seconds.tolist(), 0.25)
    assert found[:3] == pytest.approx(np.percentile(seconds, (50, 20, 80)).tolist())
    assert found[3:] == (count, 0.25)


def test_calls_take_turns_and_as_many_as_the_time_holds(clock: Clock) -> None:
    """Two calls to warm up and to estimate each, then rounds of all; 0.1 s a call: 2 x 5 of 0.01 s, 1 x 5 of 0.05 s."""
    calls = {"short": clock.call("short", 0.01), "long": clock.call("long", 0.05), "longer": clock.call("longer", 3.0)}
    timer = make_timer(CPU, 100)
    found = timer(calls)
    first, rounds = clock.log[:6], clock.log[6:]
    assert first == ["short"] * 2 + ["long"] * 2 + ["longer"] * 2
    assert rounds == ["short", "short", "long", "longer"] * ROUNDS
    assert {name: found[name].runs for name in found} == {"short": 2 * ROUNDS, "long": ROUNDS, "longer": ROUNDS}
    assert [found[name].median for name in calls] == pytest.approx([0.01, 0.05, 3.0])
    assert time_one(timer, calls["short"]) == pytest.approx((0.01, 0.01, 0.01, 2 * ROUNDS, None))


# On CUDA: the same by a stand-in for torch, whose events read the clock


@pytest.fixture
def gpu(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A GPU of which the timer sees what it needs: the flush takes 7 s, a replay half of what its call takes."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, other: Any) -> float:
            return 1e3 * (other.at - self.at)

    class Graph:
        def replay(self) -> None:
            start = clock.now
            self.run()
            clock.log[-1] += " replayed"
            clock.now = start + (clock.now - start) / 2

    @contextmanager
    def capturing(graph: Graph) -> Iterator[None]:
        before, start = len(clock.log), clock.now
        yield
        (name,) = clock.log[before:]
        if name == "synchronises":
            raise RuntimeError("operation not permitted when stream is capturing")
        seconds = clock.now - start
        graph.run = clock.call(name, seconds)
        clock.log[before:], clock.now = [], start

    flush = SimpleNamespace(zero_=clock.call("flush", 7.0))
    cuda = SimpleNamespace(Event=Event, CUDAGraph=Graph, graph=capturing, synchronize=lambda: None)
    fake = SimpleNamespace(cuda=cuda, int8=torch.int8, empty=lambda *size, **options: flush)
    monkeypatch.setattr(timing, "torch", fake)
    return clock


def test_on_cuda_replays_are_timed_with_l2_flushed_and_the_flush_is_not_timed(gpu: Clock) -> None:
    """A call that cannot be captured is timed as issued; ``launch`` is the host's time to issue it in either case."""
    found = CudaTimer(1000)({name: gpu.call(name, 0.02) for name in ("captured", "synchronises")})
    assert found["captured"] == pytest.approx((0.01, 0.01, 0.01, 20 * ROUNDS, 0.02))
    assert found["synchronises"] == pytest.approx((0.02, 0.02, 0.02, 10 * ROUNDS, 0.02))
    rounds = gpu.log[-60 * ROUNDS :]
    assert rounds[::2] == ["flush"] * 30 * ROUNDS
    assert rounds[1::2] == (["captured replayed"] * 20 + ["synchronises"] * 10) * ROUNDS


def test_on_cuda_a_long_call_is_neither_captured_nor_run_more_than_it_must_be(gpu: Clock) -> None:
    found = CudaTimer(50)({"long": gpu.call("long", 0.3)})
    assert found["long"] == pytest.approx((0.3, 0.3, 0.3, ROUNDS, None))
    assert gpu.log.count("long") == 3 + ROUNDS


# Ceilings, peaks and limits


def test_ceilings_are_the_work_of_a_matmul_and_a_copy_over_their_time() -> None:
    """The matmul's operations are as torch counts them; the stand-in timer runs each call once and says 0.5 s."""
    with FlopCounterMode(display=False) as counter:
        found = measure_ceilings(CPU, timer, copied_bytes=4096, size=48)
    assert found.matmul_tflops == pytest.approx(counter.get_total_flops() / 0.5 / 1e12)
    assert found.copy_bytes_per_second == 2 * 4096 / 0.5
    assert found.matmul_dtype == "float32"


def test_a_peak_on_cuda_is_what_was_there_beyond_the_state_before(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name, result in (("synchronize", None), ("memory_allocated", 100), ("max_memory_allocated", 350)):
        monkeypatch.setattr(torch.cuda, name, lambda result=result: result)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    assert peak_of(lambda: done.append("call"), CUDA) == (None, 250)
    assert done == ["reset", "call"]


def test_a_limit_on_cuda_is_held_in_the_body_and_lifted_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lifted where the body fails too; a device without a number is the current one."""
    held: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: held.append((share, index)))

    def failing() -> None:
        with limited(CUDA, 20):
            assert held == [(0.25, 2)]
            raise RuntimeError("of the body")

    with pytest.raises(RuntimeError, match="of the body"):
        failing()
    with limited(torch.device("cuda", 1), 1000):
        pass
    with limited(CUDA, None), limited(CPU, 1):
        pass
    assert held == [(0.25, 2), (1.0, 2), (1.0, 1), (1.0, 1)]


# The state of the source


def git(folder: Path, *arguments: str) -> str:
    """Runs git in a folder, as somebody, and returns what it printed."""
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_and_whether_the_tree_differs_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a checkout it is not known, and for a copied tree it is what the environment says."""
    monkeypatch.delenv("SWIFTI2V_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "bench" / "harness").mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "bench" / "harness" / "environment.py"))
    assert git_state() is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state() == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("two")
    assert git_state() == {"commit": commit, "dirty": True}
    monkeypatch.setenv("SWIFTI2V_COMMIT", "c" * 40)
    assert git_state() == {"commit": "c" * 40, "dirty": False}


def test_a_cpu_has_a_name_and_no_state_of_a_card() -> None:
    found = capture(CPU)
    assert found["device"] == found["cpu"]
    assert (found["device_type"], found["packages"]["torch"]) == ("cpu", torch.__version__)
    assert "gpu" not in found
    assert [read(CPU) for read in (machine_state, energy_joules, process_memory)] == [None] * 3


def test_the_state_of_a_card_is_what_nvml_says_or_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is found by its UUID; reasons for throttling are words, and energy is in joules."""

    class NVMLError(Exception):
        pass

    def lost() -> None:
        raise NVMLError("driver not loaded")

    answers = {
        "GetHandleByUUID": "card", "GetClockInfo": 1980, "GetTemperature": 34, "GetPowerUsage": 118_200,
        "GetCurrentClocksThrottleReasons": 0x4 | 0x1, "GetTotalEnergyConsumption": 5000,
        "GetComputeRunningProcesses": [SimpleNamespace(pid=os.getpid(), usedGpuMemory=9)],
    }  # fmt: skip
    given = {f"nvmlDevice{name}": lambda *_, value=value: value for name, value in answers.items()}
    constants = dict.fromkeys(("NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU"), 0)
    nvml = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None, **constants, **given)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u"))
    found = machine_state(CUDA)
    assert found is not None
    assert (found["clock_mhz"], found["power_watts"], found["throttling"]) == (1980, 118.2, ["power cap"])
    assert (energy_joules(CUDA), process_memory(CUDA)) == (5.0, 9)
    nvml.nvmlInit = lost
    assert machine_state(CUDA) == {"nvml_error": "driver not loaded"}
    assert (energy_joules(CUDA), process_memory(CUDA)) == (None, None)
