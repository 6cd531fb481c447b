"""The command ``python -m bench campaign``."""

from __future__ import annotations

import argparse
import sys
import time

from bench.campaign.parts import PARTS
from bench.campaign.run import run_parts, save_result
from bench.harness.environment import capture
from bench.harness.registry import MINUTES, Benchmark, names
from bench.harness.session import RESULT, default_folder
from bench.records.markdown import format_section
from bench.records.read import SHIPPED
from bench.records.write import Record, dumps, make_folder
from model.cli.options import parse_path, pick_device
from model.errors import InputError, printable, require
from model.io.durable import write_text

EXAMPLES = f"""\
examples:
  python -m bench campaign                      all parts, at most nine minutes on an H200-class card
  python -m bench campaign --save               and a copy to bench/results/<gpu>/<date>-<commit>.json
  python -m bench campaign --parts operators,attention,dit --minutes 4        the kernels alone
  python -m bench campaign --out out/campaign   again with the same --out runs only what is missing
  python -m bench campaign --dry-run            every part at toy size on a CPU, to see that it works

parts, in order of value:
{chr(10).join(f"  {part.name:<11}{part.answers}" for part in PARTS)}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    known = [part.name for part in PARTS]
    parser.add_argument(
        "--parts", type=names(known), default=tuple(known), metavar="NAME,...", help="only these (default all)"
    )
    parser.add_argument("--minutes", type=MINUTES, default=9.0, help="for all parts together (default 9)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument("--dry-run", action="store_true", help="every part at toy size on a CPU")
    parser.add_argument("--out", type=parse_path, metavar="DIR", help="results folder (default out/campaign-DATE-TIME)")
    parser.add_argument("--save", action="store_true", help="copy the result to bench/results")


def run(args: argparse.Namespace) -> None:
    """Runs all parts that are chosen, keeps their results, and says which failed.

    Raises:
        InputError: an option does not fit, there is no card, or in a dry run a part failed.
    """
    parts = [part for part in PARTS if part.name in args.parts]
    device = pick_device("cpu" if args.dry_run else "auto")
    if device.type != "cuda" and not args.dry_run:
        raise InputError("campaign: expected a CUDA device; --dry-run runs every part at toy size on a CPU")
    if args.save and args.dry_run:
        raise InputError("save: expected a run on a card, not a dry run")
    require("tqdm", "bench")
    start, folder = time.monotonic(), args.out or default_folder("campaign")
    make_folder(folder)
    record = Record(folder / RESULT, capture(device))
    # A dry run is no measurement: it takes as long as it takes.
    deadline = start + 60 * (60 if args.dry_run else args.minutes)
    failed: list[str] = []

    def say(text: str) -> None:
        print(printable(text), flush=True, file=sys.stderr if args.json else sys.stdout)

    try:
        failed = run_parts(parts, record, folder, dry=args.dry_run, deadline=deadline, say=say)
    finally:
        texts = [f"## {name}\n\n{format_section(section)}" for name, section in record.data["sections"].items()]
        write_text(folder / "table.md", "\n\n".join(texts) + "\n")
        say(f"{time.monotonic() - start:.0f} s; results in {folder.resolve()}")
        if args.save:
            say(f"copied to {save_result(record, SHIPPED)}")
        if args.json:
            print(dumps(record.data), end="")
    if failed:
        message = f"failed: {', '.join(failed)}; see {folder}/NAME/log.txt"
        if args.dry_run:
            raise InputError(message)
        say(message)


BENCHMARK = Benchmark(
    name="campaign",
    summary="everything that this card can answer, in nine minutes, part by part",
    description="Runs the benchmarks that matter in order of value and keeps each result as soon as it is there.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    order=50,
)
