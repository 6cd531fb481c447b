"""The command ``python -m bench tests``."""

from __future__ import annotations

import argparse
import os

from bench.hardware.tests import collect, run_tests
from bench.harness.registry import JOBS, Benchmark
from bench.harness.session import Session
from model.errors import InputError, require

EXAMPLES = """\
examples:
  python -m bench tests                  the tests marked gpu, in parallel processes, as a table
  python -m bench tests --tests conv     those whose name contains "conv"
  pytest -m gpu                          the same, one after another
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command alone."""
    parser.add_argument("--tests", metavar="TEXT", default="", help="only tests whose name contains TEXT")
    jobs = max(min((os.cpu_count() or 1) // 2, 12), 1)
    parser.add_argument("--jobs", type=JOBS, default=jobs, help="processes (default %(default)s)")


def run(args: argparse.Namespace, session: Session) -> None:
    """Runs the hardware tests; counts them where there is no CUDA."""
    known = collect()
    names = [name for name in known if args.tests in name]
    if not names:
        raise InputError(f"tests: none of {len(known)} hardware tests contains {args.tests!r}")
    if not session.cuda:
        session.section.note(f"{len(names)} tests need a GPU (pytest -m gpu); there is none here.")
        return
    table = session.section.table("tests", "hardware tests", identity=("test",), metrics=("seconds",))
    with require("tqdm", "bench").tqdm(total=len(names), unit="test", dynamic_ncols=True, disable=None) as bar:
        for _ in run_tests(names, args.jobs, session.folder, table):
            bar.update()
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
