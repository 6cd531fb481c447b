"""The command ``python -m bench tests``."""

from __future__ import annotations

import argparse
import os

from bench.hardware.tests import collect, run_tests
from bench.harness.registry import JOBS, Benchmark
from bench.harness.session import Session

EXAMPLES = """\
examples:
  python -m bench tests                  the tests marked gpu, in parallel processes, as a table
  pytest -m gpu -k conv                  one after another, those whose name contains "conv"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command alone."""
    jobs = max(min((os.cpu_count() or 1) // 2, 12), 1)
    parser.add_argument("--jobs", type=JOBS, default=jobs, help="processes (default %(default)s)")


def run(args: argparse.Namespace, session: Session) -> None:
    """Runs the hardware tests; counts them where there is no CUDA."""
    names = collect()
    if not session.cuda:
        session.section.note(f"{len(names)} tests need a GPU (pytest -m gpu); there is none here.")
        return
    session.say(f"{len(names)} tests in {args.jobs} processes")
    table = session.section.table("tests", "hardware tests", identity=("test",), metrics=("seconds",))
    run_tests(names, args.jobs, session.folder, table)
    counts = {status: sum(row["status"] == status for row in table.rows) for status in ("ok", "failed", "skipped")}
    session.section.note(f"{counts['ok']} passed, {counts['failed']} failed, {counts['skipped']} skipped")


BENCHMARK = Benchmark(
    name="tests",
    summary="the test suite's hardware tests, in parallel processes",
    description="Runs the tests marked gpu and keeps their outcome as results.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Hardware tests",
    order=42,
    quick="no difference",
)
