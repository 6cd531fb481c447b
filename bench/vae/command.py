"""The command ``python -m bench vae``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.harness.interpreted import run_interpreted
from bench.harness.registry import MILLISECONDS, REPEATS, Benchmark, matches
from bench.harness.session import Session
from bench.records.package_tables import provenance, write_entries
from bench.records.write import Table
from bench.vae.layers import Layer, measure_layer, table_entries, unique_layers
from bench.vae.measure import measure, release, targets
from bench.vae.providers import PROVIDERS, Provider
from bench.vae.shapes import PARTS, QUICK_SHAPES, SHAPES, Shape
from model.errors import InputError, require
from model.machine.measure import parse_bytes
from swifti2v_kernels.common.target import interpreting

LIMIT = "4GB"
CLIP_METRICS = (
    "seconds", "frames_per_second", "peak_bytes", "peak_bytes_predicted", "error", "seam", "seam_untiled",
    "limit_bytes",
)  # fmt: skip
LAYER_METRICS = ("seconds", "launch_seconds", "tflops", "fraction_of_matmul", "error", "flops")

EXAMPLES = """\
examples:
  python -m bench vae                                 everything; without CUDA a small VAE
  python -m bench vae --quick                         decode and encode 81 frames of 720p
  python -m bench vae --shapes "2.1, 2K, 81" --part decode --limit 6GB
  python -m bench vae --part layers --update-table    our kernels against cuDNN; the faster one is used from then on

Reported are time, peak memory, error against float32 and, in tiles, the step across their borders; difference-*.png
shows where tiles change a frame. The figures to be reached at 2K: twice the speed of diffusers' fastest setting that
fits, a third of its tiled peak, seams as in the untiled frame.
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
    parser.add_argument("--update-table", action="store_true", help="write the table of measured choices")


def run(args: argparse.Namespace, session: Session) -> None:
    """Measures layers and clips; without CUDA it runs the same paths on a small VAE."""
    available = QUICK_SHAPES if args.quick else SHAPES
    shapes = [shape for shape in available if args.shapes in str(shape)]
    if not shapes:
        raise InputError(f"shapes: none contains {args.shapes!r}; they are {'; '.join(map(str, available))}")
    providers = [provider for provider in PROVIDERS if matches(args.only, provider.name)]
    if not providers:
        raise InputError(f"only: none contains {args.only!r}; they are {'; '.join(p.name for p in PROVIDERS)}")
    limit = parse_bytes("limit", args.limit)
    parts = [part for part in PARTS if args.part in (part, "all")]
    repeats = 1 if args.quick else args.repeats
    if not session.cuda:
        if args.update_table:
            raise InputError("update-table: expected a CUDA device, since the table holds measurements")
        if args.part == "layers":
            _check_layers(session)
            return
        session.say("no CUDA device: the same paths on a small VAE; no card is timed")
        measure_clips(session, [s.reduced() for s in shapes], parts, providers, repeats=repeats)
        return
    if args.part in ("layers", "all"):
        wanted = [part for part in PARTS if args.directions in (part, "all")]
        measure_layers(session, unique_layers(shapes, wanted), args.milliseconds, update_table=args.update_table)
    measure_clips(session, shapes, parts, providers, limit=limit, repeats=repeats)


def _check_layers(session: Session) -> None:
    """Checks some layers of a small VAE by our kernels, interpreted, and by torch; nothing is there to time them on."""
    if not interpreting():
        session.say("no CUDA device: nothing is timed")
        run_interpreted(session, "some layers of a small VAE")
        return
    # One program of the interpreter takes milliseconds, and a layer of 80x40 pixels has thousands.
    layers = unique_layers([replace(SHAPES[0].reduced(), name="32x16", width=32, height=16)], ("decode",))
    table = session.section.table(
        "checked layers", "convolutions of a small VAE in Triton's interpreter, against torch",
        identity=("where", "layer", "dtype", "provider"), metrics=("error",),
    )  # fmt: skip
    for layer, calls, where in layers[:: len(layers) // 4]:
        with torch.no_grad():
            for row in measure_layer(layer, calls, where, torch.float32, session.device, None, 1.0):
                table.add(row)
    wrong = [row["layer"] for row in table.rows if row["status"] != "ok"]
    if wrong:
        raise InputError(f"wrong: {'; '.join(wrong)}")


def measure_layers(
    session: Session,
    layers: Sequence[tuple[Layer, int, str]],
    milliseconds: float,
    *,
    dtype: torch.dtype = torch.bfloat16,
    update_table: bool = False,
    **ceilings: int,
) -> None:
    """Measures every convolution by our kernel and by cuDNN."""
    timer = session.timer(milliseconds)
    matmul = session.ceilings(None if session.cuda else timer, **ceilings).matmul_tflops
    table = session.section.table(
        "layers", "convolutions of the VAE", identity=("where", "layer", "dtype", "provider"), metrics=LAYER_METRICS,
        columns=("where", "layer", "dtype", "calls", "provider", *LAYER_METRICS[:5]),
        note="cuDNN's time is that of all that stands in for the kernel's one call (bench/vae/layers.py).",
    )  # fmt: skip
    with require("tqdm", "bench").tqdm(total=len(layers), unit="layer", dynamic_ncols=True, disable=None) as bar:
        for layer, calls, where in layers:
            bar.set_description(str(layer))
            with torch.no_grad():
                for row in measure_layer(layer, calls, where, dtype, session.device, timer, matmul):
                    table.add(row)
            if session.cuda:
                stamp = {"provenance": provenance(session.environment)}
                entries = [entry | stamp for entry in table_entries(session.environment, table.rows)]
                session.section.package_entries("conv3d", entries)
            release(session.device)
            bar.update()
    if update_table:
        session.say(f"table updated: {write_entries(session.section.data['package_entries'])}")


def measure_clips(
    session: Session,
    shapes: Sequence[Shape],
    parts: Sequence[str],
    providers: Sequence[Provider],
    *,
    limit: int | None = None,
    repeats: int = 3,
) -> None:
    """Measures whole clips by every implementation."""
    note = (
        "Peak memory includes the weights and not the clip that is given; the brackets are least and most of the runs."
        " Seam: mean step across the borders of tiles over the mean step elsewhere. Weights are random: how much"
        " diffusers' tiles change says little about trained ones."
    )
    identity = ("version", "part", "size", "frames", "provider")
    table = session.section.table(
        "clips", "whole clips", identity=identity, metrics=CLIP_METRICS,
        columns=(*identity, "dtype", *CLIP_METRICS), note=note,
    ) if parts else None  # fmt: skip
    total = len(shapes) * len(parts)
    with (
        require("tqdm", "bench").tqdm(total=total, unit="clip", dynamic_ncols=True, disable=None) as bar,
        torch.no_grad(),
    ):

        def report(table: Table, row: dict[str, Any]) -> None:
            table.add(row)
            session.section.verdicts(targets(table.rows))

        for shape in shapes:
            for part in parts:
                assert table is not None
                bar.set_description(f"{shape}, {part}")
                measure(
                    shape, part, session.device, providers=providers, limit=limit, repeats=repeats,
                    folder=session.folder, report=lambda row: report(table, row),
                )  # fmt: skip
                bar.update()


BENCHMARK = Benchmark(
    name="vae",
    summary="the VAE in exact tiles against diffusers untiled and tiled; its convolutions against cuDNN",
    description="Time, peak memory, error and seams of VAE decode and encode.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="The VAE",
    order=22,
    quick="one clip, one run of each",
)
