"""Memory over time is followed: a course's arithmetic, the allocator's history, the counting meter, whole clips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.memory import clip
from bench.memory.clip import ClipRun, ClipSetup, run_clip
from bench.memory.course import Course, Event, from_trace, label_of
from bench.memory.meter import CountingMeter, make_meter
from model.machine.counted import TensorMemory
from tests.support.bench_session import CPU

META = torch.device("meta")
TINY = ClipSetup("tiny", 64, 48, 17, steps=2, dtype=torch.float32)
STAGES = {"load", "Stage I", "reference", "Stage II", "decode"}


def course(*sizes: int, base: int = 0, marks: tuple[tuple[float, str], ...] = ()) -> Course:
    """Returns a course with an event a second: so many bytes taken or given back, with the sizes as labels."""
    events, taken = [], []
    for second, size in enumerate(sizes, 1):
        if size > 0:
            taken.append((size, second))
            events.append(Event(second, second, size, f"of {size}"))
        else:
            key = next((key for known, key in taken if known == -size), -second)
            events.append(Event(second, key, size))
            taken = [entry for entry in taken if entry[1] != key]
    return Course(base, events, list(marks))


# A course


def test_the_peak_is_the_most_at_once_and_counts_what_was_there_before() -> None:
    found = course(100, 50, -100, 30, -50, base=7)
    assert [live for _, live in found.points] == [7, 107, 157, 57, 87, 37]
    assert found.peak() == 157
    assert course(-5, base=7).peak() == 7


def test_peaks_by_stage_hold_what_was_alive_when_it_began_and_add_up_segments() -> None:
    marks = ((1.5, "Stage I"), (2.5, "Stage II 1"), (3.5, "decode"), (4.5, "Stage II 2"), (5.5, "file"))
    found = course(100, 50, -100, 10, 80, -80, marks=marks)
    assert found.peaks() == {"Stage I": 150, "Stage II": 150, "decode": 60, "file": 140}
    late = course(100, -100, 5, 6, marks=((2.5, "one"), (3.5, "two")))
    assert late.peaks() == {"one": 5, "two": 11}  # the 100 were before any mark


def test_holders_are_those_of_the_peak_by_label_largest_first() -> None:
    assert course(10, 500, -500, 40, 60).holders() == [("of 500", 500, 1), ("of 10", 10, 1)]
    assert course(40, 40, 20, 30, -40).holders() == [("of 40", 80, 2), ("of 30", 30, 1), ("of 20", 20, 1)]
    assert course(5, 4, 3, 2, 1).holders(most=2) == [("of 5", 5, 1), ("of 4", 4, 1), ("everything else", 6, 3)]


# The allocator's history


def entry(action: str, address: int, size: int, time_us: int, *places: tuple[str, str]) -> dict[str, Any]:
    frames = [{"filename": filename, "name": name, "line": 1} for filename, name in places]
    return {"action": action, "addr": address, "size": size, "time_us": time_us, "frames": frames, "stream": 0}


def test_the_allocators_history_becomes_a_course() -> None:
    """Memory is free when a free is completed, not when it is requested; some is freed that was taken before."""
    model, torch_ = ("/somewhere/model/vae/model.py", "run"), ("/lib/torch/nn/functional.py", "pad")
    trace = [
        entry("segment_alloc", 0, 4096, 5_000_000),
        entry("alloc", 1, 512, 5_000_000, torch_, model),
        entry("alloc", 2, 1024, 5_500_000, torch_),
        entry("free_requested", 1, 512, 6_000_000),
        entry("free_completed", 9, 256, 6_250_000),
        entry("alloc", 3, 128, 6_500_000, model),
        entry("free_completed", 1, 512, 7_000_000),
        entry("alloc", 1, 64, 7_500_000, model),
        entry("snapshot", 0, 0, 8_000_000),
    ]
    assert from_trace(trace) == [
        (0.0, 1, 512, "model/vae/model.py run"), (0.5, 2, 1024, "elsewhere"), (1.25, 9, -256, ""),
        (1.5, 3, 128, "model/vae/model.py run"), (2.0, 1, -512, ""), (2.5, 1, 64, "model/vae/model.py run"),
    ]  # fmt: skip
    found = Course(300, from_trace(trace))
    assert [live for _, live in found.points] == [300, 812, 1836, 1580, 1708, 1196, 1260]
    assert found.peak() == 1836
    assert found.holders() == [("elsewhere", 1024, 1), ("model/vae/model.py run", 512, 1), ("before the run", 300, 1)]


def test_who_allocated_is_the_innermost_place_in_this_project() -> None:
    kernel = ("/x/swifti2v_kernels/conv/loop.py", "pad")
    assert label_of([("/lib/torch/f.py", "pad"), kernel, ("/x/model/vae/model.py", "run")]) == (
        "swifti2v_kernels/conv/loop.py pad"
    )
    assert label_of([{"filename": "/x/model/dit/model.py", "name": "run"}]) == "model/dit/model.py run"
    assert label_of([("/x/model/weights/load.py", "plain"), ("/x/model/pipeline/clip.py", "make")]) == "weights"
    assert label_of([("/x/bench/csg/whole.py", "run"), ("/lib/torch/f.py", "pad")]) == "elsewhere"


# The meter that counts


def test_the_counting_meter_counts_as_tensors_live_and_die() -> None:
    meter = make_meter(CPU)
    assert isinstance(meter, CountingMeter)
    with meter.watch():
        first = torch.zeros(1000)
        view = first[10:]
        second = torch.zeros(500)
        del first
        third = view + 1.0  # 990 elements
        del view, second, third
        fourth = torch.zeros(250, dtype=torch.float64)
    assert [event.size for event in meter.course.events] == [4000, 2000, 3960, -4000, -2000, -3960, 2000]
    assert meter.course.peak() == 9960
    assert fourth.nbytes == 2000
    seconds = [event.seconds for event in meter.course.events]
    assert seconds[0] >= 0
    assert seconds == sorted(seconds)


def test_marks_are_where_segments_begin_and_where_what_they_interrupted_goes_on() -> None:
    meter = CountingMeter(META)  # its time is the number of events

    def segments() -> Iterator[int]:
        for number in range(2):
            made.append(torch.empty(number + 1, device=META))
            yield number

    made: list[torch.Tensor] = []
    with meter.watch():
        with meter.stage("load"):
            made.append(torch.empty(7, device=META))
        for _ in meter.iterate("decode", meter.iterate("Stage II", segments())):
            made.append(torch.empty(5, device=META))
    assert meter.course.marks == [
        (0.0, "load"), (1.0, "decode"), (1.0, "Stage II 1"), (2.0, "decode"), (3.0, "decode"), (3.0, "Stage II 2"),
        (4.0, "decode"), (5.0, "decode"),
    ]  # fmt: skip
    # Memory that the reader of frames takes counts for decode, until the next segment begins.
    assert meter.course.peaks() == {"load": 28, "decode": 80, "Stage II": 60}


# Whole clips


@pytest.fixture(scope="module")
def measured() -> tuple[ClipRun, int]:
    """A small clip that ran on the CPU, and the peak of all of it by another counter."""
    torch.manual_seed(0)

    class OnTheCPU(TensorMemory):
        """A count without the tensors that plans are made with, which have no memory."""

        def _counted(self, storage: torch.UntypedStorage) -> int:
            return 0 if storage.device.type == "meta" else super()._counted(storage)

    with OnTheCPU() as memory:
        return run_clip(TINY, CPU), memory.peak


@pytest.mark.slow
def test_a_clip_on_the_cpu_is_followed_as_another_counter_counts(measured: tuple[ClipRun, int]) -> None:
    run, peak = measured
    assert run.course.peak() == peak
    assert (run.row["status"], run.row["frames_made"]) == ("ok", 17)
    assert {row["stage"] for row in run.stage_rows()} == STAGES == set(run.seconds)
    assert max(row["peak_bytes"] for row in run.stage_rows()) == peak
    assert sum(run.seconds.values()) < run.row["total_seconds"]
    assert {label for _, label in run.course.marks} == STAGES - {"Stage II"} | {"Stage II 1", "Stage II 2"}
    assert sum(size for _, size, _ in run.course.holders()) == peak


@pytest.mark.slow
def test_a_counted_clip_holds_what_a_run_on_the_cpu_holds(
    measured: tuple[ClipRun, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip counted with the CPU's operators holds the same to the byte, but for the given pictures.

    On a card these are copies that end.
    """
    monkeypatch.setattr(clip, "pretend_gpu", lambda capability: nullcontext())
    run, peak = run_clip(TINY, META), measured[1]
    pictures = 3 * 4 * (64 * 48 + 32 * 32)
    assert peak - pictures - 64 <= run.course.peak() <= peak - pictures
    assert (run.row, run.seconds) == ({"status": "ok", "frames_made": 17, "total_seconds": None}, {})
    assert {row["stage"] for row in run.stage_rows()} == STAGES


@pytest.mark.slow
def test_a_counted_clip_takes_a_gpus_operators() -> None:
    run = run_clip(replace(TINY, num_frames=9, dtype=torch.bfloat16), META)
    assert "swifti2v_kernels/conv/calls.py by_kernel" in {event.label for event in run.course.events}


@pytest.mark.slow
def test_of_a_clip_that_does_not_fit_there_is_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_frames(*given: Any) -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 48, 64, 3, dtype=torch.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")

    monkeypatch.setattr(clip, "make_frames", make_frames)
    run = run_clip(TINY, CPU)
    assert (run.row["status"], run.row["reason"], run.interrupted) == ("out of memory", "CUDA out of memory.", False)
    assert [row["stage"] for row in run.stage_rows()] == ["load", "Stage I", "reference"]
    assert set(run.seconds) == {"load", "Stage I", "reference"}
