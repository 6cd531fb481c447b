"""The command ``python -m bench csg``."""

from __future__ import annotations

import argparse
import time

from bench.assets import PHOTO
from bench.csg.extrapolated import Measurement, short
from bench.csg.setups import MODELS, SIZES, setups
from bench.csg.whole import COLUMNS, IDENTITY, METRICS, WholePasses
from bench.harness.registry import MINUTES, REPEATS, Benchmark, names
from bench.harness.session import Session
from bench.report.charts import windows
from model.cli.options import MACHINE, MODEL, SEGMENTS, add_options, parse_path, pick_dtype
from model.csg.sampler import MODES
from model.errors import InputError, require

EXAMPLES = """\
examples:
  python -m bench                             on a CPU whole passes of a tiny model; on a GPU the table of real sizes
  python -m bench csg photo.jpg --quick       a few seconds on a CPU
  python -m bench csg --frames 5,21,81,161 --size 256x144 --repeats 5
  python -m bench csg --models 1.3b,14b --sizes 2K --minutes 4          (GPU)
  python -m bench csg --whole --preset 5b --size 1280x704 --frames 17,81        (GPU)

Whole passes: Stage II end-to-end and by CSG on the same weights and noise, the longest clip decoded and written. On a
CPU: the tiny preset at 448x256; on CUDA: the 1.3b preset in bfloat16 at 2560x1408, or at 1280x704 on cards with less
than 75 GB. Without --weights the weights are random; time and memory do not depend on them.

The table of real sizes takes few layers, steps and latent frames and scales them, says so in every row, and holds the
extrapolation against a clip that is measured whole: end-to-end with 50 steps and guidance against two stages of 4
steps, by stage, and the paper's ablations.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only this benchmark has."""
    parser.add_argument(
        "photo", nargs="?", type=parse_path, metavar="PHOTO", default=str(PHOTO), help="default: the shipped photograph"
    )
    group = parser.add_argument_group("whole passes")
    group.add_argument("--whole", action="store_true", help="whole passes also on CUDA")
    group.add_argument("--frames", metavar="F,F,...", help="clip lengths, each 1 + 4n (default 5,21,41,81)")
    group.add_argument("--size", metavar="WxH", help="default: see below")
    group.add_argument("--modes", type=names(MODES), default=",".join(MODES), help=f"default {','.join(MODES)}")
    group.add_argument("--repeats", type=REPEATS, help="timed passes of each mode (default 3; 1 on CUDA)")
    group = parser.add_argument_group("table of real sizes")
    group.add_argument("--extrapolate", action="store_true", help="also on a CPU, where it is reduced to toy sizes")
    group.add_argument(
        "--models", type=names(MODELS), default=",".join(MODELS), help=f"some of {','.join(MODELS)} (default all)"
    )
    group.add_argument(
        "--sizes", type=names(SIZES), default=",".join(SIZES), help=f"some of {','.join(SIZES)} (default all)"
    )
    group.add_argument("--no-ablations", dest="ablations", action="store_false", help="without the paper's ablations")
    group.add_argument("--minutes", type=MINUTES, help="begin nothing after so long (default: no limit)")
    add_options(parser, MODEL, SEGMENTS, MACHINE)


def run(args: argparse.Namespace, session: Session) -> None:
    """Measures whole passes, or fills the table of real sizes."""
    if args.whole and args.extrapolate:
        raise InputError("whole, extrapolate: expected one of them")
    if (session.cuda and not args.whole) or args.extrapolate:
        _extrapolate(args, session)
    else:
        _whole(args, session)


def _whole(args: argparse.Namespace, session: Session) -> None:
    require("av", "generate")
    passes = WholePasses(args, session.device)
    if passes.components.weights is None:
        session.say(
            "random weights: the clips show the path, not quality; time and memory do not depend on the weights"
        )
    settings = passes.settings()
    session.section.set(settings=settings)
    note = (
        f"{settings['model']}, {settings['width']}x{settings['height']}, {settings['steps']} steps,"
        f" {settings['dtype']}; median of {settings['repeats']}, the brackets are least and most."
        " Times faster and times less memory: than end-to-end, of the same clip length."
    )
    table = session.section.table(
        "whole", "Stage II, whole passes", identity=IDENTITY, metrics=METRICS, columns=COLUMNS, note=note
    )
    with session.progress(passes.lengths, unit="clip") as bar:
        for num_frames in bar:
            passes.measure(num_frames, session.folder, table, bar.set_description)
    session.draw("plan", windows(passes.plan(passes.lengths[-1])))


def _extrapolate(args: argparse.Namespace, session: Session) -> None:
    start, num_frames = time.monotonic(), _one_length(args.frames)
    found = setups(args.models, args.sizes, num_frames, args.steps)
    if args.quick:
        found = [short(setup) for setup in found if setup.size == found[0].size]
    check = found[0] if len(found) == 1 else setups([found[0].model], ["720p"], num_frames, args.steps)[0]
    if args.quick:
        check = short(check)
    if not session.cuda:
        session.say("no CUDA device: the same paths at toy sizes; no card is timed")
        found, check = [setup.reduced() for setup in found], check.reduced()
    session.ceilings()
    ablated = max(found, key=lambda setup: setup.width) if args.ablations else None
    session.section.note("Random weights at the real sizes: time and memory do not depend on them.")
    session.section.set(settings={**session.section.data["settings"], "frames": found[0].num_frames})
    total = 2 * len(found) + 1 + args.ablations
    with session.progress(total=total, unit="clip") as bar:
        Measurement(
            session.section, session.device, pick_dtype(args.dtype, session.device), session.timer(100),
            deadline=None if args.minutes is None else start + 60 * args.minutes,
            layers=(1, 3) if session.cuda else (1, 2), progress=bar.set_description,
        ).run(found, check, ablated, bar.update)  # fmt: skip


def _one_length(text: str | None) -> int:
    if text is None:
        return 81
    if not text.isdigit() or int(text) % 4 != 1 or int(text) < 17:
        raise InputError(f"frames: expected one number, 1 + 4n and at least 17, for the table of sizes; got {text!r}")
    return int(text)


BENCHMARK = Benchmark(
    name="csg",
    summary="end-to-end against segment-wise generation",
    description="Time and peak memory end-to-end and by CSG, on the same weights and noise.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="End-to-end against CSG",
    order=10,
    quick="whole passes: two short clips, one pass; the table: one size, short clips",
)
