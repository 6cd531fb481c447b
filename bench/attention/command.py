"""The command ``python -m bench attention``."""

from __future__ import annotations

import argparse
from operator import attrgetter

from bench.attention.measure import by_rows, copied_bytes, table_entries
from bench.attention.providers import QUICK_SHAPES, SHAPES, providers
from bench.harness.registry import MILLISECONDS, Benchmark, chosen
from bench.harness.session import Session
from bench.operators.compare import compare_case
from bench.operators.peers import Peer
from bench.records.package_tables import provenance
from swifti2v_kernels.common.case import Case

IDENTITY = ("shape", "provider")
METRICS = ("seconds", "launch_seconds", "tflops", "fraction_of_matmul", "error", "peak_bytes", "copied_bytes")

EXAMPLES = """\
examples:
  python -m bench attention                    all shapes and implementations (minutes on a GPU)
  python -m bench attention --quick            one window, with one and with three sources
  python -m bench attention --shapes "2560x1408"

The times of dense calls are in the result file for swifti2v_kernels/configs/attention.json, by which segment_attention
chooses between its own kernel and torch's; python -m bench tune --from RESULT.json writes them there.
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


def run(args: argparse.Namespace, session: Session) -> None:
    """Measures every shape by every implementation, on CUDA alone."""
    shapes = chosen("shapes", args.shapes, QUICK_SHAPES if args.quick else SHAPES, attrgetter("name"))
    known = providers(args.quick)
    others = chosen("only", args.only, known, attrgetter("name"))
    if session.cuda:
        _measure(args, session, shapes, [peer for peer in known if peer.ours or peer in others])
    else:
        session.section.note(
            "no CUDA device: nothing is timed; python -m bench operators checks the kernels without one"
        )


def _measure(args: argparse.Namespace, session: Session, shapes: list[Case], found: list[Peer]) -> None:
    timer, ceilings = session.timer(args.milliseconds), session.ceilings()
    table = session.section.table(
        "attention", "attention in bf16", identity=IDENTITY, metrics=METRICS,
        columns=(*IDENTITY, "seconds", *METRICS[2:]),
        note="With several sources the others concatenate first; their bytes are named, and the time is in theirs.",
    )  # fmt: skip
    stamp = {"provenance": provenance(session.environment)}
    for shape in session.progress(shapes, unit="shape"):
        for row in compare_case(shape, found, session.device, timer, ceilings, by_rows, shared=True):
            table.add(row | {"copied_bytes": 0 if row["ours"] else copied_bytes(shape)})
        entries = [entry | stamp for entry in table_entries(session.environment, table.rows, shapes)]
        session.section.package_entries("attention", entries)


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
