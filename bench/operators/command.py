"""The command ``python -m bench operators``."""

from __future__ import annotations

import argparse
import os

from bench.harness.interpreted import run_interpreted
from bench.harness.registry import JOBS, MILLISECONDS, Benchmark
from bench.harness.session import Session
from bench.operators.discover import cases_of
from bench.operators.measure import check_cases, measure_cases
from model.errors import InputError
from swifti2v_kernels.common.target import capability_of, interpreting

EXAMPLES = """\
examples:
  python -m bench operators                     all checks, then all timings (two minutes on a GPU)
  python -m bench operators --cases conv3d      cases whose name contains "conv3d"
  python -m bench operators --check             checks alone
  python -m bench operators                     without CUDA: a check of each operator in Triton's interpreter

Operators are found by their CASES (swifti2v_kernels/common/case.py): a new one is here as soon as its family's
cases.py has it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command alone."""
    parser.add_argument("--cases", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    parser.add_argument("--check", action="store_true", help="no timings, and exit with an error if a check fails")
    parser.add_argument(
        "--milliseconds", type=MILLISECONDS, default=50, help="time for each timing (default %(default)s)"
    )
    jobs = min(os.cpu_count() or 1, 8)
    parser.add_argument("--jobs", type=JOBS, default=jobs, help="processes of the checks (default %(default)s)")


def run(args: argparse.Namespace, session: Session) -> None:
    """Checks all cases and then times them; without CUDA it only checks, in the interpreter."""
    # Without a GPU one of every operator, unless some are named.
    cases = cases_of(args.cases, args.quick or (not session.cuda and not args.cases))
    if session.cuda:
        capability = capability_of(session.device)
        cases = [case for case in cases if capability is None or case.least_capability <= capability]
    elif not interpreting():
        run_interpreted(session, "every case against float64")
        return
    wrong = check_cases(session, cases, args.jobs if session.cuda else 1)
    if session.cuda and not args.check:
        measure_cases(session, cases, session.timer(args.milliseconds), session.ceilings(), wrong)
    elif wrong:
        raise InputError(f"wrong: {', '.join(sorted(wrong))}; see the table in {session.folder}")


BENCHMARK = Benchmark(
    name="operators",
    summary="every operator of the library, checked against float64 and timed at real sizes",
    description="Checks every case of every operator against float64, then times those that have a real size.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Operators",
    order=19,
    quick="one case of every operator",
)
