"""The command ``python -m bench cost``."""

from __future__ import annotations

import argparse

from bench.cost.paper import REPORTED, baseline, consistent, ratios
from bench.cost.tables import calibration_rows, consistent_rows, headline
from bench.harness.registry import STEPS, Benchmark
from bench.harness.session import Session
from model.cli.options import not_negative, parse_size, positive
from model.config import PRESETS
from model.csg.sampler import MODES
from model.errors import InputError
from model.memory.cost.configuration import Configuration
from model.memory.cost.gpus import GPUS
from model.memory.cost.pipeline import parts, predict
from model.memory.cost.profiles import PROFILES, get_profile

BY_MODEL = "by model/memory/cost"
STAGES = {"Stage I": "stage_one_seconds", "reference": "reference_seconds", "Stage II": "stage_two_seconds",
          "decode": "decode_seconds"}  # fmt: skip
#: Options that only clips in two stages have.
STAGED = ("stage1_steps", "blocks", "left", "right", "mode")

EXAMPLES = """\
examples:
  python -m bench cost                                  the presets and the 14B end to end, on every card
  python -m bench cost --preset 5b --steps 8 --guidance --gpus H200,4090
  python -m bench cost --preset 1.3b --frames 161 --blocks 5 --left 2
  python -m bench cost --profile "reference, FlashAttention-3"
  python -m bench cost --paper                          the paper's ratio, and what is consistent with its 111 s

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
    parser.add_argument("--gpus", metavar="NAME,...", help=f"some of {', '.join(GPUS)} (default all)")
    parser.add_argument("--profile", default="swifti2v", help=f"one of {'; '.join(PROFILES)} (default %(default)s)")
    parser.add_argument("--paper", action="store_true", help="only the tables about the paper's figures")


def run(args: argparse.Namespace, session: Session) -> None:
    """Fills the tables of parts, predictions and calibration, and those about the paper."""
    profile = get_profile(args.profile)
    gpus = _gpus(args.gpus)
    chosen = _configurations(args)
    if not args.paper:
        _parts(session, chosen)
        _predictions(session, chosen, gpus, profile.name)
        if not args.quick:
            _calibration(session)
    if args.paper or args.preset is None:
        _paper(session, args.quick)


def _gpus(text: str | None) -> list[str]:
    """Returns the cards that a text names, each by a part of its name; all cards if there is no text.

    Raises:
        InputError: a name fits no card, or several.
    """
    if text is None:
        return list(GPUS)
    found = []
    for name in text.split(","):
        same = [gpu for gpu in GPUS if name.strip().lower() in gpu.lower()]
        if len(same) != 1:
            raise InputError(f"gpus: expected some of {', '.join(GPUS)}, got {name.strip()!r}")
        found += same
    return list(dict.fromkeys(found))


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
        return {"14B end to end": baseline(**changes)}
    return {args.preset: Configuration.for_preset(args.preset, **changes)}


def _parts(session: Session, chosen: dict[str, Configuration]) -> None:
    metrics = ("flops", "attention_flops", "linear_flops", "convolution_flops", "bytes", "peak_bytes")
    table = session.section.table(
        "parts", "operations, least traffic and peak memory, part by part (untiled)",
        identity=("configuration", "stage", "part"), metrics=metrics,
        note="Counted from shapes alone; tests compare them with the model's own operations. Peak: all on the card.",
    )  # fmt: skip
    for name, configuration in chosen.items():
        for part in parts(configuration):
            flops = dict(part.flops)
            row = {"configuration": name, "stage": part.stage, "part": part.name, "flops": part.work.total_flops}
            row |= {"linear_flops": flops.get("linear"), "convolution_flops": flops.get("convolution")}
            row["attention_flops"] = sum(n for kind, n in flops.items() if "attention" in kind) or None
            row |= {"bytes": part.bytes, "peak_bytes": part.peak_bytes, "basis": "counted"}
            table.add(row)


def _predictions(session: Session, chosen: dict[str, Configuration], gpus: list[str], profile: str) -> None:
    metrics = ("total_seconds", *STAGES.values(), "peak_bytes")
    table = session.section.table(
        "predictions", f"predicted seconds of a clip, profile {profile}", identity=("configuration", "gpu", "profile"),
        metrics=metrics, columns=("configuration", "gpu", *metrics),
    )  # fmt: skip
    assumptions: dict[str, None] = {}
    for name, configuration in chosen.items():
        for gpu in gpus:
            found = predict(configuration, GPUS[gpu], get_profile(profile))
            assumptions |= dict.fromkeys(found.assumptions)
            row = {"configuration": name, "gpu": gpu, "profile": profile, "total_seconds": found.seconds}
            row |= {STAGES[stage]: seconds for stage, seconds in found.by_stage.items()}
            row |= {"peak_bytes": found.peak_bytes, "basis": "predicted", "basis_note": BY_MODEL}
            if not all(part.fits or part.streamed for part in found.parts):
                row["warning"] = "does not fit this card; predicted as if it did"
            elif any(part.streamed for part in found.parts):
                row["note"] = "weights streamed from host memory"
            table.add(row)
    session.section.note("Assumptions:\n" + "\n".join(f"- {sentence}" for sentence in assumptions))


def _calibration(session: Session) -> None:
    rows = calibration_rows()
    table = session.section.table(
        "calibration", "known times, and the model's predictions of them", identity=("what", "gpu", "profile"),
        metrics=("seconds", "predicted_seconds", "ratio"),
        note="Published tables of the Wan repositories, and this project's measurements.",
    )  # fmt: skip
    for row in rows:
        known = {"what": row["case"], "gpu": row["gpu"], "profile": row["profile"], "seconds": row["known"]}
        known |= {"predicted_seconds": row["predicted"], "ratio": row["ratio"], "basis": "predicted"}
        table.add(known | {"basis_note": BY_MODEL, "note": row["source"]})


def _paper(session: Session, quick: bool) -> None:
    paper = REPORTED
    ratio_table = session.section.table(
        "ratios", f"the 14B end to end over two stages, on {paper.gpu}", identity=("configuration", "profile"),
        metrics=("flop_ratio", "time_ratio", "baseline_seconds", "total_seconds"),
        note=f"The paper reports {paper.ratio:.0f}: {paper.baseline_seconds:,.0f} s over {paper.seconds:.0f} s.",
    )  # fmt: skip
    for profile in PROFILES:
        for ratio in ratios(profile=profile):
            row = {"configuration": ratio.name, "profile": profile, "flop_ratio": ratio.flop_ratio}
            row |= {"time_ratio": ratio.time_ratio, "baseline_seconds": ratio.baseline_seconds}
            row |= {"total_seconds": ratio.seconds, "basis": "predicted", "basis_note": BY_MODEL}
            ratio_table.add(row)
    table = session.section.table(
        "consistent", f"configurations whose predicted time is within 15 % of {paper.seconds:.0f} s on {paper.gpu}",
        identity=("stage_two", "steps", "guidance", "profile", "encode_dtype"), metrics=("total_seconds", "deviation"),
    )  # fmt: skip
    found = consistent_rows(consistent())
    for row in found[:8] if quick else found:
        row["guidance"] = "yes" if row["guidance"] else "no"
        table.add({**row, "total_seconds": row.pop("seconds"), "basis": "predicted", "basis_note": BY_MODEL})


BENCHMARK = Benchmark(
    name="cost",
    summary="operations, bytes, memory and predicted seconds from shapes alone; the paper's figures by arithmetic",
    description="The cost model: no GPU, nothing is run; every second here is predicted.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Cost model",
    order=31,
    quick="without calibration, fewer configurations",
)
