"""The command ``python -m bench attention``."""

from __future__ import annotations

import argparse

from bench.attention.measure import by_rows, copied_bytes, table_entries
from bench.attention.providers import QUICK_SHAPES, SHAPES, providers
from bench.harness.registry import MILLISECONDS, Benchmark, matches
from bench.harness.session import Session
from bench.operators.compare import compare_case
from bench.records.package_tables import provenance, write_entries
from model.errors import InputError, require
from swifti2v_kernels.common.case import Case

IDENTITY = ("shape", "provider")
METRICS = ("seconds", "launch_seconds", "tflops", "fraction_of_matmul", "error", "peak_bytes", "copied_bytes")

EXAMPLES = """\
examples:
  python -m bench attention                    all shapes and implementations (minutes on a GPU)
  python -m bench attention --quick            one window, with one and with three sources
  python -m bench attention --shapes "2560x1408" --update-table

--update-table writes the measured times of dense calls to swifti2v_kernels/configs/attention.json, by which
segment_attention chooses between its own kernel and torch's.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only this benchmark has."""
    parser.add_argument("--shapes", metavar="TEXT", default="", help="only shapes whose name contains TEXT")
    parser.add_argument(
        "--only", metavar="TEXT|TEXT", default="", help="only implementations with TEXT in their name, and ours"
    )
    parser.add_argument(
        "--milliseconds", type=MILLISECONDS, default=300, help="time for each timing (default %(default)s)"
    )
    parser.add_argument("--update-table", action="store_true", help="write the table of measured choices")


def run(args: argparse.Namespace, session: Session) -> None:
    """Measures every shape by every implementation, on CUDA alone."""
    shapes = [s for s in (QUICK_SHAPES if args.quick else SHAPES) if args.shapes in s.name]
    if not shapes:
        names = ", ".join(s.name for s in SHAPES)
        raise InputError(f"shapes: no shape contains {args.shapes!r}; the shapes are {names}")
    known = [p.name for p in providers(args.quick)]
    if not any(matches(args.only, name) for name in known):
        raise InputError(f"only: none contains {args.only!r}; they are {'; '.join(known)}")
    if args.update_table and not session.cuda:
        raise InputError("update-table: expected a CUDA device, since the table holds measurements")
    if session.cuda:
        _measure(args, session, shapes)
    else:
        session.section.note(
            "no CUDA device: nothing is timed; python -m bench operators checks the kernels without one"
        )


def _measure(args: argparse.Namespace, session: Session, shapes: list[Case]) -> None:
    found = [p for p in providers(args.quick) if p.ours or matches(args.only, p.name)]
    timer, ceilings, entries = session.timer(args.milliseconds), session.ceilings(), []
    table = session.section.table(
        "attention", "attention in bf16", identity=IDENTITY, metrics=METRICS,
        columns=(*IDENTITY, "seconds", *METRICS[2:]),
        note="With several sources the others concatenate first; their bytes are named, and the time is in theirs.",
    )  # fmt: skip
    stamp = {"provenance": provenance(session.environment)}
    for shape in require("tqdm", "bench").tqdm(shapes, unit="shape", dynamic_ncols=True, disable=None):
        for row in compare_case(shape, found, session.device, timer, ceilings, by_rows, shared=True):
            table.add(row | {"copied_bytes": 0 if row["ours"] else copied_bytes(shape)})
        entries = [entry | stamp for entry in table_entries(session.environment, table.rows, shapes)]
        session.section.package_entries("attention", entries)
    if args.update_table:
        session.say(f"table updated: {write_entries({'attention': entries})}")


BENCHMARK = Benchmark(
    name="attention",
    summary="our attention kernels against SDPA, FlexAttention, flash-attn and sageattention",
    description="TFLOP/s, error against float64 and memory of attention on the shapes of video DiTs.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Attention",
    order=20,
    quick="two shapes, fewer implementations",
)
