"""The command ``python -m bench sanitize``."""

from __future__ import annotations

import argparse
import os

from bench.harness.registry import JOBS, Benchmark, names
from bench.harness.session import Session
from bench.operators.discover import all_cases, cases_of
from bench.sanitize.run import find_planted, watch_cases
from bench.sanitize.tool import NAME, TOOLS, find_tool
from model.errors import InputError
from swifti2v_kernels.common.target import capability_of

EXAMPLES = """\
examples:
  python -m bench sanitize                           memcheck and racecheck over every case of every operator
  python -m bench sanitize --checks racecheck --cases segment_attention
  python -m bench sanitize --check                   exit with an error unless all is clean

It needs NVIDIA's compute-sanitizer, which the CUDA toolkit brings, on a machine whose driver lets it work. Each check
must first find a fault that is planted for it. Of a sum over several warps racecheck may name threads that write it to
the same place, differently rounded: that is Triton's (triton-lang/triton issue 7264). Without a GPU: tests/sanitizer.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command alone."""
    parser.add_argument(
        "--checks", type=names(TOOLS), metavar="NAME,...", default=",".join(TOOLS),
        help="checks to run, of %(default)s (default both)",
    )  # fmt: skip
    parser.add_argument("--cases", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    parser.add_argument("--tool", metavar="PROGRAM", help=f"default {NAME} in PATH or of a CUDA toolkit")
    parser.add_argument("--check", action="store_true", help="exit with an error unless all is clean")
    jobs = min(os.cpu_count() or 1, 8)
    parser.add_argument("--jobs", type=JOBS, default=jobs, help="processes at once (default %(default)s)")


def run(args: argparse.Namespace, session: Session) -> None:
    """Runs both checks; without CUDA says what they would watch."""
    cases = cases_of(args.cases, args.quick)
    if not session.cuda:
        session.section.note(
            f"{len(cases)} cases need a GPU and {NAME}; there is none here. What Triton's interpreter can see of the "
            "same kernels is in tests/sanitizer."
        )
        return
    tool = find_tool(args.tool)
    capability = capability_of(session.device)
    numbers = [
        number for number, case in enumerate(all_cases())
        if case in cases and (capability is None or case.least_capability <= capability)
    ]  # fmt: skip
    table = session.section.table(
        "watched", f"every case under {NAME}", identity=("tool", "case"), metrics=("errors",),
        columns=("tool", "operator", "case", "errors", "kernels"),
        note="; ".join(f"{name}: {TOOLS[name]}" for name in args.checks) + ".",
    )  # fmt: skip
    for check in args.checks:
        useless = find_planted(tool, check, session.folder)
        if useless is not None:
            session.section.note(f"{check} is not to be trusted here: {useless}")
            for number in numbers:
                row = {"tool": check, "case": all_cases()[number].name, "errors": None}
                table.add(row | {"status": "not available", "reason": useless})
            continue
        rows = watch_cases(tool, check, numbers, args.jobs, session.folder)
        for row in session.progress(rows, total=len(numbers), desc=check, unit="case"):
            table.add(row)
    clean = sum(row["status"] == "ok" for row in table.rows)
    kernels = {name for row in table.rows if row["status"] == "ok" for name in row["kernels"].split(", ")}
    session.section.note(f"{clean} of {len(table.rows)} clean; {len(kernels)} kernels")
    if args.check and clean < len(table.rows):
        raise InputError(f"check: {len(table.rows) - clean} of {len(table.rows)} not clean; see {session.folder}")


BENCHMARK = Benchmark(
    name="sanitize",
    summary="NVIDIA's compute-sanitizer over every kernel: accesses out of bounds, races",
    description="Runs every case of every operator under compute-sanitizer's memcheck and racecheck.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Kernels under compute-sanitizer",
    order=43,
    quick="one case of every operator",
)
