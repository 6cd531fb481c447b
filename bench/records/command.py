"""The command ``python -m bench compare``."""

from __future__ import annotations

import argparse
from typing import Any

from bench.harness.registry import Benchmark
from bench.records.comparison import compare_documents, labels_of, only_changes
from bench.records.markdown import format_comparison
from bench.records.read import read_result
from bench.records.write import dumps, make_room
from model.cli.options import parse_path
from model.errors import InputError
from model.io.durable import write_text

EXAMPLES = """\
examples:
  python -m bench compare bench/results/nvidia-h200/A.json bench/results/nvidia-h200/B.json
  python -m bench compare before/result.json after/result.json --section attention
  python -m bench compare A.json B.json --quick       what has changed alone
  python -m bench compare *.json --json --out comparison.json

The first file is what the others are compared with. A figure is better or worse only where it differs by more than the
spreads of both runs explain (bench/records/comparison.py says how); predictions are never better or worse than
measurements.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command alone."""
    parser.add_argument("files", nargs="+", type=parse_path, metavar="FILE", help="result files, at least two")
    parser.add_argument("--section", metavar="NAME", help="only this section")
    parser.add_argument("--out", type=parse_path, metavar="FILE", help="write it there instead of printing it")


def run(args: argparse.Namespace) -> None:
    """Prints or writes the comparison."""
    documents = [read_result(path) for path in args.files]
    labels = labels_of(args.files, documents)
    if args.section is not None:
        documents = [_only(document, args.section) for document in documents]
        if not any(document["sections"] for document in documents):
            there = dict.fromkeys(name for path in args.files for name in read_result(path)["sections"])
            raise InputError(f"section: {args.section!r} is in none of the files; there are {', '.join(there)}")
    comparison = compare_documents(documents, labels)
    if args.json:
        text = dumps(only_changes(comparison) if args.quick else comparison)
    else:
        text = f"{format_comparison(comparison, changes=args.quick)}\n"
    if args.out is None:
        print(text, end="")
        return
    make_room(args.out)
    write_text(args.out, text)
    print(args.out.resolve())


def _only(document: dict[str, Any], name: str) -> dict[str, Any]:
    return {**document, "sections": {n: section for n, section in document["sections"].items() if n == name}}


BENCHMARK = Benchmark(
    name="compare",
    summary="result files of cards or commits against each other",
    description="Compares result files: ratios over the first, and whether they are more than spread.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    order=61,
    quick="only what is better, worse or failed",
)
