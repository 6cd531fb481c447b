"""The search for the fastest configuration of a kernel.

Candidates are compiled side by side, those that spill or do not fit are dropped, the rest is timed one by one, and the
best take turns with the heuristic.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.harness.timing import Timer, Timing
from bench.operators.check import check_case
from bench.operators.discover import all_cases
from bench.operators.measure import real_call
from bench.records.outcome import FAILURES, failure
from bench.static.compile_only import compiled_for, quiet_exit
from bench.static.report import rows_of
from bench.tuning.space import Target
from model.machine.host import release
from swifti2v_kernels.common.case import Case
from swifti2v_kernels.common.configs import force_config
from swifti2v_kernels.common.target import TARGETS

#: Candidates that take turns with the heuristic in the end.
FINALISTS = 3
#: A smaller gain is not worth an entry.
LEAST_GAIN = 1.02


def obstacle_of(case_number: int, kernel: str, forced: dict[str, Any], capability: int) -> str | None:
    """Compiles a candidate for one case at its real size; returns why it is out, or None.

    It is for a process of its own: the compiled code lands in Triton's cache, where a launch on the GPU finds it.
    """
    case = all_cases()[case_number]
    try:
        with compiled_for(capability) as kernels, force_config(kernel, **forced):
            args, kwargs = (case.real or case).inputs(torch.device("cpu"))
            case.operator(*args, **kwargs)
    except Exception as error:  # a launcher that a configuration does not fit
        return failure(error)["reason"]
    (row,) = rows_of([(case, kernels[0])], TARGETS[capability])
    return next(iter(row.faults()), None)


def compile_all(target: Target, candidates: Sequence[dict[str, Any]], jobs: int) -> Iterator[tuple[int, str | None]]:
    """Yields the number of every candidate as it is ready for all the target's cases, and why it is out, or None."""
    numbers = [all_cases().index(case) for case in target.cases]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=quiet_exit) as pool:
        futures = {
            pool.submit(obstacle_of, number, target.kernel, forced, target.capability): i
            for i, forced in enumerate(candidates)
            for number in numbers
        }
        found: dict[int, list[str | None]] = {}
        try:
            for future in as_completed(futures):
                i = futures[future]
                found.setdefault(i, []).append(future.result())
                if len(found[i]) == len(numbers):
                    yield i, next(filter(None, found[i]), None)
        finally:
            for future in futures:
                future.cancel()


@dataclass
class Outcome:
    """The findings of the search for one target."""

    target: Target
    tried: int = 0
    dropped: int = 0
    best: dict[str, Any] | None = None
    gain: float = 1.0
    reason: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)


@dataclass
class Search:
    """Searches targets on one device.

    Args:
        device: where candidates are timed.
        quick, final: timers of single candidates, and of the finalists.
        jobs: number of compiling processes.
        deadline: a monotonic time after which no candidate is begun.
        most: number of candidates of a target at most; None for all.
    """

    device: torch.device
    quick: Timer
    final: Timer
    jobs: int
    deadline: float | None = None
    most: int | None = None

    @property
    def late(self) -> bool:
        """True when the time is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def run(self, target: Target, say: Callable[[str], object] = lambda text: None) -> Outcome:
        """Searches one target; returns its best configuration, and by how much it is faster than the heuristic."""
        outcome, right = Outcome(target), []
        candidates = target.candidates()[: self.most]
        for i, obstacle in compile_all(target, candidates, self.jobs):
            if self.late:
                outcome.reason = "the time given was over"
                break
            seconds = self._seconds(target, candidates[i]) if obstacle is None else None
            if seconds is None:
                outcome.dropped += 1
                continue
            say(f"{target.name}: {candidates[i]}")
            right.append((seconds, i))
        outcome.tried = len(right)
        self._decide(target, [candidates[i] for _, i in sorted(right)[:FINALISTS]], outcome)
        return outcome

    def _seconds(self, target: Target, forced: dict[str, Any]) -> float | None:
        """Returns the seconds of all cases together; None where one fails."""
        total = 0.0
        for case in target.cases:
            try:
                with real_call(case, self.device) as call, force_config(target.kernel, **forced):
                    total += self.quick({"": call})[""].median
            except FAILURES:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # a device that is lost says so again: then nothing more can be learnt
                return None
            finally:
                release(self.device)
        return total

    def _decide(self, target: Target, finalists: Sequence[dict[str, Any]], outcome: Outcome) -> None:
        """Measures the finalists in turns with the heuristic; the winner must be right and clearly faster."""
        if not finalists:
            outcome.reason = outcome.reason or "no candidate is left"
            return
        ratios: dict[str, list[float]] = {}
        spreads: dict[str, float] = {}
        for case in target.cases:
            for name, timing in self._in_turns(target, case, finalists).items():
                outcome.timings[f"{case.name}: {name}"] = timing
                ratios.setdefault(name, []).append(timing.median)
                spreads[name] = max(spreads.get(name, 0.0), (timing.high - timing.low) / timing.median)
        base = ratios.pop("heuristic")
        gains = {n: statistics.geometric_mean(b / s for b, s in zip(base, r, strict=True)) for n, r in ratios.items()}
        for name in sorted(gains, key=lambda name: -gains[name]):
            forced = json.loads(name)
            noise = (spreads[name] + spreads["heuristic"]) / 2
            if gains[name] < max(LEAST_GAIN, 1 + noise):
                break
            with force_config(target.kernel, **forced):
                checks = [check_case(case, self.device) for case in target.cases]
            wrong = [row["reason"] for row in checks if row["status"] != "ok"]
            if wrong:
                outcome.reason = f"{forced} is wrong: {wrong[0]}"
                continue
            outcome.best, outcome.gain, outcome.reason = forced, gains[name], ""
            return
        outcome.reason = outcome.reason or "the heuristic is as fast"

    def _in_turns(self, target: Target, case: Case, finalists: Sequence[dict[str, Any]]) -> dict[str, Timing]:
        with ExitStack() as stack:
            call = stack.enter_context(real_call(case, self.device))

            def forced(fields: dict[str, Any]) -> Callable[[], Any]:
                def run() -> Any:
                    with force_config(target.kernel, **fields):
                        return call()

                return run

            own = {name: getattr(target.heuristic, name) for name in type(target.heuristic).SPACE}
            calls = {"heuristic": forced(own), **{json.dumps(f): forced(f) for f in finalists}}
            return self.final(calls)


def entry(outcome: Outcome, card: str, stamp: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the table's entry for an outcome; None where the heuristic stays."""
    if outcome.best is None:
        return None
    target = outcome.target
    return {
        "capability": target.capability, "kernel": target.kernel, "key": target.key, "config": outcome.best,
        "gain": round(outcome.gain, 3), "card": card, "provenance": stamp,
    }  # fmt: skip
