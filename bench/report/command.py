"""The command ``python -m bench report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.harness.registry import Benchmark
from bench.records.read import SHIPPED, read_result, read_text, shipped_results
from bench.records.write import make_folder
from bench.report.fill import FORM, START, filled, tables_in
from bench.report.page import build_page
from bench.report.rates import measured_rates, rates_file
from model.cli.options import parse_path
from model.errors import InputError
from model.io.durable import write_text

PAGE = Path("out/report.html")
EXAMPLES = """\
examples:
  python -m bench report                              the results in the repository, as out/report.html
  python -m bench report out/csg-*/result.json --out csg.html
  python -m bench report --fill README.md docs/*.md docs/results/*.md           their tables, from bench/results
  python -m bench report --rates                      model/memory/rates.json, for the estimates of plans
  python -m bench report --fill README.md docs/*.md docs/results/*.md --check   exit with 2 if some are not up to date

The page is one file that loads nothing. docs/results/format.md says how a Markdown file marks the place of a table.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "files", nargs="*", type=parse_path, metavar="FILE", help="result files (default: all in bench/results)"
    )
    parser.add_argument(
        "--out", type=parse_path, metavar="PAGE.html", help=f"where the page is written (default {PAGE})"
    )
    parser.add_argument(
        "--fill", type=parse_path, nargs="+", metavar="FILE.md", help="fill the tables of Markdown files; makes no page"
    )
    parser.add_argument(
        "--rates", action="store_true", help="write the measured rates that plans estimate their time with; no page"
    )
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where the tables would change")


def run(args: argparse.Namespace) -> None:
    """Writes the page, or fills the tables of Markdown files, or writes the rates of plans."""
    if args.rates:
        _rates(args.check)
        return
    if args.fill is not None:
        if args.files or args.out is not None:
            raise InputError("fill: takes all results in the repository and writes no page: leave FILE and --out out")
        _fill(args.fill, args.check)
        return
    if args.check:
        raise InputError("check: expected --fill FILE.md beside it")
    paths, out = args.files or shipped_results(), args.out or PAGE
    if not paths:
        raise InputError(f"files: there are no results in {SHIPPED}; name some")
    page = build_page(paths, [read_result(path) for path in paths])
    make_folder(out.parent)
    if out.is_dir():
        raise InputError(f"out: cannot write {out}: Is a directory")
    write_text(out, page)
    print(out.resolve())


def _rates(check: bool) -> None:
    """Writes the table of rates; with ``check`` fails where it would change."""
    path, text = rates_file(), measured_rates({path: read_result(path) for path in shipped_results()})
    if read_text(path) != text:
        if check:
            raise InputError(f"rates: {path} is not what the results give; run python -m bench report --rates")
        write_text(path, text)
    print(f"{path}: up to date" if check else path)


def _fill(paths: Sequence[Path], check: bool) -> None:
    """Fills all files or, where one asks for what is not there, none; with ``check`` fails where one would change."""
    before = {path: read_text(path) for path in paths}
    documents = {path: read_result(path) for path in shipped_results()}
    after = {path: filled(text, documents, path) for path, text in before.items()}
    if not any(map(tables_in, before.values())):
        names = ", ".join(map(str, before))
        raise InputError(f"fill: {names}: expected a table that begins with {START} {FORM} --> on a line of its own")
    stale = [path for path in paths if after[path] != before[path]]
    if check and stale:
        names = " ".join(map(str, stale))
        raise InputError(f"fill: {names}: not what the results give; run python -m bench report --fill {names}")
    for path in stale:
        write_text(path, after[path])
    for path, text in before.items():
        print(f"{path}: tables: {tables_in(text)}, {'written' if path in stale else 'up to date'}")


BENCHMARK = Benchmark(
    name="report",
    summary="one page of result files, or the tables of Markdown files",
    description="Makes one self-contained HTML page of result files, or writes their tables into Markdown files.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    order=60,
)
