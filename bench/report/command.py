"""``python -m bench report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.harness.registry import Benchmark
from bench.records.comparison import labels_of
from bench.records.read import SHIPPED, read_result, shipped_results
from bench.records.write import dumps, make_folder
from bench.report.page import build_page
from bench.report.readme import generate
from model.errors import InputError
from model.io.durable import write_text

PAGE = Path("out/report.html")
EXAMPLES = """\
examples:
  python -m bench report                              the results in the repository, as out/report.html
  python -m bench report --quick                      the newest file of each card alone
  python -m bench report out/csg-*/result.json --out csg.html
  python -m bench report --readme README.md           its tables, from the results in the repository
  python -m bench report --readme README.md --check   exit with 2 if they are not up to date

The page is one file that loads nothing. In a README what stands between the lines

  <!-- results: cpu csg/whole columns=frames,mode,stage_two_seconds,speedup frames=41|81 -->
  <!-- end of results -->

is replaced by that table of the newest file in bench/results/cpu*/ that has it, here with four columns and the rows of
two clip lengths; csg/verdicts are the figures to be reached, and names with spaces stand in quotes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of its own."""
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all in bench/results")
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help=f"default {PAGE}")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the tables of this file instead of a page")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where the tables would change")


def run(args: argparse.Namespace) -> None:
    """Writes the page, or a README's tables."""
    if args.readme is not None:
        if args.files or args.out is not None or args.quick:
            raise InputError(
                "readme: takes all results in the repository and writes no page; leave FILE, --out and --quick out"
            )
        _readme(args.readme, args.check, args.json)
        return
    if args.check:
        raise InputError("check: expected --readme FILE beside it")
    paths = args.files or shipped_results()
    if not paths:
        raise InputError(f"files: there are no results in {SHIPPED}; name some")
    results, out = {path: read_result(path) for path in paths}, args.out or PAGE
    if args.quick:
        in_time = sorted(results.items(), key=lambda item: item[1]["environment"]["date"])
        newest = {document["environment"]["device"]: path for path, document in in_time}
        results = {path: document for path, document in results.items() if path in newest.values()}
    paths, documents = list(results), list(results.values())
    make_folder(out.parent)
    _write(out, build_page(paths, documents))
    if not args.json:
        print(out.resolve())
        return
    files = [
        {"file": str(path), "label": label, "sections": list(document["sections"])}
        for path, label, document in zip(paths, labels_of(paths, documents), documents, strict=True)
    ]
    print(dumps({"page": str(out.resolve()), "files": files}), end="")


def _readme(path: Path, check: bool, as_json: bool) -> None:
    try:
        before = path.read_text()
    except OSError as error:
        raise InputError(f"readme: {path} cannot be read: {error.strerror}") from error
    after = generate(before, shipped_results(), path)
    if check:
        if after != before:
            changed = [
                i for i, (a, b) in enumerate(zip(before.split("\n"), after.split("\n"), strict=False), 1) if a != b
            ]
            where = f" (first at line {changed[0]})" if changed else ""
            raise InputError(
                f"readme: {path} is not what its results give{where}; run python -m bench report --readme {path}"
            )
    elif after != before:
        _write(path, after)
    if as_json:
        print(dumps({"readme": str(path), "changed": after != before}), end="")
    else:
        print(f"{path} {'is up to date' if after == before else 'written'}")


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"out: cannot write {path}: {error.strerror}") from error


BENCHMARK = Benchmark(
    name="report",
    summary="one page of result files, or the tables of a README",
    description="Makes one self-contained HTML page of result files, or writes their tables into a README.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    order=60,
    quick="only the newest file of each card",
)
