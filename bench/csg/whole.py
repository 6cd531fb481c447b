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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.memory.meter import Meter
from bench.records.outcome import failure
from bench.records.write import Table
from model.cli.options import build_components, parse_size, pick_dtype
from model.cli.request import request_for
from model.config import get_preset
from model.csg.sampler import SegmentPlan, plan_for, plan_segments, sample_latents
from model.csg.schedule import flow_sigmas
from model.errors import InputError
from model.io.media import VideoWriter
from model.io.photo import fit_image, open_image
from model.machine.cards import device_options
from model.machine.counted import TensorMemory
from model.machine.host import release
from model.machine.measure import StageTimer, full_memory, parse_bytes
from model.memory.dit_bytes import tokens_per_block
from model.memory.plan import plan_memory
from model.memory.report import describe_placement
from model.pipeline.clip import ClipJob, Condition, make_condition
from model.pipeline.components import Components
from model.pipeline.encoders import empty_text
from model.pipeline.stages import decode_frames
from model.resume.clip import as_planned
from model.sizes import check_frames, check_size, size_multiple, stage_one_size

IDENTITY = ("frames", "mode")
LABELS = {"end_to_end": "end-to-end", "bidirectional": "CSG, bidirectional", "causal": "CSG, causal"}
METRICS = (
    "stage_two_seconds", "speedup", "peak_bytes", "memory_ratio", "stage_one_seconds", "reference_seconds",
    "decode_seconds", "file_seconds", "total_seconds", "difference",
)  # fmt: skip
COLUMNS = (
    "frames", "mode", "window_tokens", "stage_two_seconds", "speedup", "peak_bytes", "memory_ratio",
    "stage_one_seconds", "reference_seconds", "decode_seconds", "total_seconds",
)  # fmt: skip
STAGES = ("stage_one_seconds", "reference_seconds", "stage_two_seconds", "decode_seconds", "file_seconds")


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
        self.args, self.device, self.modes = args, device, args.modes
        self.dtype = pick_dtype(args.dtype, device)
        if args.preset is None and args.weights is None:
            args.preset = "1.3b" if cuda else "tiny"
        self.photo = open_image(args.photo)
        self.components = build_components(args, device, self.dtype)
        self.fps = get_preset(args.preset or "1.3b").fps
        small = not cuda or torch.cuda.get_device_properties(device).total_memory < 75 * 10**9
        default_size = "448x256" if not cuda else "1280x704" if small else "2560x1408"
        self.size = parse_size(args.size or ("256x160" if args.quick and not cuda else default_size))
        check_size(*self.size, size_multiple(self.components.vae_config, self.components.stage_two_config))
        self.lengths = parse_lengths(args.frames or ("5,21" if args.quick else "5,21,41,81"))
        self.repeats = args.repeats or (1 if cuda or args.quick else 3)
        plans = [self.plan(num_frames) for num_frames in self.lengths]
        # One plan of memory for all passes: for the longest clip, in the mode that has the largest window.
        mode = max(self.modes, key=lambda mode: max(len(window.blocks) for window in plan_for(mode, plans[-1])))
        request = request_for(
            self.components, size=self.size, num_frames=self.lengths[-1], plan=plans[-1], mode=mode,
            steps=args.steps, stage_one_steps=args.stage1_steps, dtype=self.dtype,
            vae_limit=None if args.vae_memory == "auto" else parse_bytes("vae-memory", args.vae_memory),
            **device_options(device),
        )  # fmt: skip
        self.memory = plan_memory(request)
        rows, columns = (n // self.components.vae_config.spatial_stride for n in self.size[::-1])
        self.tokens_per_block = tokens_per_block(self.components.stage_two_config, (rows, columns))

    def plan(self, num_frames: int) -> SegmentPlan:
        """Returns the segments of a clip."""
        args, num_blocks = self.args, check_frames(num_frames, self.components.vae_config.temporal_stride)
        return plan_segments(num_blocks, args.blocks, args.left, args.right, args.anchor)

    def settings(self) -> dict[str, Any]:
        """Returns what was chosen, for the result file."""
        args, two, weights = self.args, self.memory.stage_two, self.components.weights
        return {
            "model": f"{args.preset} preset, random weights" if weights is None else weights.name,
            "photo": Path(args.photo).name, "width": self.size[0], "height": self.size[1],
            "tokens_per_block": self.tokens_per_block, "steps": args.steps, "stage_one_steps": args.stage1_steps,
            "shift": args.shift, "blocks_per_segment": args.blocks, "neighbours_left": args.left,
            "neighbours_right": args.right, "anchor": args.anchor, "dtype": str(self.dtype).removeprefix("torch."),
            "seed": args.seed, "cuda_graph": args.cuda_graph,
            "stage_two_weights": describe_placement(two), "repeats": self.repeats,
            "memory": "allocator peak" if self.device.type == "cuda" else "live tensor bytes, weights included",
        }  # fmt: skip

    def measure(self, num_frames: int, folder: Path, table: Table, told: Callable[[str], object]) -> None:
        """Measures one clip length in every mode and adds its rows to the table; ``told`` hears of each pass."""
        rows = {mode: self._row(mode, num_frames) for mode in self.modes}
        with self._noting(*rows.values()):
            told(f"{num_frames} frames, Stage I and reference")
            watcher = Meter(self.device)
            components, job = self.components, as_planned(self._job(num_frames), self.memory)
            condition = make_condition(components, job, watcher)
            job = replace(job, text=empty_text(components.stage_two_config.text_dim).to(self.device))
            seconds = watcher.timer.seconds
            for row in rows.values():
                row |= {"stage_one_seconds": seconds["Stage I"], "reference_seconds": seconds["reference"]}
            latents = self._stage_two(
                components, job, condition, rows, lambda text: told(f"{num_frames} frames, {text}")
            )
            for mode in latents if num_frames == self.lengths[-1] else ():
                told(f"{num_frames} frames, {LABELS[mode]}, decode")
                path = folder / f"{mode if mode == 'end_to_end' else f'csg_{mode}'}.mp4"
                # A failure here does not take back what was measured of Stage II.
                failed: dict[str, Any] = {}
                with self._noting(failed):
                    self._decode(condition, latents[mode], path, rows[mode])
                if failed:
                    rows[mode]["warning"] = f"decode: {failed['status']}: {failed['reason']}"
        base = rows.get("end_to_end", {"status": "not measured"})
        for row in rows.values():
            if row["status"] == base["status"] == "ok":
                row["speedup"] = base["stage_two_seconds"] / row["stage_two_seconds"]
                row["memory_ratio"] = base["peak_bytes"] / row["peak_bytes"]
            table.add(row)

    @contextmanager
    def _noting(self, *rows: dict[str, Any]) -> Iterator[None]:
        """Makes a lack of memory in the body the rows' status instead of the end of the benchmark."""
        try:
            yield
            return  # timed passes find the allocator's memory as the pass before has left it
        except (RuntimeError, MemoryError) as error:
            if full_memory(error) is None:
                raise
            for row in rows:
                row |= failure(error)
        release(self.device)

    def _row(self, mode: str, num_frames: int) -> dict[str, Any]:
        plan = plan_for(mode, self.plan(num_frames))
        blocks = max(len(window.blocks) for window in plan)
        return {
            "frames": num_frames, "mode": LABELS[mode], "num_blocks": plan.num_blocks, "num_segments": len(plan),
            "window_blocks": blocks, "window_tokens": blocks * self.tokens_per_block, "status": "ok",
        }  # fmt: skip

    def _job(self, num_frames: int) -> ClipJob:
        args, components = self.args, self.components
        multiple = size_multiple(components.stage_one_vae_config, components.stage_one_config)
        return ClipJob(
            fit_image(self.photo, self.size), fit_image(self.photo, self.size, stage_one_size(*self.size, multiple)),
            empty_text(components.stage_one_config.text_dim).to(self.device), self.plan(num_frames),
            flow_sigmas(args.stage1_steps, args.shift), flow_sigmas(args.steps, args.shift),
            self.memory.vae_plans.tiles, components.clip_tokens("stage1", self.photo, self.device),
            components.clip_tokens("stage2", self.photo, self.device), args.seed, cuda_graph=args.cuda_graph,
        )  # fmt: skip

    def _stage_two(
        self, components: Components, job: ClipJob, condition: Condition, rows: Mapping[str, dict[str, Any]],
        told: Callable[[str], object],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Fills the rows by mode with what passes of Stage II take; returns the latents of the modes that fit."""
        dit, reference = components.dit("stage2", job.stage_two_at), condition.reference
        given = [tensor for tensor in (reference, job.text, job.image_two) if tensor is not None]

        def sample(mode: str) -> Tensor:
            latents, options = reference.clone(), {"sigmas": job.sigmas_two, "cuda_graph": job.cuda_graph}
            for _ in sample_latents(
                dit, latents, job.text, job.image_two, mode=mode, plan=job.plan, seed=job.seed, **options
            ):
                pass
            return latents

        latents: dict[str, Tensor] = {}
        for mode, row in rows.items():
            told(LABELS[mode])
            with self._noting(row):
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    latents[mode] = sample(mode)
                    row["peak_bytes"] = torch.cuda.max_memory_allocated()
                else:
                    with TensorMemory([*dit.parameters(), *condition.vae.parameters(), *given]) as memory:
                        latents[mode] = sample(mode)
                    row["peak_bytes"] = memory.peak
        runs: dict[str, list[float]] = {mode: [] for mode in latents}
        for _ in range(self.repeats):
            for mode in latents:
                if rows[mode]["status"] == "ok":
                    told(f"{LABELS[mode]}, timed")
                    timer = StageTimer(self.device)
                    with self._noting(rows[mode]):
                        with timer.stage("stage_two"):
                            sample(mode)
                        runs[mode].append(timer.seconds["stage_two"])
        dit.settle()
        latents = {mode: found for mode, found in latents.items() if rows[mode]["status"] == "ok"}
        for mode, found in latents.items():
            row, times = rows[mode], runs[mode]
            row |= {"stage_two_seconds": statistics.median(times), "runs": len(times)}
            row |= {"stage_two_seconds_low": min(times), "stage_two_seconds_high": max(times)} if len(times) > 1 else {}
            if "end_to_end" in latents:
                exact = latents["end_to_end"]
                row["difference"] = ((found - exact).norm() / exact.norm()).item()
        return latents

    def _decode(self, condition: Condition, latents: Tensor, path: Path, row: dict[str, Any]) -> None:
        timer = StageTimer(self.device)
        with VideoWriter(path, *self.size, self.fps) as writer, timer.stage("file"):
            segments = latents[:, :, 1:].split(self.args.blocks, dim=2)
            plan = self.memory.vae_plans.decode.plan
            for frames in timer.iterate("decode", decode_frames(condition.vae, latents[:, :, :1], segments, plan=plan)):
                writer.write(frames)
        row |= {"decode_seconds": timer.seconds["decode"], "file_seconds": timer.seconds["file"], "clip": path.name}
        row["total_seconds"] = sum(row[name] for name in STAGES)


def parse_lengths(text: str) -> list[int]:
    """Parses a list such as ``"5,21"``; returns its numbers, sorted.

    Raises:
        InputError: the text is no list of numbers.
    """
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"frames: expected numbers separated by commas, got {text!r}") from None
