"""The command ``python -m bench memory``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from bench.harness.registry import CAPABILITY, STEPS, Benchmark
from bench.harness.session import Session
from bench.memory.clip import ClipRun, ClipSetup, run_clip
from bench.records.write import Table
from model.cli.options import parse_size, pick_dtype, positive
from model.config import PRESETS, get_preset
from model.errors import InputError
from model.machine.host import machine_memory
from model.machine.measure import format_bytes, parse_bytes
from model.memory.report import MemoryPlan
from model.sizes import check_frames, check_size, size_multiple
from swifti2v_kernels.common.target import TARGETS

CLIP_METRICS = (
    "peak_bytes", "peak_bytes_predicted", "predicted_seconds", "reserved_bytes", "process_bytes", "limit_bytes",
    "total_seconds", "stage_one_seconds", "reference_seconds", "stage_two_seconds", "decode_seconds", "energy_joules",
)  # fmt: skip
#: Columns of what the plan has decided.
PLANNED = ("card", "stage1", "stage2", "reference_tiles", "decode_tiles")
#: The relative deviation that a predicted peak may have.
NEAR = 0.05
#: The anchor and two segments of three blocks, which have all kinds of windows.
WARM_FRAMES = 25
SECONDS = {"Stage I": "stage_one_seconds", "reference": "reference_seconds", "Stage II": "stage_two_seconds",
           "decode": "decode_seconds"}  # fmt: skip

EXAMPLES = """\
examples:
  python -m bench memory                              this card; without CUDA counted for a card of 24 GB
  python -m bench memory --limit 24GB,16GB,12GB       a large card stands in for small ones (capacity, not speed)
  python -m bench memory --preset 14b-1.3b --limit 24GB,16GB,12GB,8GB       a Stage I of 14B on cards of four classes
  python -m bench memory --preset 14b-1.3b --frames 81              the whole clip
  python -m bench memory --preset 5b --size 1280x704 --limit 8GB
  python -m bench memory --device cpu --measure --preset tiny --size 256x144     tensors of a small run on a CPU

