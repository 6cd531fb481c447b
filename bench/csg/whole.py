"""Whole passes of Stage II: same weights, same noise, same sampler; only the windows differ.

For every clip length one photograph goes through Stage I and the reference once; then Stage II runs in each mode. A
first pass of each mode warms up and measures peak memory; the timed passes follow, the modes in turn, so that a drift
of the machine's speed falls on all of them alike. The longest clip is decoded and written in every mode.

Memory is the allocator's peak on CUDA, and on the CPU the live bytes of tensors (:mod:`model.machine.counted`); both
include the weights that are resident while Stage II runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.environment import energy_joules, process_memory
from bench.records.outcome import failure
from bench.records.write import Table
from model.cli.options import build_components, parse_size, pick_dtype, segment_plan
from model.cli.request import request_for
from model.config import get_preset
from model.csg.sampler import SegmentPlan, plan_for, sample_latents
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT
from model.errors import InputError
from model.io.media import VideoWriter
from model.io.photo import fit_image, open_image
from model.machine.counted import TensorMemory
from model.machine.measure import StageTimer, is_out_of_memory, parse_bytes
from model.memory.plan import plan_memory
from model.memory.report import MemoryPlan, describe_placement
from model.memory.vae_places import device_options
from model.pipeline.clip import ClipJob, Condition, Item, Watcher, make_condition
from model.pipeline.encoders import empty_text
from model.pipeline.stages import decode_frames
from model.resume.clip import as_planned
from model.sizes import check_frames, check_size, size_multiple, stage_one_size

IDENTITY = ("frames", "mode")
LABELS = {"end_to_end": "end-to-end", "bidirectional": "CSG, bidirectional", "causal": "CSG, causal"}
METRICS = (
    "stage_two_seconds", "speedup", "peak_bytes", "memory_ratio", "reserved_bytes", "process_bytes", "energy_joules",
    "stage_one_seconds", "reference_seconds", "decode_seconds", "file_seconds", "total_seconds", "difference",
)  # fmt: skip
COLUMNS = (
    "frames", "mode", "window_tokens", "stage_two_seconds", "speedup", "peak_bytes", "memory_ratio",
    "stage_one_seconds", "reference_seconds", "decode_seconds", "total_seconds",
)  # fmt: skip


class WholePasses:
    """The models, the sizes and the passes of one run.

    Args:
        args: the options of ``python -m bench csg``.
        device: where the models run.

    Raises:
        InputError: an option does not fit.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        cuda = device.type == "cuda"
        self.args, self.device = args, device
        self.dtype = pick_dtype(args.dtype, device)
        if args.preset is None and args.weights is None:
            args.preset = "1.3b" if cuda else "tiny"
        self.photo = open_image(args.photo)
        self.components = build_components(args, device, self.dtype)
        self.fps = get_preset(args.preset or "1.3b").fps
        small = not cuda or torch.cuda.get_device_properties(device).total_memory < 75 * 10**9
        default_size = "448x256" if not cuda else "1280x704" if small else "2560x1408"
        self.width, self.height = parse_size(args.size or ("256x160" if args.quick and not cuda else default_size))
        check_size(self.width, self.height, size_multiple(self.components.vae_config, self.components.stage_two_config))
        self.lengths = parse_lengths(args.frames or ("5,21" if args.quick else "5,21,41,81"))
        for num_frames in self.lengths:
            self._num_blocks(num_frames)
        self.modes = args.modes
        self.repeats = args.repeats or (1 if cuda or args.quick else 3)
        for mode in self.modes:
            plan_for(mode, self.plan(self.lengths[0]))
        self.sigmas = flow_sigmas(args.steps, args.shift)
        multiple = size_multiple(self.components.stage_one_vae_config, self.components.stage_one_config)
        self.low_size = stage_one_size(self.width, self.height, multiple)
        self.memory = self._plan_memory()
        self.num_passes = len(self.lengths) * (1 + len(self.modes) * (1 + self.repeats)) + len(self.modes)

    def _plan_memory(self) -> MemoryPlan:
        """Plans memory once for all passes: for the longest clip, in the mode that has the largest window."""
        args, plan = self.args, self.plan(max(self.lengths))
        mode = max(self.modes, key=lambda mode: max(len(window.blocks) for window in plan_for(mode, plan)))
        request = request_for(
            self.components, size=(self.width, self.height), num_frames=max(self.lengths), plan=plan, mode=mode,
            steps=args.steps, stage_one_steps=args.stage1_steps, dtype=self.dtype,
            vae_limit=None if args.vae_memory == "auto" else parse_bytes("vae-memory", args.vae_memory),
            **device_options(self.device),
        )  # fmt: skip
        return plan_memory(request)

    def plan(self, num_frames: int) -> SegmentPlan:
        """Returns the segments of a clip."""
        return segment_plan(self.args, self._num_blocks(num_frames))

    def _num_blocks(self, num_frames: int) -> int:
        return check_frames(num_frames, self.components.vae_config.temporal_stride)

    def headline(self) -> str:
        """Returns a line that tells people what runs."""
        args, settings = self.args, self.settings()
        return (
            f"{args.photo} at {self.width}x{self.height}, {', '.join(map(str, self.lengths))} frames,"
            f" {args.steps} steps, M={args.blocks}, N={args.left}+{args.right}{'' if args.anchor else ', no anchor'},"
            f" {settings['model']}, {settings['dtype']} on {self.device.type}"
        )

    def settings(self) -> dict[str, Any]:
        """Returns what was chosen, for the result file."""
        patch = self.components.stage_two_config.patch_size
        two = self.memory.stage_two
        stride, weights = self.components.vae_config.spatial_stride, self.components.weights
        return {
            "model": f"{self.args.preset} preset, random weights" if weights is None else weights.name,
            "photo": Path(self.args.photo).name,
            "width": self.width,
            "height": self.height,
            "tokens_per_block": self.width * self.height // (stride**2 * patch[1] * patch[2]),
            "steps": self.args.steps,
            "stage_one_steps": self.args.stage1_steps,
            "shift": self.args.shift,
            "blocks_per_segment": self.args.blocks,
            "neighbours_left": self.args.left,
            "neighbours_right": self.args.right,
            "anchor": self.args.anchor,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.args.seed,
            "cuda_graph": self.args.cuda_graph,
            "stage_two_weights": describe_placement(two.config, two.placement),
            "repeats": self.repeats,
            "memory": "allocator peak" if self.device.type == "cuda" else "live tensor bytes, weights included",
        }

    def measure(self, num_frames: int, folder: Path, table: Table, bar: Any) -> None:
        """Measures one clip length in every mode; adds its rows to the table."""
        rows = {mode: self._row(mode, num_frames) for mode in self.modes}
        bar.set_description(f"{num_frames} frames, Stage I and reference")
        prepared = _guarded(list(rows.values()), self._prepare, num_frames)
        bar.update()
        if prepared is not None:
            condition, stage, shared = prepared
            for row in rows.values():
                row.update(shared)
            self._passes(num_frames, rows, condition, stage, folder, bar)
        base = rows.get("end_to_end")
        for row in rows.values():
            if row["status"] == "ok" and base is not None and base["status"] == "ok":
                row["speedup"] = base["stage_two_seconds"] / row["stage_two_seconds"]
                row["memory_ratio"] = base["peak_bytes"] / row["peak_bytes"]
            table.add(row)

    def _passes(
        self,
        num_frames: int,
        rows: dict[str, dict[str, Any]],
        condition: Condition,
        stage: _StageTwo,
        folder: Path,
        bar: Any,
    ) -> None:
        latents: dict[str, Tensor | None] = {}
        for mode, row in rows.items():
            bar.set_description(f"{num_frames} frames, {LABELS[mode]}")
            latents[mode] = _guarded([row], stage.first_pass, mode, row)
            bar.update()
        runs: dict[str, list[float]] = {mode: [] for mode in rows}
        for _ in range(self.repeats):
            for mode, row in rows.items():
                bar.set_description(f"{num_frames} frames, {LABELS[mode]}, timed")
                if row["status"] == "ok":
                    _guarded([row], stage.timed_pass, mode, row, runs[mode])
                bar.update()
        stage.drop()
        for mode, row in rows.items():
            if row["status"] == "ok":
                _finish(row, runs[mode], latents[mode], latents.get("end_to_end"))
                if num_frames == max(self.lengths):
                    bar.set_description(f"{num_frames} frames, {LABELS[mode]}, decode")
                    path = folder / f"{mode if mode == 'end_to_end' else f'csg_{mode}'}.mp4"
                    # A failure here does not take back what was measured of Stage II.
                    failed: dict[str, Any] = {}
                    _guarded([failed], self._decode, condition, latents[mode], path, row)
                    if failed:
                        row["warning"] = f"decode: {failed['status']}: {failed['reason']}"
                    bar.update()

    def _prepare(self, num_frames: int) -> tuple[Condition, _StageTwo, dict[str, float]]:
        """Runs Stage I and the reference of one clip length; returns them, Stage II to be run, and their seconds."""
        args, components, size = self.args, self.components, (self.width, self.height)
        watcher = _Timed(self.device)
        text = empty_text(components.stage_one_config.text_dim).to(self.device)
        job = ClipJob(
            fit_image(self.photo, size),
            fit_image(self.photo, size, self.low_size),
            text,
            self.plan(num_frames),
            flow_sigmas(args.stage1_steps, args.shift),
            self.sigmas,
            self.memory.vae_plans.tiles,
            components.clip_tokens("stage1", self.photo, self.device),
            components.clip_tokens("stage2", self.photo, self.device),
            args.seed,
            cuda_graph=args.cuda_graph,
        )
        components, job = as_planned(components, job, self.memory)
        condition = make_condition(components, job, watcher)
        job = replace(job, text=empty_text(components.stage_two_config.text_dim).to(self.device))
        seconds = watcher.timer.seconds
        shared = {"stage_one_seconds": seconds["Stage I"], "reference_seconds": seconds["reference"]}
        return condition, _StageTwo(components.stage_two(), condition, job, self.device), shared

    def _row(self, mode: str, num_frames: int) -> dict[str, Any]:
        plan = plan_for(mode, self.plan(num_frames))
        blocks = max(len(window.blocks) for window in plan)
        return {
            "frames": num_frames,
            "mode": LABELS[mode],
            "num_blocks": plan.num_blocks,
            "num_segments": len(plan),
            "window_blocks": blocks,
            "window_tokens": blocks * self.settings()["tokens_per_block"],
            "status": "ok",
        }

    def _decode(self, condition: Condition, latents: Tensor, path: Path, row: dict[str, Any]) -> None:
        timer = StageTimer(self.device)
        with VideoWriter(path, self.width, self.height, self.fps) as writer, timer.stage("file"):
            segments = latents[:, :, 1:].split(self.args.blocks, dim=2)
            plan = self.memory.vae_plans.decode.plan
            for frames in timer.iterate("decode", decode_frames(condition.vae, latents[:, :, :1], segments, plan=plan)):
                writer.write(frames)
        row["decode_seconds"], row["file_seconds"] = timer.seconds["decode"], timer.seconds["file"]
        row["clip"] = path.name
        stages = ("stage_one_seconds", "reference_seconds", "stage_two_seconds", "decode_seconds", "file_seconds")
        row["total_seconds"] = sum(row[name] for name in stages)


