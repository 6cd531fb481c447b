"""The command ``python -m bench compare``."""

from __future__ import annotations

import argparse

from bench.harness.registry import Benchmark
from bench.records.comparison import compare_documents
from bench.records.markdown import format_comparison
from bench.records.read import label_of, read_result
from bench.records.write import dumps
from model.cli.options import parse_path

EXAMPLES = """\
examples:
  python -m bench compare bench/results/nvidia-h200/A.json bench/results/nvidia-h200/B.json
  python -m bench compare before/result.json after/result.json > comparison.md
  python -m bench compare *.json --json > comparison.json

The first file is what the others are compared with. A figure is better or worse only where it differs by more than the
spreads of both runs explain (bench/records/comparison.py says how); predictions are never better or worse than
measurements.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("files", nargs="+", type=parse_path, metavar="FILE", help="result files, at least two")
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def run(args: argparse.Namespace) -> None:
    """Prints the comparison."""
    documents = [read_result(path) for path in args.files]
    labels = [label_of(path, document) for path, document in zip(args.files, documents, strict=True)]
    comparison = compare_documents(documents, labels)
    print(dumps(comparison) if args.json else f"{format_comparison(comparison)}\n", end="")


BENCHMARK = Benchmark(
    name="compare",
    summary="result files of cards or commits against each other",
    description="Compares result files: ratios over the first, and whether they are more than spread.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    order=61,
)
