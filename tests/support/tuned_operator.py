"""An operator whose times are given by its configuration, for tests of what looks for the best one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bench.harness.timing import Timing
from bench.tuning import search
from bench.tuning.space import Target
from swifti2v_kernels.common.case import Arguments, Case, Cost, RealSize, Work
from swifti2v_kernels.common.configs import configured


@dataclass(frozen=True)
class Config:
    """The configuration of an operator that is not there."""

    block: int
    warps: int
    fixed: str = "stays"

    SPACE: ClassVar = {"block": (1, 2, 4), "warps": (2, 4)}


OWN = Config(1, 2)
#: Seconds of both cases by configuration. Sums, means and geometric means of their gains are told apart by them.
SECONDS = {
    (1, 2): (1.0, 1.0), (1, 4): (0.9, 1.0), (2, 2): (0.4, 1.0), (2, 4): (0.4, 0.625), (4, 2): (3.0, 0.35),
    (4, 4): (2.0, 2.0),
}  # fmt: skip
#: The configuration and the case of every launch.
launched: list[tuple[tuple[int, int], int]] = []
broken: dict[tuple[int, int], Exception] = {}
wrong: list[tuple[int, int]] = []


def scaled(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """Notes what it would be launched with; case 0 has one row, case 1 has two."""
    y = x * weight
    if backend == "torch":
        return y
    config = configured("scaled", 90, OWN, width=8)
    assert config.fixed == "stays"
    launched.append(((config.block, config.warps), len(x) - 1))
    if launched[-1][0] in broken:
        raise broken[launched[-1][0]]
    return y + 1 if launched[-1][0] in wrong else y


def rows(count: int, device: torch.device) -> Arguments:
    return (torch.ones(count, 8, device=device), torch.ones(8, device=device)), {}


def case(number: int) -> Case:
    inputs = functools.partial(rows, number + 1)
    real = RealSize(f"{number + 1} x 8", inputs, Cost(8, 64, 32))
    return Case(f"scaled {number}", scaled, inputs, lambda constants: Work(0, 0), real)


def compiler(obstacle: Callable[[dict[str, Any]], str | None]) -> Any:
    """A compiler that is done with the last candidate first."""

    def compile_all(target: Target, candidates: Sequence[dict[str, Any]], jobs: int) -> Any:
        for i in reversed(range(len(candidates))):
            yield i, obstacle(candidates[i])

    return compile_all


def prepared(monkeypatch: pytest.MonkeyPatch) -> Target:
    """Returns a target of two cases, of which every candidate compiles."""
    for noted in (launched, broken, wrong):
        noted.clear()
    monkeypatch.setattr(search, "compile_all", compiler(lambda forced: None))
    monkeypatch.setattr(search, "release", lambda device: None)
    return Target("scaled", 90, {"width": 8}, OWN, (case(0), case(1)))


def by_config(calls: dict[str, Any], spread: float = 0.0) -> dict[str, Timing]:
    """Times calls by the configuration that each launches: it takes what SECONDS say."""
    found = {}
    for name, call in calls.items():
        call()
        config, number = launched[-1]
        seconds = SECONDS[config][number]
        found[name] = Timing(seconds, seconds * (1 - spread / 2), seconds * (1 + spread / 2), 5)
    return found


def never(*given: Any, **options: Any) -> Any:
    """Fails the test where it stands in place of what must not be called.

    No ``except Exception`` takes what it raises for a failed candidate.
    """
    pytest.fail("compiled or measured again")
