"""The command ``python -m bench tune``."""

from __future__ import annotations

import argparse
import os
import time
from operator import attrgetter
from pathlib import Path

from bench.harness.registry import JOBS, MINUTES, Benchmark, chosen
from bench.harness.session import Session
from bench.records.package_tables import provenance, write_entries
from bench.records.read import read_result
from bench.records.write import Table
from bench.static.compile_only import quiet_exit
from bench.tuning.search import Outcome, Search, entry
from bench.tuning.space import Target, shown, targets
from model.cli.options import parse_path, positive
from model.errors import InputError
from swifti2v_kernels.common.target import TARGETS, capability_of

EXAMPLES = """\
examples:
  python -m bench tune                              this card, ten minutes; writes swifti2v_kernels/configs/tuned.json
  python -m bench tune --minutes 60                 an hour
  python -m bench tune --kernels conv3d --no-write
  python -m bench tune --from bench/results/nvidia-h200/FILE.json     choices that another machine has measured
  python -m bench tune                              without CUDA: how much there is to tune
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only this benchmark has."""
    parser.add_argument("--kernels", metavar="TEXT", default="", help="only kernels and shapes with TEXT in their name")
    parser.add_argument("--minutes", type=MINUTES, default=10.0, help="time for the search (default %(default)s)")
    parser.add_argument("--no-write", dest="write", action="store_false", help="leave the package's table as it is")
    parser.add_argument(
        "--from", dest="source", metavar="FILE", type=parse_path, help="write the choices of a result file"
    )
    parser.add_argument("--most", type=positive, metavar="N", help="candidates of a kernel and shape at most")
    jobs = min(os.cpu_count() or 1, 16)
    parser.add_argument("--jobs", type=JOBS, default=jobs, help="compiling processes (default %(default)s)")


def run(args: argparse.Namespace, session: Session) -> None:
    """Searches; without CUDA it says what there would be to search."""
    if args.source is not None:
        _take_over(args.source, session)
        return
    capability = capability_of(session.device) if session.cuda else max(TARGETS)
    if capability not in TARGETS:
        raise InputError(f"capability: expected one of {', '.join(map(str, TARGETS))}, got {capability}")
    session.say("reading what there is to tune")
    quiet_exit()
    found = chosen("kernels", args.kernels, targets(capability), attrgetter("name"))
    if args.quick:
        found = found[:2]
    if session.cuda:
        _search(args, session, found, args.most or (4 if args.quick else None))
    else:
        session.section.note(f"{len(found)} kernels and shapes need a GPU to be tuned; there is none here.")


def _search(args: argparse.Namespace, session: Session, found: list[Target], most: int | None) -> None:
    metrics = ("seconds", "best_seconds", "gain", "tried", "dropped")
    table = session.section.table(
        "tuned", "configurations, measured", identity=("target",), metrics=metrics,
        columns=("target", "heuristic", "best", *metrics),
        note=(
            "Time: the heuristic's, of all cases of the row; gain: geometric mean over them, in turns. Dropped: what"
            " does not compile, spills, does not fit or fails."
        ),
    )  # fmt: skip
    search = Search(
        session.device, session.timer(15), session.timer(60), args.jobs, time.monotonic() + 60 * args.minutes, most
    )  # fmt: skip
    card, stamp = session.environment["device"], provenance(session.environment)
    entries = []
    with session.progress(total=len(found), unit="kernel") as bar:
        for target in found:
            bar.set_description(target.name)
            if search.late:
                table.add(_row(target) | {"status": "not reached", "reason": "the time given was over"})
                continue
            outcome = search.run(target, bar.set_postfix_str)
            table.add(_row(target) | _found(outcome))
            new = entry(outcome, card, stamp)
            if new is not None:
                entries.append(new)
                session.section.package_entries("tuned", entries)
            bar.update()
    if args.write and entries:
        write_entries({"tuned": entries})
        session.section.note(f"{len(entries)} entries written to swifti2v_kernels/configs/tuned.json")
    elif entries:
        session.section.note(f"{len(entries)} entries; python -m bench tune --from this file writes them")


def _row(target: Target) -> dict[str, str]:
    return {"target": target.name, "heuristic": shown(target.heuristic)}


def _found(outcome: Outcome) -> dict[str, object]:
    row: dict[str, object] = {"tried": outcome.tried, "dropped": outcome.dropped, "gain": outcome.gain}
    base = [t for name, t in outcome.timings.items() if name.endswith(": heuristic")]
    if base:
        row["seconds"] = sum(t.median for t in base)
        row["best_seconds"] = sum(t.median for t in base) / outcome.gain
    if outcome.best is not None:
        row["best"] = shown(outcome.target.config(outcome.best))
    if outcome.reason:
        row["note"] = outcome.reason
    return row


def _take_over(source: Path, session: Session) -> None:
    sections = read_result(source)["sections"]
    entries: dict[str, list[dict[str, object]]] = {}
    for section in sections.values():
        for name, found in section.get("package_entries", {}).items():
            entries.setdefault(name, []).extend(found)
    if not entries:
        raise InputError(f"from: {source} holds no measured choices (sections: {', '.join(sections)})")
    table: Table = session.section.table("written", "entries written", identity=("table",), metrics=("entries",))
    for name, count in write_entries(entries).items():
        table.add({"table": name, "entries": count})


BENCHMARK = Benchmark(
    name="tune",
    summary="searches kernel configurations on this card and writes the package's table",
    description="Searches the configurations of every kernel at real sizes within a time budget.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Kernel configurations",
    order=41,
    quick="two kernels, four candidates each",
)
