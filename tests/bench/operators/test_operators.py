"""Checks and timings of the operators: what is found, what counts as wrong, and that what is wrong is not timed."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

import swifti2v_kernels
from bench.__main__ import main
from bench.harness.timing import Ceilings, Timing
from bench.operators import measure
from bench.operators.check import TOLERANCE, check_case, leaves, numbers, randomised
from bench.operators.discover import all_cases, cases_of, operator_name
from bench.operators.measure import check_cases, measure_cases
from bench.records.read import ROOT
from model.errors import InputError
from swifti2v_kernels import pretend_gpu
from swifti2v_kernels.common.case import Arguments, Case, Cost, RealSize, Work
from swifti2v_kernels.common.shapes import WINDOWS
from swifti2v_kernels.linear.quantize_rows import QuantizedRows
from tests.support.added_module import added_module
from tests.support.bench_session import CPU, read_section, rows_of, session, timer

CEILINGS = Ceilings(1000.0, 1e-9, "float32")
#: Where no size of a real model is typed.
TYPED_NOWHERE = ("bench/[adov]*/*.py", "bench/csg/setups.py", "swifti2v_kernels/*/cases.py")
LAST = list({case.operator: case for case in all_cases()}.values())
EXTRA = """
from tests.bench.operators.test_operators import case_of, right
CASES = [case_of(right)]
"""


# Operators that double their input, in a way of their own; the reference is always right


def right(x: Tensor, *, backend: str = "auto") -> Tensor:
    return 2 * x


def wrong(x: Tensor, *, backend: str = "auto") -> Tensor:
    return (2 if backend == "torch" else 2.5) * x


def hungry(x: Tensor, *, backend: str = "auto") -> Tensor:
    raise torch.OutOfMemoryError("no memory left\nsecond line")


def without_resources(x: Tensor, *, backend: str = "auto") -> Tensor:
    if backend != "torch" and len(x) > 4:
        raise OutOfResources(300_000, 232_448, "shared memory")
    return 2 * x


def case_of(operator: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Case:
    """A case of 4 rows, of 6 at its real size, with 5 operations and 7 bytes."""

    def inputs(rows: int, device: torch.device) -> Arguments:
        return (torch.ones(rows, 8, dtype=dtype, device=device),), {}

    real = RealSize("6 x 8", functools.partial(inputs, 6), Cost(5, 4, 3))
    return Case(operator.__name__, operator, functools.partial(inputs, 4), lambda constants: Work(0, 0), real)


def worked_off(folder: Path, cases: Sequence[Case], timed: Any = timer) -> tuple[list[Any], list[Any]]:
    """Returns the rows of the checks and of the timings, as the command makes them."""
    with session(folder) as found:
        measure_cases(found, cases, timed, CEILINGS, check_cases(found, cases))
    return rows_of(folder, "checks"), rows_of(folder, "timings")


# What is found


def test_the_cases_of_every_module_that_has_some_are_found() -> None:
    """All modules are searched, whatever they are called; each case is found once, and each name is used once."""
    found: list[Case] = []
    for module in pkgutil.walk_packages(swifti2v_kernels.__path__, "swifti2v_kernels."):
        found += getattr(importlib.import_module(module.name), "CASES", ())
    assert sorted(case.name for case in found) == sorted(case.name for case in all_cases())
    assert len({case.name for case in found}) == len(found) > 50
    assert {case.operator for case in found if case.real} == {case.operator for case in found}  # all are timed
    assert cases_of("conv3d") == [case for case in all_cases() if "conv3d" in case.name] != []


def test_a_new_operator_is_found_by_being_written(tmp_path: Path) -> None:
    with added_module(swifti2v_kernels, tmp_path / "more", "cases.py", EXTRA, all_cases):
        (case,) = cases_of("right")
        assert check_case(case, CPU)["status"] == "ok"
    with pytest.raises(InputError, match="cases: none contains 'right'"):
        cases_of("right")


def test_sizes_of_real_models_are_typed_once() -> None:
    """Sizes and numbers of tokens of real models stand in one table, from which benchmarks and cases have them."""
    sizes = {n for w in WINDOWS.values() for n in (w.width, w.height, w.block_len, w.tokens)}
    files = [path for folder in TYPED_NOWHERE for path in sorted(ROOT.glob(folder))]
    assert len(files) > 15
    for path in files:
        numbers = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not {n for n in numbers if type(n) is int and n > 1000} & sizes, path


# Checks


def by_torch(case: Case, spoil: Callable[[list[Any]], None] = lambda results: None) -> Case:
    """Returns the case with its PyTorch path in place of its kernels; ``spoil`` changes what this returns."""

    @functools.wraps(case.operator)
    def operator(*args: Any, backend: str = "auto", **options: Any) -> Any:
        result = case.operator(*args, **options, backend="torch")
        if backend != "torch":
            spoil(leaves(result))
        return result

    return replace(case, operator=operator)


@pytest.mark.parametrize("case", LAST, ids=operator_name)
def test_every_operator_passes_by_torch_and_not_with_a_wrong_result(case: Case) -> None:
    """One case of every operator passes; with each of its results in turn wrong by 3 %, the error says so.

    Weights are scaled so that results are about as large as inputs.
    """
    results: list[Any] = []
    row = check_case(by_torch(case, results.extend), CPU)
    assert row["status"] == "ok", row
    assert row["error"] < row["limit"]
    assert results
    for x, wide in zip(results, numbers(results), strict=True):
        assert 0.03 < wide.std() < (128 if isinstance(x, Tensor) and x.dtype == torch.uint8 else 3)
    for number in range(len(results)):
        row = check_case(by_torch(case, functools.partial(spoilt, number)), CPU)
        assert row["status"] == "wrong", row
        assert row["error"] == pytest.approx(0.03, rel=0.3)


def spoilt(number: int, results: list[Any]) -> None:
    x = results[number].scales if isinstance(results[number], QuantizedRows) else results[number]
    x.copy_(1.03 * x.double())


def test_what_is_wrong_is_not_timed_and_what_fails_is_a_row(tmp_path: Path) -> None:
    """The rates are of 5 operations and 7 bytes in half a second; without a real size nothing is timed."""
    cases = [case_of(operator) for operator in (right, wrong, hungry, without_resources)]
    timed: list[str] = []

    def noting(calls: dict[str, Any]) -> dict[str, Timing]:
        timed.extend(call.func.__name__ for call in calls.values())
        return timer(calls)

    small = replace(cases[0], name="small alone", real=None)
    checks, timings = worked_off(tmp_path, [*cases, small], noting)
    assert [row["status"] for row in checks] == ["ok", "wrong", "out of memory", "ok", "ok"]
    assert checks[1]["error"] == pytest.approx(0.25)
    assert checks[1]["reason"] == "error 2.5e-01 against float64, allowed 1e-05"
    assert checks[2]["reason"] == "no memory left"
    assert [row["status"] for row in timings] == ["ok", "wrong", "wrong", "failed"]
    assert {row["reason"] for row in timings[1:3]} == {"a check of this operator failed; not timed"}
    assert timings[3]["reason"].startswith("out of resource: shared memory")
    assert timed == ["right"]
    assert [("seconds" in row) for row in timings] == [True, False, False, False]
    row = timings[0]
    assert (row["case"], row["shape"], row["operator"]) == ("right", "6 x 8", "right")
    assert (row["flops"], row["bytes"], row["seconds"], row["peak_bytes"]) == (5, 7, 0.5, 0)
    assert (row["bytes_per_second"], row["tflops"]) == (7 / 0.5, 5 / 0.5 / 1e12)


def test_one_wrong_case_keeps_all_cases_of_its_operator_from_being_timed(tmp_path: Path) -> None:
    def wrong_in_halves(x: Tensor, *, backend: str = "auto") -> Tensor:
        return (wrong if x.dtype == torch.float16 else right)(x, backend=backend)

    cases = [replace(case_of(wrong_in_halves, dtype), name=str(dtype)) for dtype in (torch.float32, torch.float16)]
    checks, timings = worked_off(tmp_path, cases)
    assert [(row["status"], row["limit"]) for row in checks] == [("ok", 1e-5), ("wrong", 2e-3)]
    assert [row["status"] for row in timings] == ["wrong", "wrong"]


# Memory that nobody has written


def half_written(x: Tensor, new: Callable[[Tensor], Tensor], written: int) -> Tensor:
    out = new(x)
    out[:written] = 2 * x[:written]
    return out


NEW: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.empty": lambda x: torch.empty(x.shape, dtype=x.dtype),
    "torch.empty_like": lambda x: torch.empty_like(x),
    "torch.empty_strided": lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(x.shape),
    "new_empty_strided": lambda x: x.new_empty_strided(x.shape, x.stride()),
}


@pytest.mark.parametrize("new", NEW.values(), ids=NEW)
def test_what_an_operator_leaves_unwritten_is_found(new: Callable[[Tensor], Tensor]) -> None:
    """A quarter of the result is not written, and that is found whatever the memory happens to hold."""

    def operator(x: Tensor, *, backend: str = "auto") -> Tensor:
        return 2 * x if backend == "torch" else half_written(x, new, rows)

    rows = 4
    assert check_case(case_of(operator), CPU)["status"] == "ok"
    rows = 3
    row = check_case(case_of(operator), CPU)
    assert (row["status"], row["error"]) == ("wrong", None)
    assert row["reason"].startswith("error nan against float64")


def test_results_written_over_an_input_are_checked_against_the_input_before() -> None:
    """The tensor that is both ``out`` and ``residual`` is one for the reference too, and another than the kernel's."""

    def accumulate(x: Tensor, residual: Tensor, out: Tensor, *, backend: str = "auto") -> Tensor:
        assert out is residual
        assert x.dtype == (torch.float64 if backend == "torch" else torch.float32)
        return out.add_(x, alpha=1.0 if backend == "torch" else factor)

    def inputs(device: torch.device) -> Arguments:
        residual = torch.ones(4, 8, device=device)
        return (torch.ones(4, 8, device=device), residual), {"out": residual}

    case = Case("accumulate", accumulate, inputs, lambda constants: Work(0, 0))
    factor = 1.0
    assert check_case(case, CPU)["status"] == "ok"
    factor = 1.1
    assert check_case(case, CPU)["status"] == "wrong"


