"""The command ``python -m bench [SUBCOMMAND]``; without a subcommand it is ``csg``."""

from __future__ import annotations

import argparse
import sys

from bench.harness.registry import add_parser, benchmarks
from bench.harness.session import run_benchmark
from model.cli.options import CommandParser, run_command

EXAMPLES = """\
examples:
  python -m bench                            end-to-end against segment-wise generation, at this machine's sizes
  python -m bench attention --quick          one subject; --help of each has its own examples
  python -m bench campaign                   everything that this card can answer, in nine minutes
  python -m bench report                     one page of the results in the repository
  python -m bench compare A.json B.json      two cards, or two commits
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of ``python -m bench``; every benchmark adds its own subcommand."""
    parser = CommandParser(
        prog="python -m bench",
        description="Benchmarks of swifti2v. Without a subcommand: csg.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND")
    for benchmark in benchmarks().values():
        add_parser(commands, benchmark)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser, argv = build_parser(), list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in (*benchmarks(), "-h", "--help"):
        if argv and not argv[0].startswith("-") and "." not in argv[0]:
            parser.error(f"unknown subcommand {argv[0]!r}; expected one of {', '.join(benchmarks())}")
        argv.insert(0, "csg")
    args = parser.parse_args(argv)
    args.argv = argv
    return run_command(lambda: run_benchmark(benchmarks()[args.command], args))


if __name__ == "__main__":
    raise SystemExit(main())
