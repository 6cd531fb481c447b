"""The tuner's search, on an operator whose times are given by its configuration."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench.harness.timing import Timing
from bench.tuning import search
from bench.tuning.search import LEAST_GAIN, Journal, Outcome, Search, entry
from bench.tuning.space import Target
from tests.support.bench_session import CPU
from tests.support.tuned_operator import OWN, SECONDS, broken, by_config, compiler, launched, never, prepared, wrong


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    return prepared(monkeypatch)


def searching(folder: Path, quick: Any = by_config, final: Any = by_config, **options: Any) -> Search:
    return Search(CPU, quick, final, Journal(folder / "measured.jsonl"), 1, **options)


def gain_of(*config: int) -> float:
    """Returns, computed by hand, the geometric mean of both cases' gains over the heuristic."""
    (a, b), (c, d) = SECONDS[1, 2], SECONDS[config]
    return math.sqrt(a / c * b / d)


def picked(outcome: Outcome) -> tuple[int, ...] | None:
    return None if outcome.best is None else tuple(outcome.best.values())


def test_the_fastest_is_picked_and_its_gain_is_the_geometric_mean_over_the_cases(
    target: Target, tmp_path: Path
) -> None:
    outcome = searching(tmp_path).run(target)
    assert outcome.best == {"block": 2, "warps": 4}
    assert outcome.gain == pytest.approx(gain_of(2, 4)) == pytest.approx(2.0)
    assert (outcome.tried, outcome.dropped, outcome.reason) == (5, 0, "")
    assert outcome.timings["scaled 1: heuristic"].median == 1.0


def test_finalists_take_turns_with_the_heuristic_by_its_own_fields(target: Target, tmp_path: Path) -> None:
    """Every call of the last timer is launched with the configuration that it stands for, the heuristic among them."""
    turns: list[list[tuple[int, int]]] = []

    def noted(calls: dict[str, Any]) -> dict[str, Timing]:
        start = len(launched)
        found = by_config(calls)
        turns.append([config for config, _ in launched[start:]])
        assert next(iter(found)) == "heuristic"
        return found

    searching(tmp_path, final=noted).run(target)
    assert turns == [[(1, 2), (2, 4), (2, 2), (1, 4)]] * 2


def test_what_does_not_compile_is_dropped_and_never_launched(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "compile_all", compiler(lambda c: "spills: 1 loads" if c["block"] == 2 else None))
    outcome = searching(tmp_path).run(target)
    assert (outcome.tried, outcome.dropped, picked(outcome)) == (3, 2, (1, 4))
    assert outcome.gain == pytest.approx(gain_of(1, 4))
    assert not {(2, 2), (2, 4)} & {config for config, _ in launched}
    monkeypatch.setattr(search, "compile_all", compiler(lambda c: "does not compile"))
    (tmp_path / "none").mkdir()
    nothing = searching(tmp_path / "none").run(target)
    assert (nothing.tried, nothing.dropped, nothing.best, nothing.reason) == (0, 5, None, "no candidate is left")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: invalid argument"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OutOfResources(300_000, 232_448, "shared memory"),  # of Triton, at the launch; no RuntimeError
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_candidate_that_fails_when_launched_is_dropped_and_the_others_go_on(
    error: Exception, target: Target, tmp_path: Path
) -> None:
    broken[2, 4] = error
    outcome = searching(tmp_path).run(target)
    assert (outcome.tried, outcome.dropped, picked(outcome)) == (4, 1, (2, 2))


def test_a_fast_candidate_that_is_wrong_is_not_picked(target: Target, tmp_path: Path) -> None:
    wrong.append((2, 4))
    outcome = searching(tmp_path).run(target)
    assert (picked(outcome), outcome.reason) == ((2, 2), "")
    assert outcome.gain == pytest.approx(gain_of(2, 2))
    wrong.extend(SECONDS)
    outcome = searching(tmp_path).run(target)
    assert outcome.best is None
    assert "is wrong: error" in outcome.reason
    assert entry(outcome, "card", {}) is None


