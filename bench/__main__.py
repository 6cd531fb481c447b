"""``python -m bench [SUBCOMMAND]``: without a subcommand, ``csg``."""

from __future__ import annotations

import argparse
import sys

from bench import attention, compile, csg, dit, vae
from model.command import CommandParser, run_command

BENCHMARKS = {"csg": csg, "attention": attention, "dit": dit, "vae": vae, "compile": compile}


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m bench``; every benchmark adds its own subcommand."""
    parser = CommandParser(
        prog="python -m bench",
        description="Benchmarks of swifti2v. Without a subcommand: csg.",
        epilog="examples:\n  python -m bench\n  python -m bench compile --check\n  python -m bench attention --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND")
    for name, module in BENCHMARKS.items():
        module.add_parser(commands, name)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in (*BENCHMARKS, "-h", "--help"):
        argv.insert(0, "csg")
    args = build_parser().parse_args(argv)
    return run_command(lambda: BENCHMARKS[args.command].run(args))


if __name__ == "__main__":
    raise SystemExit(main())
