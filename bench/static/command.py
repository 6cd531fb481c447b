"""The command ``python -m bench compile``."""

from __future__ import annotations

import argparse
import os

from bench.harness.registry import JOBS, Benchmark, names
from bench.harness.session import Session
from bench.operators.discover import all_cases, cases_of
from bench.static import report
from model.cli.options import positive
from model.errors import InputError
from swifti2v_kernels.common.target import TARGETS

EXAMPLES = """\
examples:
  python -m bench compile                          the whole table, about ten minutes on two cores the first time
  python -m bench compile --check                  also fail on spills, too much shared memory, no or serial MMA (CI)
  python -m bench compile --check --spread 2       each case for two of the cards, which take turns: a third of the time
  python -m bench compile --targets 89,90 --cases "d128"
  python -m bench compile --json > report.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that this benchmark alone has."""
    known = [str(capability) for capability in TARGETS]
    parser.add_argument(
        "--targets", metavar="CC,CC,...", type=names(known), help=f"capabilities of cards (default {','.join(known)})"
    )
    parser.add_argument("--cases", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    parser.add_argument(
        "--spread",
        metavar="N",
        type=positive,
        help="compile each case for N of the cards, which take turns, or for more where an operator has few cases",
    )
    parser.add_argument("--check", action="store_true", help="exit with an error if any kernel has a fault")
    jobs = min(os.cpu_count() or 1, 8)
    parser.add_argument("--jobs", type=JOBS, default=jobs, help="processes (default %(default)s)")


def run(args: argparse.Namespace, session: Session) -> None:
    """Compiles the kernels, reads their binaries, and with ``--check`` fails if one has a fault."""
    targets = [int(text) for text in args.targets or ()] or ([89, 90] if args.quick else list(TARGETS))
    cases = [all_cases().index(case) for case in cases_of(args.cases or ("d128" if args.quick else ""))]
    rows = report.compile_all(report.select_tasks(targets, cases, args.spread), args.jobs)
    table = session.section.table(
        "kernels", "every kernel, compiled", identity=report.IDENTITY, metrics=report.METRICS, columns=report.COLUMNS,
        note=report.NOTE,
    )  # fmt: skip
    for row in rows:
        table.add(report.table_row(row))
    faults = [(row, fault) for row in rows for fault in row.faults()]
    if faults:
        lines = [f"  sm_{row.capability} {row.case} {row.kernel} {row.config}: {fault}" for row, fault in faults]
        message = f"{len(faults)} fault(s) in {len(rows)} kernels:\n" + "\n".join(lines)
        if args.check:
            raise InputError(message)
        session.section.note(message)
    else:
        session.section.note(
            f"{len(rows)} kernels: no spills, shared memory within limits, MMA instructions as meant, none serialised"
        )


BENCHMARK = Benchmark(
    name="compile",
    summary="registers, spills, shared memory and predicted bounds of every kernel, without a GPU",
    description="Compiles every kernel in every shipped configuration for every target and reads the binaries.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="What the compiler made of the kernels",
    order=40,
    quick="only head_dim 128 on the newest of each kind: 89, 90",
)