@pytest.mark.parametrize(
    ("seconds", "spread", "expected"),
    [
        (0.5, 0.0, True),
        (1 / (LEAST_GAIN + 0.001), 0.0, True),
        (1 / (LEAST_GAIN - 0.001), 0.0, False),
        (1.0, 0.0, False),
        (1 / 1.08, 0.07, True),
        (1 / 1.08, 0.09, False),
    ],
)
def test_the_heuristic_stays_unless_the_gain_is_more_than_the_spread(
    seconds: float, spread: float, expected: bool, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in SECONDS:
        monkeypatch.setitem(SECONDS, config, (1.0, 1.0))
    monkeypatch.setitem(SECONDS, (4, 2), (seconds, seconds))
    outcome = searching(tmp_path, final=functools.partial(by_config, spread=spread)).run(target)
    assert picked(outcome) == ((4, 2) if expected else None)
    assert outcome.reason == ("" if expected else "the heuristic is as fast")


def test_the_number_of_candidates_can_be_limited(target: Target, tmp_path: Path) -> None:
    """A limited search tries the candidates that change the heuristic least."""
    outcome = searching(tmp_path, most=2).run(target)
    assert outcome.tried == 2
    tried = [json.loads(line)["what"] for line in (tmp_path / "measured.jsonl").read_text().splitlines()]
    first = [json.dumps(forced) for forced in target.candidates()[:2]]
    assert sorted(what.split("8 ", 1)[1] for what in tried) == sorted(first)


# Going on


def test_nothing_is_compiled_or_measured_twice(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second search, in another process, knows all of it; the finalists take turns again."""
    broken[4, 4] = RuntimeError("illegal instruction")
    first = searching(tmp_path).run(target)
    journal = (tmp_path / "measured.jsonl").read_text()
    monkeypatch.setattr(search, "compile_all", never)
    second = searching(tmp_path, quick=never).run(target)
    assert second == first
    assert (second.tried, second.dropped) == (4, 1)
    assert (tmp_path / "measured.jsonl").read_text() == journal


def test_a_search_out_of_time_stops_and_goes_on_where_it_stopped(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that has time for two candidates decides on the better of them, and knows both when it goes on."""
    clock = [0.0]
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    measured: list[tuple[tuple[int, int], int]] = []

    def slow(calls: dict[str, Any]) -> dict[str, Timing]:
        clock[0] += 0.5
        found = by_config(calls)
        measured.append(launched[-1])
        return found

    first = searching(tmp_path, quick=slow, deadline=1.5)
    assert not first.late
    outcome = first.run(target)
    assert first.late
    assert len(measured) == 4
    assert outcome.tried == 2
    last = [tuple(forced.values()) for forced in target.candidates()[-2:]]
    assert picked(outcome) == max((config for config in last if gain_of(*config) > 1), key=lambda c: gain_of(*c))
    outcome = searching(tmp_path, quick=slow).run(target)
    assert picked(outcome) == (2, 4)
    assert Counter(measured) == dict.fromkeys(
        ((config, i) for config in SECONDS if config != (1, 2) for i in (0, 1)), 1
    )


def test_without_time_nothing_is_begun(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: 2.0))
    outcome = searching(tmp_path, quick=never, final=never, deadline=1.0).run(target)
    assert (outcome.tried, outcome.best, outcome.reason) == (0, None, "the time given was over")


def test_a_line_that_was_cut_off_costs_that_measurement_alone(target: Target, tmp_path: Path) -> None:
    """Lines that the next search adds after one that was cut off are read whole."""
    searching(tmp_path).run(target)
    path = tmp_path / "measured.jsonl"
    *whole, last = path.read_text().splitlines()
    path.write_text("\n".join([*whole, last[: len(last) // 2]]))
    journal = Journal(path)
    assert len(journal.known) == 4
    journal.add(target, {"block": 8}, 1.0)
    journal.add(target, {"block": 16}, None)
    again = Journal(path)
    assert again.known == journal.known
    assert len(again.known) == 6


def test_measurements_of_other_cards_kernels_and_shapes_are_told_apart(target: Target, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "measured.jsonl")
    others = [
        Target("scaled", 89, target.key, OWN, target.cases), Target("other", 90, target.key, OWN, target.cases),
        Target("scaled", 90, {"width": 16}, OWN, target.cases),
    ]  # fmt: skip
    forced = target.candidates()[0]
    assert len({journal.key(one, forced) for one in (target, *others)}) == 4
    assert journal.key(target, forced) == journal.key(target, dict(reversed(forced.items())))
