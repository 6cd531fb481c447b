"""The command ``python -m bench report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from bench.harness.registry import Benchmark
from bench.records.comparison import labels_of
from bench.records.read import SHIPPED, read_result, read_text, shipped_results
from bench.records.write import dumps, make_room
from bench.report.fill import FORM, START, filled, marks_of
from bench.report.page import build_page
from bench.report.rates import measured_rates, rates_file
from model.cli.options import parse_path
from model.errors import InputError
from model.io.durable import write_text

PAGE = Path("out/report.html")
EXAMPLES = """\
examples:
  python -m bench report                              the results in the repository, as out/report.html
  python -m bench report --quick                      the newest file of each card alone
  python -m bench report out/csg-*/result.json --out csg.html
  python -m bench report --fill README.md docs/*.md docs/results/*.md           their tables, from bench/results
  python -m bench report --rates                      model/memory/rates.json, for the estimates of plans
  python -m bench report --fill README.md docs/*.md docs/results/*.md --check   exit with 2 if some are not up to date

The page is one file that loads nothing. In a Markdown file what stands between the lines

  <!-- results: cpu csg/whole columns=frames,mode,stage_two_seconds,speedup frames=41|81 -->
  <!-- end of results -->

is replaced by that table of the newest file in bench/results/cpu*/ that has it, here with four columns and the rows of
two clip lengths; csg/verdicts are the figures to be reached, and names with spaces stand in quotes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command alone."""
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
        # A result file after --fill would be taken for a Markdown file.
        results = any(path.suffix == ".json" for path in args.fill)
        if args.files or args.out is not None or args.quick or results:
            raise InputError(
                "fill: takes all results in the repository and writes no page; leave result files, --out and --quick"
                " out"
            )
        _fill(args.fill, args.check, args.json)
        return
    if args.check:
        raise InputError("check: expected --fill FILE.md beside it")
    paths = args.files or shipped_results()
    if not paths:
        raise InputError(f"files: there are no results in {SHIPPED}; name some")
    results, out = {path: read_result(path) for path in paths}, args.out or PAGE
    if args.quick:
        in_time = sorted(results.items(), key=lambda item: item[1]["environment"]["date"])
        newest = {document["environment"]["device"]: path for path, document in in_time}
        results = {path: document for path, document in results.items() if path in newest.values()}
    paths, documents = list(results), list(results.values())
    make_room(out)
    write_text(out, build_page(paths, documents))
    if not args.json:
        print(out.resolve())
        return
    files = [
        {"file": str(path), "label": label, "sections": list(document["sections"])}
        for path, label, document in zip(paths, labels_of(paths, documents), documents, strict=True)
    ]
    print(dumps({"page": str(out.resolve()), "files": files}), end="")


def _rates(check: bool) -> None:
    """Writes the table of rates; with ``check`` fails where it would change."""
    path, text = rates_file(), measured_rates({path: read_result(path) for path in shipped_results()})
    if read_text(path) != text:
        if check:
            raise InputError(f"rates: {path} is not what the results give; run python -m bench report --rates")
        write_text(path, text)
    print(f"{path}: up to date" if check else path)


def _fill(paths: Sequence[Path], check: bool, as_json: bool) -> None:
    """Fills all files or, where one asks for what is not there, none; with ``check`` fails where one would change."""
    before = {path: read_text(path) for path in paths}
    counts = {path: sum(mark["what"] is not None for mark in marks_of(text)) for path, text in before.items()}
    if not any(counts.values()):
        names = ", ".join(map(str, before))
        raise InputError(f"fill: {names}: expected a table that begins with {START} {FORM} --> on a line of its own")
    documents = {path: read_result(path) for path in shipped_results()}
    after = {path: filled(text, documents, path) for path, text in before.items()}
    stale = [path for path in before if after[path] != before[path]]
    if check and stale:
        lines = [
            f"{path}, line {_first_difference(before[path], after[path])}: is not what the results give"
            for path in stale
        ]
        raise InputError(
            "fill: " + "\n".join(lines) + f"; run python -m bench report --fill {' '.join(map(str, stale))}"
        )
    for path in stale:
        write_text(path, after[path])
    if as_json:
        found = [{"file": str(path), "tables": counts[path], "changed": path in stale} for path in before]
        print(dumps({"filled": found}), end="")
        return
    for path, count in counts.items():
        state = "written" if path in stale else "up to date"
        tables = "1 table" if count == 1 else f"{count} tables"
        print(f"{path}: {f'{tables}, {state}' if count else 'has no tables to fill'}")


def _first_difference(before: str, after: str) -> int:
    """Returns the number of the first line in which two texts differ."""
    pairs = zip_longest(before.split("\n"), after.split("\n"))
    return next(i for i, (a, b) in enumerate(pairs, 1) if a != b)


BENCHMARK = Benchmark(
    name="report",
    summary="one page of result files, or the tables of Markdown files",
    description="Makes one self-contained HTML page of result files, or writes their tables into Markdown files.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    order=60,
    quick="only the newest file of each card",
)
