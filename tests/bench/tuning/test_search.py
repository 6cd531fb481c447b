"""The tuner's search, on an operator whose times are given by its configuration."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
from triton.runtime.errors import OutOfResources

from bench.harness.timing import Timing
from bench.tuning import search
from bench.tuning.search import LEAST_GAIN, Outcome, Search, entry
from bench.tuning.space import Target
from tests.support.bench_session import CPU
from tests.support.tuned_operator import SECONDS, broken, by_config, compiler, launched, never, prepared, wrong


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    return prepared(monkeypatch)


def searching(quick: Any = by_config, final: Any = by_config, **options: Any) -> Search:
    return Search(CPU, quick, final, 1, **options)


def gain_of(*config: int) -> float:
    """Returns, computed by hand, the geometric mean of both cases' gains over the heuristic."""
    (a, b), (c, d) = SECONDS[1, 2], SECONDS[config]
    return math.sqrt(a / c * b / d)


def picked(outcome: Outcome) -> tuple[int, ...] | None:
    return None if outcome.best is None else tuple(outcome.best.values())


def test_the_fastest_is_picked_and_its_gain_is_the_geometric_mean_over_the_cases(target: Target) -> None:
    outcome = searching().run(target)
    assert outcome.best == {"block": 2, "warps": 4}
    assert outcome.gain == pytest.approx(gain_of(2, 4)) == pytest.approx(2.0)
    assert (outcome.tried, outcome.dropped, outcome.reason) == (5, 0, "")
    assert outcome.timings["scaled 1: heuristic"].median == 1.0


def test_finalists_take_turns_with_the_heuristic_by_its_own_fields(target: Target) -> None:
    """Every call of the last timer is launched with the configuration that it stands for, the heuristic among them."""
    turns: list[list[tuple[int, int]]] = []

    def noted(calls: dict[str, Any]) -> dict[str, Timing]:
        start = len(launched)
        found = by_config(calls)
        turns.append([config for config, _ in launched[start:]])
        assert next(iter(found)) == "heuristic"
        return found

    searching(final=noted).run(target)
    assert turns == [[(1, 2), (2, 4), (2, 2), (1, 4)]] * 2


def test_what_does_not_compile_is_dropped_and_never_launched(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "compile_all", compiler(lambda c: "spills: 1 loads" if c["block"] == 2 else None))
    outcome = searching().run(target)
    assert (outcome.tried, outcome.dropped, picked(outcome)) == (3, 2, (1, 4))
    assert outcome.gain == pytest.approx(gain_of(1, 4))
    assert not {(2, 2), (2, 4)} & {config for config, _ in launched}
    monkeypatch.setattr(search, "compile_all", compiler(lambda c: "does not compile"))
    nothing = searching().run(target)
    assert (nothing.tried, nothing.dropped, nothing.best, nothing.reason) == (0, 5, None, "no candidate is left")


def test_a_candidate_that_fails_when_launched_is_dropped_and_the_others_go_on(target: Target) -> None:
    """Triton raises this at the launch, and it is no RuntimeError."""
    broken[2, 4] = OutOfResources(300_000, 232_448, "shared memory")
    outcome = searching().run(target)
    assert (outcome.tried, outcome.dropped, picked(outcome)) == (4, 1, (2, 2))


def test_a_fast_candidate_that_is_wrong_is_not_picked(target: Target) -> None:
    wrong.append((2, 4))
    outcome = searching().run(target)
    assert (picked(outcome), outcome.reason) == ((2, 2), "")
    assert outcome.gain == pytest.approx(gain_of(2, 2))
    wrong.extend(SECONDS)
    outcome = searching().run(target)
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
    seconds: float, spread: float, expected: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in SECONDS:
        monkeypatch.setitem(SECONDS, config, (1.0, 1.0))
    monkeypatch.setitem(SECONDS, (4, 2), (seconds, seconds))
    outcome = searching(final=functools.partial(by_config, spread=spread)).run(target)
    assert picked(outcome) == ((4, 2) if expected else None)
    assert outcome.reason == ("" if expected else "the heuristic is as fast")


def test_the_number_of_candidates_can_be_limited(target: Target) -> None:
    """A limited search tries the candidates that change the heuristic least."""
    assert searching(most=2).run(target).tried == 2
    first = {tuple(forced.values()) for forced in target.candidates()[:2]}
    assert {config for config, _ in launched} == first | {(1, 2)}


def test_a_search_out_of_time_decides_on_what_it_has(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that has time for two candidates decides on the better of them; one without time begins nothing."""
    clock = [0.0]
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(calls: dict[str, Any]) -> dict[str, Timing]:
        clock[0] += 0.5
        return by_config(calls)

    outcome = searching(quick=slow, deadline=1.5).run(target)
    assert outcome.tried == 2
    last = [tuple(forced.values()) for forced in target.candidates()[-2:]]
    assert picked(outcome) == max((config for config in last if gain_of(*config) > 1), key=lambda c: gain_of(*c))
    outcome = searching(quick=never, final=never, deadline=1.0).run(target)
    assert (outcome.tried, outcome.best, outcome.reason) == (0, None, "the time given was over")