A clip is made with random weights. Steps do not change its peak, and neither does its length under CSG, so by default
it is as long as the largest window wants, with one step.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that this benchmark alone has."""
    parser.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default 1.3b)")
    parser.add_argument("--size", metavar="WxH", help="pixels of the clip (default: the preset's)")
    parser.add_argument("--frames", type=positive, help="frames of the clip (default 25: seven blocks)")
    parser.add_argument("--steps", type=STEPS, help="steps of both stages (default 1; 4 for 81 frames and more)")
    parser.add_argument(
        "--limit", metavar="SIZE,...", help="memory of the card, enforced on CUDA (default: the card's)"
    )
    parser.add_argument("--measure", action="store_true", help="run the clip on a CPU instead of counting")
    known = ", ".join(map(str, TARGETS))
    parser.add_argument(
        "--capability", type=CAPABILITY, choices=tuple(TARGETS), default=90, metavar="CC",
        help=f"capability of the card to count for: {known} (default 90)",
    )  # fmt: skip


def run(args: argparse.Namespace, session: Session) -> None:
    """Makes a clip under every limit."""
    counted = not session.cuda and not args.measure
    device, basis = (torch.device("meta"), "counted") if counted else (session.device, "measured")
    name = args.preset or ("tiny" if args.measure and not session.cuda else "1.3b")
    preset = get_preset(name)
    width, height = parse_size(args.size) if args.size else (preset.width, preset.height)
    num_frames = args.frames or WARM_FRAMES
    limits = list(dict.fromkeys(parse_bytes("limit", text) for text in args.limit.split(","))) if args.limit else []
    # A clip that cannot be is an error of the command, whatever the limits: no plan is to be looked for.
    check_size(width, height, size_multiple(preset.vae, preset.stage_two))
    check_frames(num_frames, preset.vae.temporal_stride)
    setup = ClipSetup(
        name, width, height, num_frames, args.steps or (4 if num_frames >= 81 else 1),
        torch.bfloat16 if counted else pick_dtype("auto", device), ram=None if counted else machine_memory(),
        capability=args.capability,
    )  # fmt: skip
    if counted:
        session.say("no CUDA device: nothing runs. Bytes are counted on tensors without memory, at the real size")
    if session.cuda and not limits:
        # A limit asks for capacity alone; without one the time matters too.
        session.say("a short clip first, for which the kernels are compiled")
        if run_clip(replace(setup, num_frames=min(num_frames, WARM_FRAMES), steps=1), device).interrupted:
            raise KeyboardInterrupt
    tables = _tables(session)
    for limit in limits or [24 * 10**9 if counted else None]:
        chosen = replace(setup, limit=limit)
        session.say(chosen.name)
        try:
            found = run_clip(chosen, device)
        except InputError as error:
            if not limits:
                raise
            row = {"status": "failed", "reason": str(error).splitlines()[0], "basis": basis}
            tables["clips"].add(_key(chosen) | row)
            continue
        _report(session, chosen, found, tables, basis)
        if found.interrupted:
            raise KeyboardInterrupt


def _tables(session: Session) -> dict[str, Table]:
    section, identity = session.section, ("preset", "size", "frames", "limit")
    note = (
        "Seconds of a stage are device time; the peak is the allocator's, or that of counted tensors. Weights are"
        " random. Stage 1 and 2: layers on the device + layers from pinned host memory, and the form of their weights;"
        " tiles: rows x columns, * where states wait in host memory. Predicted seconds are those of the card named."
    )
    clips = section.table(
        "clips", "a whole clip", identity=identity, metrics=CLIP_METRICS,
        columns=(*identity, *PLANNED, *(name for name in CLIP_METRICS if name != "limit_bytes")), note=note,
    )  # fmt: skip
    stages = section.table(
        "stages", "peak by stage", identity=(*identity, "stage"), metrics=("peak_bytes", "seconds"),
        columns=("limit", "stage", "peak_bytes", "seconds"),
    )  # fmt: skip
    holders = section.table(
        "holders", "what holds the peak", identity=(*identity, "held_by"), metrics=("held_bytes", "share"),
        columns=("limit", "held_by", "tensors", "held_bytes", "share"),
        note="Memory is held by the innermost place in this project that allocated it.",
    )  # fmt: skip
    return {"clips": clips, "stages": stages, "holders": holders}


def _key(setup: ClipSetup) -> dict[str, Any]:
    size = f"{setup.width}x{setup.height}"
    return {"preset": setup.preset, "size": size, "frames": setup.num_frames, "limit": setup.limit_told}


def _planned(plan: MemoryPlan) -> dict[str, str]:
    """Returns what a plan has decided, by column of :data:`PLANNED`: ``24+16 in 16 bits``, ``2x2* float32``."""
    told = {"card": plan.request.gpu.name}
    for column, stage in (("stage1", plan.stage_one), ("stage2", plan.stage_two)):
        layers = "+".join(map(str, stage.layers.values())).removesuffix("+0+0").removesuffix("+0")
        forms = {"none": f"in {8 * plan.request.dtype.itemsize} bits", "file": "as in the file"}
        told[column] = f"{layers} {forms.get(stage.placement.quantize, f'in {stage.placement.quantize}')}"
    for column, place in (("reference_tiles", plan.vae_plans.reference), ("decode_tiles", plan.vae_plans.decode)):
        tiles = place.plan
        told[column] = f"{tiles.rows}x{tiles.columns}{'*' * tiles.park} {place.request.dtype_name}"
    return told


def _report(session: Session, setup: ClipSetup, run: ClipRun, tables: dict[str, Table], basis: str) -> None:
    key, peak, plan = _key(setup) | {"basis": basis}, run.course.peak(), run.plan
    stages, over = run.stage_rows(), setup.limit is not None and peak > setup.limit
    if over and basis == "counted":
        first = next(found for found in stages if found["peak_bytes"] > setup.limit)
        reason = f"in {first['stage']}: {format_bytes(first['peak_bytes'])} counted"
        run.row |= {"status": "out of memory", "reason": reason}
    row = key | run.row | {"peak_bytes": peak, "limit_bytes": setup.limit, "steps": setup.steps}
    if plan is not None:
        row |= {"peak_bytes_predicted": plan.peak, "predicted_seconds": plan.seconds, **_planned(plan)}
    tables["clips"].add(row | {field: run.seconds.get(stage) for stage, field in SECONDS.items()})
    for found in stages:
        tables["stages"].add(key | found)
    for label, size, count in run.course.holders():
        held = {"held_by": label, "held_bytes": size, "tensors": count, "share": size / peak}
        tables["holders"].add(key | held)
    session.section.timeline(setup.name, run.course.points, run.course.marks, basis=basis, limit=setup.limit)
    if setup.limit is None:
        return
    # Plans leave a reserve for what libraries take besides the allocator's memory.
    head = {"shape": setup.limit_told, "unit": "x", "wanted": 1.0, "basis": basis}
    met = None if run.interrupted else run.row["status"] == "ok" and not over
    verdicts = [head | {"what": "peak over the limit", "value": peak / setup.limit, "met": met}]
    if plan is not None and run.row["status"] == "ok":
        ratio = peak / plan.peak
        verdicts += [head | {"what": "peak over the predicted one", "value": ratio, "met": abs(ratio - 1) <= NEAR}]
    session.section.verdicts([*session.section.data["verdicts"], *verdicts])


BENCHMARK = Benchmark(
    name="memory",
    summary="the memory of a whole clip over time, and what holds its peak",
    description="Makes a clip under the card's or a smaller limit and shows where its memory goes.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Memory",
    order=30,
    quick="no difference",
)
