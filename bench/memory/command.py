"""The command ``python -m bench memory``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from bench.harness.registry import CAPABILITY, STEPS, Benchmark
from bench.harness.session import Session
from bench.memory.clip import ClipRun, ClipSetup, run_clip, stage_rows
from bench.records.write import Table
from model.cli.options import parse_ram, parse_size, pick_dtype, positive
from model.config import PRESETS, get_preset
from model.csg.sampler import MODES
from model.errors import InputError
from model.machine.measure import format_bytes, parse_bytes
from model.memory.report import MemoryPlan
from model.memory.request import QUANTIZE_CHOICES
from model.plan import layers_told, tiles_told
from model.sizes import check_frames, check_size, size_multiple
from model.streaming.placement import MATMUL
from swifti2v_kernels.common.target import TARGETS

CLIP_METRICS = (
    "peak_bytes", "peak_bytes_predicted", "predicted_seconds", "reserved_bytes", "process_bytes", "limit_bytes",
    "total_seconds", "stage_one_seconds",
    "reference_seconds", "stage_two_seconds", "decode_seconds", "file_seconds", "energy_joules",
)  # fmt: skip
#: Columns of what the plan has decided.
PLANNED = ("card", "stage1", "stage2", "reference_tiles", "decode_tiles")
#: The relative deviation that a predicted peak may have.
NEAR = 0.05
#: The anchor and two segments of three blocks, which have all kinds of windows.
WARM_FRAMES = 25
SECONDS = {"Stage I": "stage_one_seconds", "reference": "reference_seconds", "Stage II": "stage_two_seconds",
           "decode": "decode_seconds", "file": "file_seconds"}  # fmt: skip

EXAMPLES = """\
examples:
  python -m bench memory                              this card; without CUDA counted for a card of 24 GB
  python -m bench memory --limit 24GB,16GB,12GB       a large card stands in for small ones (capacity, not speed)
  python -m bench memory --preset 14b-1.3b --limit 24GB,16GB,12GB,8GB       a Stage I of 14B on cards of four classes
  python -m bench memory --preset 14b-1.3b --frames 81 --file       the whole clip, written to a file
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
        "--blocks", type=positive, default=3, metavar="M", help="blocks (latent frames) of a segment (default 3)"
    )
    parser.add_argument(
        "--mode", default="bidirectional", choices=MODES, help="mode of Stage II (default bidirectional)"
    )
    parser.add_argument(
        "--limit", metavar="SIZE,...", help="memory of the card, enforced on CUDA (default: the card's)"
    )
    parser.add_argument("--file", action="store_true", help="write the clip, and time that (needs PyAV)")
    parser.add_argument("--measure", action="store_true", help="run the clip on a CPU instead of counting")
    parser.add_argument(
        "--ram",
        metavar="SIZE",
        default="auto",
        help="memory of the machine, for the plan (default: what it has; counted: no limit)",
    )
    parser.add_argument(
        "--quantize", choices=QUANTIZE_CHOICES, default="auto", help="form of the layers' weights (default auto)"
    )
    parser.add_argument(
        "--matmul", choices=MATMUL, default="plain", help="matrix multiplications of the layers (default plain)"
    )
    known = ", ".join(map(str, TARGETS))
    parser.add_argument(
        "--capability", type=CAPABILITY, choices=tuple(TARGETS), default=90, metavar="CC",
        help=f"capability of the card to count for: {known} (default 90)",
    )  # fmt: skip