@pytest.mark.parametrize("case", LAST, ids=operator_name)
def test_inputs_are_the_same_every_time_and_keep_their_layout(case: Case) -> None:
    """Strides and dtypes stay as the case has them, since they are what it is about."""
    found = [tree_leaves(inputs) for inputs in (randomised(case, CPU), randomised(case, CPU), case.inputs(CPU))]
    for x, again, plain in zip(*found, strict=True):
        if isinstance(x, Tensor):
            assert torch.equal(x, again)
            assert (x.dtype, x.stride(), x.shape) == (plain.dtype, plain.stride(), plain.shape)


def test_the_host_s_time_of_a_call_ends_before_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher is reached in every call, its kernel in none, and Triton launches again afterwards."""
    launches, run = [], JITFunction.run
    monkeypatch.setattr(measure, "_launch_nothing", lambda self, *args, **kwargs: launches.append(self.fn.__name__))
    case = next(case for case in all_cases() if case.name == "norm_modulate C 1536 bfloat16")
    with pretend_gpu(90):
        seconds = measure.host_seconds(case, CPU)
    assert launches == ["adaln_fwd_kernel"] * measure.HOST_CALLS
    assert 1e-6 < seconds < 0.1
    assert JITFunction.run is run


# Several processes


class Pool:
    """A stand-in for a pool of processes: the numbers in ``deadly`` end it, and all that was not done with it."""

    deadly: tuple[int, ...] = ()
    started = 0

    def __init__(self, jobs: int, context: Any, initializer: Any) -> None:
        self.broken, self.jobs = False, jobs
        Pool.started += 1

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *given: Any) -> None:
        pass

    def submit(self, call: Callable[..., Any], number: int, device: str) -> Future[Any]:
        future: Future[Any] = Future()
        self.broken = self.broken or number in Pool.deadly
        if self.broken:
            future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
        else:
            future.set_result(call(number, device))
        return future


@pytest.mark.parametrize("deadly", [(), (2,), (0, 1, 2, 3)], ids=str)
def test_a_process_that_dies_takes_no_other_case_with_it(
    deadly: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every case has one row, and those that ended their process say so."""
    cases = tuple(replace(case_of(right), name=f"case {i}") for i in range(4))
    monkeypatch.setattr(measure, "all_cases", lambda: cases)
    monkeypatch.setattr(measure, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(Pool, "deadly", deadly)
    monkeypatch.setattr(Pool, "started", 0)
    with session(tmp_path) as run:
        found = check_cases(run, cases, jobs=2)
    rows = {row["case"]: row for row in rows_of(tmp_path, "checks")}
    assert sorted(rows) == [case.name for case in cases]
    for i, case in enumerate(cases):
        row = rows[case.name]
        assert row["status"] == ("failed" if i in deadly else "ok")
        if i in deadly:
            assert row["reason"] == "its process ended: a process was terminated abruptly"
    assert found == ({"right"} if deadly else set())
    assert Pool.started == 1 or deadly


@pytest.mark.slow
def test_cases_are_checked_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are interpreted there, which this process cannot do."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cases = cases_of("rms_norm_silu")[:2]
    with session(tmp_path) as run:
        assert check_cases(run, cases, jobs=2) == set()
    rows = rows_of(tmp_path, "checks")
    assert sorted(row["case"] for row in rows) == sorted(case.name for case in cases)
    assert all(0 < row["error"] < row["limit"] == TOLERANCE[torch.bfloat16] for row in rows)


# The command


@pytest.mark.slow
def test_without_cuda_it_checks_in_the_interpreter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A kernel is checked, in bfloat16, and not the PyTorch path."""
    assert main(["operators", "--cases", "rms_norm_silu C96", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "checking every case against float64 in Triton's interpreter" in capfd.readouterr().out
    (row,) = rows_of(tmp_path, "checks")
    assert (row["status"], row["operator"], row["limit"]) == ("ok", "rms_norm_silu", TOLERANCE[torch.bfloat16])
    assert 0 < row["error"] < row["limit"]
    assert list(read_section(tmp_path)["tables"]) == ["checks"]


def test_a_failed_check_is_an_error_that_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.operators.command.interpreting", lambda: True)
    monkeypatch.setattr("bench.operators.command.cases_of", lambda *given: [case_of(right), case_of(wrong)])
    assert main(["operators", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert f"error: wrong: wrong; see the table in {tmp_path / 'out'}" in capsys.readouterr().err
    assert [row["status"] for row in rows_of(tmp_path / "out", "checks")] == ["ok", "wrong"]
