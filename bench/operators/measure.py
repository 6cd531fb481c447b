"""The operators at the sizes of real models, checked by their cases and then timed; what is wrong is not timed."""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from bench.harness.session import Session
from bench.harness.timing import Ceilings, Timer, peak_of, time_one
from bench.operators.check import check_case, randomised
from bench.operators.compare import rates
from bench.operators.discover import all_cases, operator_name
from bench.records.outcome import FAILURES, failure
from bench.static.compile_only import quiet_exit
from model.machine.host import release
from swifti2v_kernels.common.case import Case

CHECK_IDENTITY, CHECK_METRICS = ("case",), ("error", "limit", "host_seconds")
IDENTITY = ("case", "shape")
#: Calls by which the host's time is measured.
HOST_CALLS = 50
METRICS = (
    "seconds", "launch_seconds", "bytes_per_second", "fraction_of_copy", "tflops", "fraction_of_matmul", "peak_bytes",
    "flops", "bytes",
)  # fmt: skip


def check_cases(session: Session, cases: Sequence[Case], jobs: int = 1) -> set[str]:
    """Adds a table of every case, worked off by ``jobs`` processes; returns the operators of which a case is wrong.

    A process whose device has failed for good is lost with the case that did it, and the others go on.
    """
    table = session.section.table(
        "checks", "every case against float64, unwritten memory poisoned", identity=CHECK_IDENTITY,
        metrics=CHECK_METRICS, columns=("operator", "case", *CHECK_METRICS),
    )  # fmt: skip
    rows = _checked(cases, session.device, jobs)
    for row in session.progress(rows, total=len(cases), unit="case", leave=False):
        table.add(row)
    return {row["operator"] for row in table.rows if row["status"] != "ok"}


def _checked(cases: Sequence[Case], device: torch.device, jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from (_row(case, device) for case in cases)
        return
    numbers = {case.name: i for i, case in enumerate(all_cases())}
    tasks = [numbers[case.name] for case in cases]
    # A fresh process for every few cases: after an illegal access nothing runs in the old one.
    context = multiprocessing.get_context("spawn")
    while tasks:
        done: set[int] = set()
        with ProcessPoolExecutor(min(jobs, len(tasks)), context, initializer=quiet_exit) as pool:
            futures = {pool.submit(check_number, task, str(device)): task for task in tasks}
            for future in as_completed(futures):
                # Its process may have ended, or lost its device, by another case's fault: then it is tried again.
                if future.exception() is None:
                    done.add(futures[future])
                    yield future.result()
        if not done:
            # Each of what is left fails; one at a time says which and why.
            for task in tasks:
                with ProcessPoolExecutor(1, context, initializer=quiet_exit) as pool:
                    try:
                        yield pool.submit(check_number, task, str(device)).result()
                    except Exception as error:
                        case = all_cases()[task]
                        row = {"case": case.name, "operator": operator_name(case)}
                        yield row | failure(RuntimeError(f"its process ended: {error}"))
            return
        tasks = [task for task in tasks if task not in done]


def _row(case: Case, device: torch.device) -> dict[str, Any]:
    row = check_case(case, device)
    return row | {"host_seconds": host_seconds(case, device)} if row["status"] == "ok" else row


def host_seconds(case: Case, device: torch.device) -> float:
    """Returns the median time of the host's share of a case's call, in seconds.

    That are checks, the choice of what computes it, and the launcher up to the launch, in whose place nothing is done.
    What torch computes in place of a kernel, it computes.
    """
    args, kwargs = case.inputs(device)
    times = []
    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(patch.object(kind, "run", _launch_nothing))
        stack.enter_context(torch.no_grad())
        for _ in range(HOST_CALLS):
            begin = time.perf_counter()
            case.operator(*args, **kwargs)
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _launch_nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    return None


def check_number(number: int, device: str) -> dict[str, Any]:
    """Checks one case, for a process of its own. A device that is lost ends the process."""
    row = _row(all_cases()[number], torch.device(device))
    if device.startswith("cuda"):
        torch.cuda.synchronize()  # an asynchronous failure surfaces here
    return row


def measure_cases(
    session: Session, cases: Sequence[Case], timer: Timer, ceilings: Ceilings, wrong: Collection[str]
) -> None:
    """Adds a table of the cases that have a real size; operators that are ``wrong`` are not timed."""
    timed = [case for case in cases if case.real is not None]
    if not timed:
        return
    table = session.section.table(
        "timings", "operators at the sizes of real models", identity=IDENTITY, metrics=METRICS,
        columns=(*IDENTITY, *METRICS[:7]),
        note="GB/s are the least traffic over the time; peak memory is what a call allocates.",
    )  # fmt: skip
    for case in session.progress(timed, unit="case"):
        row: dict[str, Any] = {"case": case.name, "shape": case.real.shape, "operator": operator_name(case)}
        row |= {"flops": case.real.cost.flops, "bytes": case.real.cost.bytes, "ours": True, "provider": "swifti2v"}
        if row["operator"] in wrong:
            row |= {"status": "wrong", "reason": "a check of this operator failed; not timed"}
        else:
            try:
                row |= _timed(case, session.device, timer, ceilings)
            except FAILURES as error:
                row |= failure(error)
        release(session.device)
        table.add(row)


def _timed(case: Case, device: torch.device, timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    assert case.real is not None
    with real_call(case, device) as call:
        call()  # compiles
        _, peak = peak_of(call, device)
        timing = time_one(timer, call)
    return {**timing.row(), "peak_bytes": peak, **rates(case.real.cost, timing.median, ceilings)}


@contextmanager
def real_call(case: Case, device: torch.device) -> Iterator[Callable[[], Any]]:
    """Makes the case's call at its real size, its inputs filled."""
    args, kwargs = randomised(case, device, real=True)
    with torch.no_grad():
        yield functools.partial(case.operator, *args, **kwargs)
