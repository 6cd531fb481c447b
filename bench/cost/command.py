"""The command ``python -m bench cost``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench.cost.configuration import Configuration
from bench.cost.pipeline import parts, predict
from bench.harness.registry import STEPS, Benchmark, names
from bench.harness.session import Session
from model.cli.options import not_negative, parse_size, positive
from model.config import PRESETS
from model.csg.sampler import MODES
from model.errors import InputError
from swifti2v_kernels.common.cards import CARDS

BY_MODEL = "by bench/cost"
STAGES = {"Stage I": "stage_one_seconds", "reference": "reference_seconds", "Stage II": "stage_two_seconds",
          "decode": "decode_seconds"}  # fmt: skip
#: Options that only clips in two stages have.
STAGED = ("stage1_steps", "blocks", "left", "right", "mode")

EXAMPLES = """\
examples:
  python -m bench cost                                  the presets and the 14B end to end, on every card
  python -m bench cost --preset 5b --steps 8 --guidance --gpus "H200,RTX 4090"
  python -m bench cost --preset 1.3b --frames 161 --blocks 5 --left 2

Everything here is predicted from shapes; no GPU is used. The assumptions are printed with the figures.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that this benchmark alone has."""
    parser.add_argument("--preset", help=f"one of {', '.join(PRESETS)}, or end-to-end (default: all for GPUs)")
    parser.add_argument("--size", metavar="WxH", help="pixels (default: the preset's)")
    parser.add_argument("--frames", type=positive, help="frames of the clip (default: the preset's)")
    parser.add_argument("--steps", type=STEPS, help="steps of Stage II, or end to end (default 4; end to end 50)")
    parser.add_argument("--stage1-steps", type=STEPS, help="steps of Stage I (default 4)")
    parser.add_argument("--guidance", action="store_true", help="two forwards a step")
    parser.add_argument("--blocks", type=positive, metavar="M", help="blocks (latent frames) of a segment (default 3)")
    parser.add_argument(
        "--left", type=not_negative, metavar="N", help="blocks before a segment that its window shows (default 1)"
    )
    parser.add_argument(
        "--right", type=not_negative, metavar="N", help="blocks after a segment that its window shows (default 0)"
    )
    parser.add_argument("--mode", choices=MODES, help="mode of Stage II (default bidirectional)")
    parser.add_argument(
        "--gpus", metavar="NAME,...", type=names(CARDS), default=",".join(CARDS),
        help=f"some of {', '.join(CARDS)} (default all)",
    )  # fmt: skip


def run(args: argparse.Namespace, session: Session) -> None:
    """Fills the tables of parts and predictions."""
    chosen = _configurations(args)
    _parts(session, chosen)
    _predictions(session, chosen, args.gpus)


def _configurations(args: argparse.Namespace) -> dict[str, Configuration]:
    changes = {
        "num_frames": args.frames, "steps": args.steps, "stage_one_steps": args.stage1_steps,
        "blocks_per_segment": args.blocks, "neighbours_left": args.left, "neighbours_right": args.right,
        "mode": args.mode, "guidance": args.guidance or None,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.size:
        changes["width"], changes["height"] = parse_size(args.size)
    if args.preset is None:
        if changes:
            raise InputError(f"preset: expected one with {', '.join(sorted(changes))}")
        return headline()
    if args.preset == "end-to-end":
        given = [name for name in STAGED if getattr(args, name) is not None]
        if given:
            names = ", ".join(name.replace("_", "-") for name in given)
            raise InputError(f"preset: end-to-end is one stage in one window, without {names}")
        return {"14B end to end": Configuration.end_to_end(**changes)}
    return {args.preset: Configuration.for_preset(args.preset, **changes)}


def headline() -> dict[str, Configuration]:
    """Returns the configurations of tables by default, by name: the presets for GPUs, and the 14B end to end."""
    found = {name: Configuration.for_preset(name) for name, preset in PRESETS.items() if preset.width == 2560}
    return {**found, "14B end to end": Configuration.end_to_end()}


def _parts(session: Session, chosen: dict[str, Configuration]) -> None:
    metrics = ("flops", "attention_flops", "linear_flops", "convolution_flops", "bytes", "peak_bytes")
    table = session.section.table(
        "parts", "operations, least traffic and peak memory, part by part (untiled)",
        identity=("configuration", "stage", "part"), metrics=metrics,
        note="Counted from shapes alone; tests compare them with the model's own operations. Peak: all on the card.",
    )  # fmt: skip
    for name, configuration in chosen.items():
        for part in parts(configuration):
            flops = part.work.flops
            row = {"configuration": name, "stage": part.stage, "part": part.name, "flops": part.work.total_flops}
            row |= {"linear_flops": flops.get("linear"), "convolution_flops": flops.get("convolution")}
            row["attention_flops"] = sum(n for kind, n in flops.items() if "attention" in kind) or None
            row |= {"bytes": part.work.bytes, "peak_bytes": part.peak_bytes, "basis": "counted"}
            table.add(row)


def _predictions(session: Session, chosen: dict[str, Configuration], gpus: Sequence[str]) -> None:
    metrics = ("total_seconds", *STAGES.values(), "peak_bytes")
    table = session.section.table(
        "predictions", "predicted seconds of a clip", identity=("configuration", "gpu", "profile"),
        metrics=metrics, columns=("configuration", "gpu", *metrics),
    )  # fmt: skip
    assumptions: dict[str, None] = {}
    for name, configuration in chosen.items():
        for gpu in gpus:
            found = predict(configuration, CARDS[gpu])
            assumptions |= dict.fromkeys(found.assumptions)
            row = {"configuration": name, "gpu": gpu, "profile": "swifti2v", "total_seconds": found.seconds}
            row |= {STAGES[stage]: seconds for stage, seconds in found.by_stage.items()}
            row |= {"peak_bytes": found.peak_bytes, "basis": "predicted", "basis_note": BY_MODEL}
            if not all(part.fits or part.streamed for part in found.parts):
                row["warning"] = "does not fit this card; predicted as if it did"
            elif any(part.streamed for part in found.parts):
                row["note"] = "weights streamed from host memory"
            table.add(row)
    session.section.note("Assumptions:\n" + "\n".join(f"- {sentence}" for sentence in assumptions))


BENCHMARK = Benchmark(
    name="cost",
    summary="operations, bytes, memory and predicted seconds from shapes alone",
    description="The cost model: no GPU, nothing is run; every second here is predicted.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Cost model",
    order=31,
)