def run(args: argparse.Namespace, session: Session) -> None:
    """Makes a clip under every limit."""
    counted = not session.cuda and not args.measure
    device = torch.device("meta") if counted else session.device
    name = args.preset or ("tiny" if args.measure and not session.cuda else "1.3b")
    preset = get_preset(name)
    width, height = parse_size(args.size) if args.size else (preset.width, preset.height)
    num_frames = args.frames or 25
    steps = args.steps or (4 if num_frames >= 81 else 1)
    limits: list[int | None] = [parse_bytes("limit", text) for text in args.limit.split(",")] if args.limit else [None]
    limits = list(dict.fromkeys(limits))
    if counted and limits == [None]:
        limits = [24 * 10**9]
    # A clip that cannot be is an error of the command, whatever the limits: no plan is to be looked for.
    check_size(width, height, size_multiple(preset.vae, preset.stage_two))
    check_frames(num_frames, preset.vae.temporal_stride)
    dtype = torch.bfloat16 if counted else pick_dtype("auto", device)
    setup = ClipSetup(
        name, width, height, num_frames, steps, steps, args.blocks, args.mode, dtype, capability=args.capability,
        ram=None if counted and args.ram == "auto" else parse_ram(args.ram), quantize=args.quantize,
        matmul=args.matmul, out=session.folder / "clip.mp4" if args.file and not counted else None,
    )  # fmt: skip
    if counted:
        session.say("no CUDA device: nothing runs. Bytes are counted on tensors without memory, at the real size")
    if session.cuda and not args.limit:
        # A limit asks for capacity alone; without one the time matters too.
        session.say("a short clip first, for which the kernels are compiled")
        short = replace(setup, num_frames=min(num_frames, WARM_FRAMES), steps=1, stage_one_steps=1, out=None)
        if run_clip(short, device).interrupted:
            raise KeyboardInterrupt
    tables = _tables(session, setup)
    for limit in limits:
        chosen = replace(setup, limit=limit)
        session.say(f"{setup.name}{f', within {format_bytes(limit)}' if limit else ''}")
        try:
            found = run_clip(chosen, device)
        except InputError as error:
            if len(limits) == 1 and not args.limit:
                raise
            found = None
            row = _key(chosen) | {"status": "failed", "reason": str(error).splitlines()[0]}
            tables["clips"].add(row | ({"basis": "counted"} if counted else {}))
        if found is not None:
            _report(session, found, tables, counted)
            if found.interrupted:
                raise KeyboardInterrupt


def _tables(session: Session, setup: ClipSetup) -> dict[str, Table]:
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
    return {
        "preset": setup.preset, "size": f"{setup.width}x{setup.height}", "frames": setup.num_frames,
        "limit": setup.limit_told,
    }  # fmt: skip


def _report(session: Session, run: ClipRun, tables: dict[str, Table], counted: bool) -> None:
    key, peak = _key(run.setup), run.course.peak()
    stages = stage_rows(run)
    if counted and run.setup.limit is not None and peak > run.setup.limit:
        over = next(found for found in stages if found["peak_bytes"] > run.setup.limit)
        run.status = "out of memory"
        run.reason = f"in {over['stage']}: {format_bytes(over['peak_bytes'])} counted"
    basis: dict[str, Any] = {"basis": "counted"} if counted else {}
    status: dict[str, Any] = {"status": run.status} | ({"reason": run.reason} if run.reason else {})
    row = key | basis | status | {"peak_bytes": peak, "limit_bytes": run.setup.limit}
    if run.plan is not None:
        row |= {"peak_bytes_predicted": run.plan.peak, "predicted_seconds": run.plan.seconds, **_told(run.plan)}
    row |= {"total_seconds": run.total_seconds, "reserved_bytes": run.reserved, "process_bytes": run.process}
    row |= {"energy_joules": run.energy, "steps": run.setup.steps, "frames_made": run.frames}
    tables["clips"].add(row | {field: run.seconds.get(stage) for stage, field in SECONDS.items()})
    for found in stages:
        tables["stages"].add(key | basis | found)
    for label, size, count in run.course.holders():
        tables["holders"].add(key | basis | {"held_by": label, "held_bytes": size, "tensors": count,
                                             "share": size / peak})  # fmt: skip
    session.section.timeline(
        f"{run.setup.name}{'' if run.setup.limit is None else f', within {format_bytes(run.setup.limit)}'}",
        run.course.thinned(), run.course.marks, basis="counted" if counted else "measured", limit=run.setup.limit,
    )  # fmt: skip
    if run.setup.limit is not None:
        # Plans leave a reserve for what libraries take besides the allocator's memory.
        met = None if run.interrupted else run.status == "ok" and peak <= run.setup.limit
        verdict = {"what": "peak over the limit", "shape": key["limit"], "value": peak / run.setup.limit, "unit": "x"}
        verdicts = [*session.section.data["verdicts"], verdict | {"wanted": 1.0, "met": met} | basis]
        if run.plan is not None and run.status == "ok" and not run.interrupted:
            ratio = peak / run.plan.peak
            near = {"what": "peak over the predicted one", "shape": key["limit"], "value": ratio, "unit": "x"}
            verdicts.append(near | {"wanted": 1.0, "met": abs(ratio - 1) <= NEAR} | basis)
        session.section.verdicts(verdicts)


def _told(plan: MemoryPlan) -> dict[str, str]:
    """Returns the plan's decisions and the card whose seconds are predicted, by column."""
    return {
        "card": plan.request.gpu.name,
        "stage1": layers_told(plan, "stage_one"), "stage2": layers_told(plan, "stage_two"),
        "reference_tiles": tiles_told(plan, "reference"), "decode_tiles": tiles_told(plan, "decode"),
    }  # fmt: skip


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