class _Timed(Watcher):
    """A watcher that times the stages."""

    def __init__(self, device: torch.device):
        self.timer = StageTimer(device)

    def stage(self, name: str) -> AbstractContextManager[object]:
        return self.timer.stage(name)

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        return self.timer.iterate(name, items)


class _StageTwo:
    """Stage II of one clip length: the same inputs for every mode and pass."""

    def __init__(self, dit: WanDiT, condition: Condition, job: ClipJob, device: torch.device):
        self.dit: WanDiT | None = dit
        self.reference, self.job, self.device = condition.reference, job, device
        inputs = [tensor for tensor in (condition.reference, job.text, job.image_two) if tensor is not None]
        self.resident = [*dit.parameters(), *condition.vae.parameters(), *inputs]

    def first_pass(self, mode: str, row: dict[str, Any]) -> Tensor:
        """Warms up and measures peak memory; returns the clip's latents."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            latents = self._sample(mode)
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            row["reserved_bytes"] = torch.cuda.max_memory_reserved()
            row["process_bytes"] = process_memory(self.device)
            return latents
        with TensorMemory(self.resident) as memory:
            latents = self._sample(mode)
        row["peak_bytes"] = memory.peak
        return latents

    def timed_pass(self, mode: str, row: dict[str, Any], runs: list[float]) -> None:
        """Measures the time and energy of one whole Stage II."""
        timer, before = StageTimer(self.device), energy_joules(self.device)
        with timer.stage("stage_two"):
            self._sample(mode)
        runs.append(timer.seconds["stage_two"])
        after = energy_joules(self.device)
        row["energy_joules"] = None if before is None or after is None else after - before

    def drop(self) -> None:
        """Frees the model, before clips are decoded."""
        if self.dit is not None:
            self.dit.settle()
        self.dit, self.resident = None, []

    def _sample(self, mode: str) -> Tensor:
        latents, job = self.reference.clone(), self.job
        options = {"sigmas": job.sigmas_two, "cuda_graph": job.cuda_graph, "plan": job.plan, "seed": job.seed}
        assert self.dit is not None
        for _ in sample_latents(self.dit, latents, job.text, job.image_two, mode=mode, **options):
            pass
        return latents


def _guarded(rows: list[dict[str, Any]], work: Callable[..., Any], *args: Any) -> Any:
    """Calls ``work(*args)``; out of memory becomes the rows' status (and None) instead of the end of the benchmark."""
    try:
        return work(*args)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        for row in rows:
            row |= failure(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _finish(row: dict[str, Any], runs: list[float], latents: Tensor, end_to_end: Tensor | None) -> None:
    row["stage_two_seconds"], row["runs"] = statistics.median(runs), len(runs)
    if len(runs) > 1:
        row["stage_two_seconds_low"], row["stage_two_seconds_high"] = min(runs), max(runs)
    if end_to_end is not None:
        row["difference"] = ((latents - end_to_end).norm() / end_to_end.norm()).item()


def parse_lengths(text: str) -> list[int]:
    """Parses a list such as ``"5,21"``; returns its numbers, sorted.

    Raises:
        InputError: the text is no list of numbers.
    """
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"frames: expected numbers separated by commas, got {text!r}") from None
