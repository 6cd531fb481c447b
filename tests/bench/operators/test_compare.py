"""Comparisons: every peer of an operator computes the same, what is wrong is not timed, and what fails is a row."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.dit.command import compared_cases
from bench.harness.timing import Ceilings
from bench.operators import compare, peers
from bench.operators.compare import compare_case
from bench.operators.discover import operator_name
from bench.operators.peers import Peer, peers_of
from bench.records.outcome import Unavailable
from swifti2v_kernels.common.case import Arguments, Case, Cost, RealSize, Work
from tests.support.bench_session import CPU, timer

CEILINGS = Ceilings(1e5, 1.0, "float32")


def double(x: Tensor, *, backend: str = "auto") -> Tensor:
    return 2 * x


def inputs(device: torch.device) -> Arguments:
    return (torch.empty(4, 8, device=device),), {"backend": "triton"}


DOUBLE = Case("double", double, inputs, lambda constants: Work(0, 0), RealSize("4 x 8", inputs, Cost(5, 100, 28)))


def right(x: Tensor) -> Tensor:
    return x + x


def wrong(x: Tensor) -> Tensor:
    return 2.1 * x


def coarse(x: Tensor) -> Tensor:
    return (2 + 5e-5) * x


def empty(x: Tensor) -> Tensor:
    return x * float("nan")


def missing(x: Tensor) -> Tensor:
    raise Unavailable("not installed")


def hungry(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("no memory left")


def broken(x: Tensor) -> Tensor:
    raise NotImplementedError("not for this shape\nsecond line")


def compared(*functions: Callable[..., Any], timed: Any = timer, case: Case = DOUBLE) -> list[dict[str, Any]]:
    found = [Peer(f.__name__, f, ours=f is right, exact=f is not coarse) for f in functions]
    return compare_case(case, found, CPU, timed, CEILINGS)


def test_what_is_wrong_is_not_timed_and_what_fails_is_a_row() -> None:
    """8-bit matmuls may err ten times as much; rates are the least cost over the time, of half a second here."""
    rows = compared(right, coarse, wrong, empty, missing, hungry, broken)
    statuses = ["ok", "ok", "wrong", "wrong", "not available", "out of memory", "failed"]
    assert [row["status"] for row in rows] == statuses
    assert [("seconds" in row) for row in rows] == [True, True, *[False] * 5]
    assert (rows[0]["shape"], rows[0]["provider"], rows[0]["ours"]) == ("4 x 8", "right", True)
    assert rows[0]["bytes_per_second"] == 128 / 0.5
    assert rows[0]["fraction_of_copy"] == 128 / 0.5 / 1e5
    assert rows[0]["tflops"] == rows[0]["fraction_of_matmul"] == 5 / 0.5 / 1e12
    assert rows[0]["memory_bound"]
    assert rows[1]["error"] == pytest.approx(2.5e-5, rel=0.1)
    assert rows[2]["error"] == pytest.approx(0.05, rel=1e-3)
    assert rows[3]["error"] is None
    assert [row["reason"] for row in rows[4:]] == ["not installed", "no memory left", "not for this shape"]
    json.dumps(rows, allow_nan=False)


def test_where_all_together_fail_each_is_timed_alone() -> None:
    def cramped(calls: Any) -> Any:
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no memory left")
        return timer(calls)

    rows = compared(right, coarse, timed=cramped)
    assert [row["seconds"] for row in rows] == [0.5, 0.5]
    assert {row["warning"] for row in rows} == {"timed alone (no memory left)"}


def test_inputs_that_do_not_fit_are_rows_too() -> None:
    real = RealSize("large", lambda device: hungry(torch.empty(0)), Cost(1, 1, 1))  # type: ignore[arg-type,return-value]
    rows = compared(right, wrong, case=replace(DOUBLE, real=real))
    assert [(row["status"], row["reason"]) for row in rows] == [("out of memory", "the inputs alone do not fit")] * 2


def test_each_call_has_inputs_of_its_own() -> None:
    """A peer that works in place is checked on inputs that its first call has not written to."""
    assert [row["status"] for row in compared(lambda x: x.mul_(2))] == ["ok"]


@pytest.mark.parametrize("case", list({c.operator: c for c in compared_cases()}.values()), ids=operator_name)
def test_peers_compute_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every implementation that is installed is within the limit of the operator's own check; the others say so."""
    assert case.real is not None
    monkeypatch.setattr(peers, "_compiled", functools.partial(torch.compile, backend="eager", dynamic=False))
    monkeypatch.setattr(compare, "release", lambda device: None)
    own, *others = peers_of(case)
    assert own.function is case.operator
    small = replace(case, real=replace(case.real, inputs=case.inputs))
    rows = {row["provider"]: row for row in compare_case(small, others, CPU, timer, CEILINGS)}
    for name in ("liger", "comfy-kitchen"):
        if name in rows:
            assert rows.pop(name)["status"] == "not available"
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert {"eager", "torch.compile"} <= rows.keys()
