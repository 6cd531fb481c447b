"""The command ``python -m bench vae``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch

from bench.harness.registry import MILLISECONDS, REPEATS, Benchmark, chosen
from bench.harness.session import Session
from bench.records.package_tables import provenance
from bench.vae.layers import Layer, layer_rows, table_entries, unique_layers
from bench.vae.measure import measure, targets
from bench.vae.providers import PROVIDERS, Provider
from bench.vae.shapes import PARTS, QUICK_SHAPES, SHAPES, Shape
from model.machine.host import release
from model.machine.measure import parse_bytes

LIMIT = "4GB"
CLIP_IDENTITY = ("version", "part", "size", "frames", "provider")
CLIP_METRICS = (
    "seconds", "frames_per_second", "peak_bytes", "peak_bytes_predicted", "error", "limit_bytes",
)  # fmt: skip
LAYER_METRICS = ("seconds", "launch_seconds", "tflops", "fraction_of_matmul", "error", "flops")

EXAMPLES = """\
examples:
  python -m bench vae                                 everything; without CUDA a small VAE
  python -m bench vae --quick                         decode and encode 81 frames of 720p
  python -m bench vae --shapes "2.1, 2K, 81" --part decode --limit 6GB
  python -m bench vae --part layers                   our kernels against cuDNN, for bench tune --from RESULT.json

Reported are time, peak memory, and error against float32, untiled. The figures to be reached at 2K: twice the speed of
diffusers' fastest setting that fits, and a third of its tiled peak.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only this benchmark has."""
    parts = (*PARTS, "layers", "all")
    parser.add_argument("--part", choices=parts, default="all", help="decode, encode, layers or all (default all)")
    parser.add_argument("--shapes", metavar="TEXT", default="", help="only clips whose name contains TEXT")
    parser.add_argument(
        "--limit", metavar="SIZE", default=LIMIT, help="memory for our tiles, enforced on CUDA (default %(default)s)"
    )
    parser.add_argument("--only", metavar="TEXT|TEXT", default="", help="only implementations with TEXT in their name")
    parser.add_argument(
        "--directions", choices=(*PARTS, "all"), default="all", help="direction of the layers: decode, encode or all"
    )
    parser.add_argument(
        "--milliseconds", type=MILLISECONDS, default=100, help="time for each layer (default %(default)s)"
    )
    parser.add_argument("--repeats", type=REPEATS, default=3, help="timed runs of each (default %(default)s)")


def run(args: argparse.Namespace, session: Session) -> None:
    """Measures layers and clips; without CUDA it counts the layers and runs the clips on a small VAE."""
    shapes = chosen("shapes", args.shapes, QUICK_SHAPES if args.quick else SHAPES)
    providers = chosen("only", args.only, PROVIDERS, attrgetter("name"))
    limit = parse_bytes("limit", args.limit)
    parts = [part for part in PARTS if args.part in (part, "all")]
    if args.part == "layers" or (args.part == "all" and session.cuda):
        wanted = [part for part in PARTS if args.directions in (part, "all")]
        measure_layers(session, unique_layers(shapes, wanted), args.milliseconds)
    if not session.cuda:
        session.say("no CUDA device: layers are counted, clips are those of a small VAE; no card is timed")
        shapes, limit = [shape.reduced() for shape in shapes], None
    if parts:
        measure_clips(session, shapes, parts, providers, limit, 1 if args.quick else args.repeats)


def measure_layers(session: Session, layers: Sequence[Layer], milliseconds: float) -> None:
    """Measures every convolution by our kernel and by cuDNN; without CUDA it lists them."""
    table = session.section.table(
        "layers", "convolutions of the VAE", identity=("where", "layer", "dtype", "provider"), metrics=LAYER_METRICS,
        columns=("where", "layer", "dtype", "calls", "provider", *LAYER_METRICS),
        note="cuDNN's time is that of all that stands in for the kernel's one call (bench/vae/layers.py).",
    )  # fmt: skip
    if not session.cuda:
        for layer in layers:
            table.add({**layer.row(), "provider": "swifti2v", "flops": layer.cost.flops, "basis": "counted"})
        return
    timer, ceilings = session.timer(milliseconds), session.ceilings()
    for layer in session.progress(layers, unit="layer"):
        for row in layer_rows(layer, session.device, timer, ceilings):
            table.add(row)
        stamp = {"provenance": provenance(session.environment)}
        entries = [entry | stamp for entry in table_entries(session.environment, table.rows)]
        session.section.package_entries("conv3d", entries)
        release(session.device)


def measure_clips(
    session: Session,
    shapes: Sequence[Shape],
    parts: Sequence[str],
    providers: Sequence[Provider],
    limit: int | None,
    repeats: int,
) -> None:
    """Measures whole clips by every implementation."""
    table = session.section.table(
        "clips", "whole clips", identity=CLIP_IDENTITY, metrics=CLIP_METRICS,
        columns=(*CLIP_IDENTITY, "dtype", *CLIP_METRICS), note=(
            "Peak memory includes the weights and not the clip that is given; the brackets are least and most of the"
            " runs. Weights are random: how much diffusers' tiles change says little about trained ones."
        ),
    )  # fmt: skip

    def report(row: dict[str, Any]) -> None:
        table.add(row)
        session.section.verdicts(targets(table.rows))

    clips = [(shape, part) for shape in shapes for part in parts]
    with torch.no_grad():
        for shape, part in session.progress(clips, unit="clip"):
            measure(shape, part, session.device, providers=providers, limit=limit, repeats=repeats, report=report)


BENCHMARK = Benchmark(
    name="vae",
    summary="the VAE in exact tiles against diffusers untiled and tiled; its convolutions against cuDNN",
    description="Time, peak memory and error of VAE decode and encode.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="The VAE",
    order=22,
    quick="one clip, one run of each",
)
