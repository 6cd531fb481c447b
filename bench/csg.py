"""End-to-end against segment-wise generation: same weights, same noise, same sampler; only the windows differ.

For every clip length one photograph goes through Stage I and the reference once; then Stage II runs in each mode. A
first pass of each mode warms up and measures peak memory; the timed passes follow, the modes in turn, so that a drift
of the machine's speed falls on all of them alike. The longest clip is decoded and written in every mode.

Memory is the allocator's peak on CUDA, and on the CPU the live bytes of tensors (:mod:`model.tensor_memory`); both
include the weights that are resident while Stage II runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import capture, process_memory
from bench.files import write_text
from bench.plot import LABELS, plot_plan, plot_rows
from model.command import add_model_options, build_components, parse_size, pick_device, pick_dtype, positive
from model.config import get_preset
from model.csg import MODES, SegmentPlan, plan_for, sample_latents
from model.dit import WanDiT
from model.encoders import empty_text
from model.errors import InputError, require
from model.measure import StageTimer, format_bytes, is_out_of_memory
from model.media import VideoWriter, fit_image, open_image
from model.pipeline import (
    check_frames,
    check_size,
    decode_frames,
    make_motion,
    make_reference,
    size_multiple,
    stage_one_size,
)
from model.pipeline_plan import plan_components
from model.scheduler import flow_sigmas
from model.tensor_memory import TensorMemory
from model.vae import WanVAE

SCHEMA = "swifti2v-csg-1"
PHOTO = Path(__file__).parent / "assets" / "rocket.jpg"

EXAMPLES = """\
examples:
  python -m bench                             this machine's default sizes, the shipped photograph
  python -m bench csg photo.jpg --quick       a few seconds on a CPU
  python -m bench csg --frames 5,21,81,161 --size 256x144 --repeats 5
  python -m bench csg --preset 5b --size 1280x704 --frames 17,81        (GPU)

On a CPU: the tiny preset at 448x256. On CUDA: the 1.3b preset in bfloat16 at 2560x1408, or at 1280x704 on cards with
less than 70 GiB. Without --weights the weights are random; time and memory do not depend on them.
"""


def add_parser(commands: Any, name: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        name,
        help="end-to-end against segment-wise generation",
        description="Time and peak memory of Stage II end-to-end and by CSG, on the same weights and noise.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photo", nargs="?", metavar="PHOTO", default=PHOTO, help="default: the shipped photograph")
    parser.add_argument("--frames", metavar="F,F,...", help="clip lengths, each 1 + 4n (default 5,21,41,81)")
    parser.add_argument("--size", metavar="WxH", help="default: see below")
    parser.add_argument("--modes", default=",".join(MODES), help=f"default {','.join(MODES)}")
    parser.add_argument("--repeats", type=positive, help="timed passes of each mode (default 3; 1 on CUDA)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results folder (default out/csg-DATE-TIME)")
    parser.add_argument("--json", action="store_true", help="also print the JSON")
    parser.add_argument("--quick", action="store_true", help="two short clips, one pass")
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """The benchmark: measures, and after every clip length writes what there is so far."""
    for module in ("av", "tqdm"):
        require(module, "generate")
    for module in ("matplotlib", "tabulate"):
        require(module, "bench")
    device = pick_device(args.device)
    if device.type == "cuda":
        require("pynvml", "bench")
    bench = _Benchmark(args, device)
    folder = args.out or Path("out") / f"csg-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot make the directory {folder}: {error.strerror}") from error
    if bench.components.weights is None:
        print("random weights: the clips show the path, not quality; time and memory do not depend on the weights")
    print(bench.headline())
    result = {"schema": SCHEMA, "environment": capture(device), "settings": bench.settings(), "rows": []}
    with require("tqdm", "generate").tqdm(total=bench.num_passes, unit="pass", dynamic_ncols=True) as bar:
        for num_frames in bench.lengths:
            try:
                result["rows"] += bench.measure(num_frames, folder, bar)
            finally:
                write_text(folder / "result.json", json.dumps(result, indent=1))
    table = format_table(result)
    write_text(folder / "table.md", table + "\n")
    if any(row["status"] == "ok" for row in result["rows"]):
        plot_rows(result, folder)
    plot_plan(bench.plan(max(bench.lengths)), folder / "plan.png")
    print(f"\n{table}\n")
    if args.json:
        print(json.dumps(result, indent=1))
    print(f"results in {folder.resolve()}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


class _Benchmark:
    """The models, the sizes and the passes of one run."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        cuda = device.type == "cuda"
        self.args, self.device = args, device
        self.dtype = pick_dtype(args.dtype, device)
        if args.preset is None and args.weights is None:
            args.preset = "1.3b" if cuda else "tiny"
        self.photo = open_image(args.photo)
        self.components = build_components(args, device, self.dtype)
        self.fps = get_preset(args.preset or "1.3b").fps
        small = not cuda or torch.cuda.get_device_properties(device).total_memory < 70 * 2**30
        default_size = "448x256" if not cuda else "1280x704" if small else "2560x1408"
        self.width, self.height = parse_size(args.size or ("256x160" if args.quick and not cuda else default_size))
        multiple = size_multiple(self.components.vae_config, self.components.stage_two_config)
        check_size(self.width, self.height, multiple)
        self.lengths = _parse_lengths(args.frames or ("5,21" if args.quick else "5,21,41,81"))
        for num_frames in self.lengths:
            self._num_blocks(num_frames)
        self.modes = [mode.strip() for mode in args.modes.split(",")]
        self.repeats = args.repeats or (1 if cuda or args.quick else 3)
        for mode in self.modes:
            plan_for(mode, self.plan(self.lengths[0]))
        self.sigmas = flow_sigmas(args.steps, args.shift)
        multiple = size_multiple(self.components.stage_one_vae_config, self.components.stage_one_config)
        self.vae_plans = plan_components(
            self.components,
            (self.width, self.height),
            stage_one_size(self.width, self.height, multiple),
            window_blocks=self._num_blocks(max(self.lengths)),
            blocks_per_segment=args.blocks,
            memory=args.vae_memory,
            dtype=self.dtype,
            device=device,
        )
        self.num_passes = len(self.lengths) * (1 + len(self.modes) * (1 + self.repeats)) + len(self.modes)

    def plan(self, num_frames: int) -> SegmentPlan:
        return SegmentPlan(self._num_blocks(num_frames), self.args.blocks, self.args.left, self.args.right)

    def _num_blocks(self, num_frames: int) -> int:
        return check_frames(num_frames, self.components.vae_config.temporal_stride)

    def headline(self) -> str:
        return (
            f"{self.args.photo} at {self.width}x{self.height}, {', '.join(map(str, self.lengths))} frames,"
            f" {self.args.steps} steps, M={self.args.blocks}, N={self.args.left}+{self.args.right},"
            f" {self.settings()['model']}, {self.settings()['dtype']} on {self.device.type}"
        )

    def settings(self) -> dict[str, Any]:
        patch = self.components.stage_two_config.patch_size
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
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.args.seed,
            "cuda_graph": self.args.cuda_graph,
            "repeats": self.repeats,
            "memory": "allocator peak" if self.device.type == "cuda" else "live tensor bytes, weights included",
        }

    def measure(self, num_frames: int, folder: Path, bar: Any) -> list[dict[str, Any]]:
        """All rows of one clip length."""
        rows = {mode: self._row(mode, num_frames) for mode in self.modes}
        bar.set_description(f"{num_frames} frames, Stage I and reference")
        prepared = _guarded(list(rows.values()), self._prepare, num_frames)
        bar.update()
        if prepared is None:
            return list(rows.values())
        vae, stage, shared = prepared
        latents: dict[str, Tensor | None] = {}
        for mode, row in rows.items():
            row.update(shared)
            bar.set_description(f"{num_frames} frames, {LABELS[mode]}")
            latents[mode] = _guarded([row], stage.first_pass, mode, row)
            bar.update()
        for _ in range(self.repeats):
            for mode, row in rows.items():
                bar.set_description(f"{num_frames} frames, {LABELS[mode]}, timed")
                if row["status"] == "ok":
                    _guarded([row], stage.timed_pass, mode, row)
                bar.update()
        del stage, prepared
        for mode, row in rows.items():
            if row["status"] == "ok":
                _finish(row, latents[mode], latents.get("end_to_end"))
                if num_frames == max(self.lengths):
                    bar.set_description(f"{num_frames} frames, {LABELS[mode]}, decode")
                    path = folder / f"{mode if mode == 'end_to_end' else f'csg_{mode}'}.mp4"
                    # A failure here does not take back what was measured of Stage II.
                    failure: dict[str, Any] = {}
                    _guarded([failure], self._decode, vae, latents[mode], path, row)
                    if failure:
                        row["decode_error"] = failure["error"]
                    bar.update()
        return list(rows.values())

    def _prepare(self, num_frames: int) -> tuple[WanVAE, _StageTwo, dict[str, float]]:
        """Stage I and the reference of one clip length: the VAE, Stage II ready to run, and the seconds they took."""
        args, device, components, num_blocks = self.args, self.device, self.components, self._num_blocks(num_frames)
        timer = StageTimer(device)
        vae = components.vae()
        vae_one = vae if components.stage_one_vae is None else components.stage_one_vae()
        multiple = size_multiple(components.stage_one_vae_config, components.stage_one_config)
        size = self.width, self.height
        low_size, plans = stage_one_size(*size, multiple), self.vae_plans
        low = fit_image(self.photo, size, low_size).to(device)
        dit = components.stage_one()
        text = empty_text(components.stage_one_config.text_dim).to(device)
        image = components.clip_tokens("stage1", self.photo, device)
        low_noise = None if components.low_noise is None else components.low_noise()
        options = {"num_blocks": num_blocks, "sigmas": flow_sigmas(args.stage1_steps, args.shift), "seed": args.seed}
        options |= {"cuda_graph": args.cuda_graph, "vae_plan": plans.condition.plan}
        with timer.stage("stage_one_seconds"):
            motion = make_motion(dit, vae_one, low, text, image, low_noise_dit=low_noise, **options)
        del dit, low_noise
        with timer.stage("reference_seconds"):
            picture = fit_image(self.photo, size).to(device)
            vae.to_dtypes(encode=plans.encode_dtype)
            reference = make_reference(
                motion, vae_one, vae, picture, plan=plans.reference.plan, motion_plan=plans.motion.plan
            )
        text = empty_text(components.stage_two_config.text_dim).to(device)
        image = components.clip_tokens("stage2", self.photo, device)
        vae.drop_encoder()
        stage = _StageTwo(self, components.stage_two(), vae, reference, text, image, self.plan(num_frames))
        return vae, stage, timer.seconds

    def _row(self, mode: str, num_frames: int) -> dict[str, Any]:
        plan = plan_for(mode, self.plan(num_frames))
        blocks = max(len(window.blocks) for window in plan)
        return {
            "mode": mode,
            "num_frames": num_frames,
            "num_blocks": plan.num_blocks,
            "num_segments": len(plan),
            "window_blocks": blocks,
            "window_tokens": blocks * self.settings()["tokens_per_block"],
            "status": "ok",
            "runs": [],
        }

    def _decode(self, vae: WanVAE, latents: Tensor, path: Path, row: dict[str, Any]) -> None:
        timer = StageTimer(self.device)
        with VideoWriter(path, self.width, self.height, self.fps) as writer, timer.stage("file"):
            segments = latents[:, :, 1:].split(self.args.blocks, dim=2)
            plan = self.vae_plans.decode.plan
            for frames in timer.iterate("decode", decode_frames(vae, latents[:, :, :1], segments, plan=plan)):
                writer.write(frames)
        row["decode_seconds"], row["file_seconds"] = timer.seconds["decode"], timer.seconds["file"]
        row["clip"] = path.name
        row["total_seconds"] = (
            row["stage_one_seconds"] + row["reference_seconds"] + row["stage_two_seconds"]["median"]
            + row["decode_seconds"] + row["file_seconds"]
        )  # fmt: skip


class _StageTwo:
    """Stage II of one clip length: the same inputs for every mode and pass."""

    def __init__(
        self,
        bench: _Benchmark,
        dit: WanDiT,
        vae: WanVAE,
        reference: Tensor,
        text: Tensor,
        image: Tensor | None,
        plan: SegmentPlan,
    ):
        self.bench, self.dit, self.reference, self.plan = bench, dit, reference, plan
        self.context = text, image
        inputs = [tensor for tensor in (reference, text, image) if tensor is not None]
        self.resident = [*dit.parameters(), *vae.parameters(), *inputs]

    def first_pass(self, mode: str, row: dict[str, Any]) -> Tensor:
        """Warms up and measures peak memory; returns the clip's latents."""
        if self.bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            latents = self._sample(mode)
            row["stage_two_peak_bytes"] = torch.cuda.max_memory_allocated()
            row["reserved_bytes"] = torch.cuda.max_memory_reserved()
            row["process_bytes"] = process_memory(self.bench.device)
            return latents
        with TensorMemory(self.resident) as memory:
            latents = self._sample(mode)
        row["stage_two_peak_bytes"] = memory.peak
        return latents

    def timed_pass(self, mode: str, row: dict[str, Any]) -> None:
        """Times one whole Stage II."""
        timer = StageTimer(self.bench.device)
        with timer.stage("stage_two"):
            self._sample(mode)
        row["runs"].append(timer.seconds["stage_two"])

    def _sample(self, mode: str) -> Tensor:
        latents, seed = self.reference.clone(), self.bench.args.seed
        options = {"sigmas": self.bench.sigmas, "cuda_graph": self.bench.args.cuda_graph}
        segments = sample_latents(self.dit, latents, *self.context, plan=self.plan, seed=seed, mode=mode, **options)
        for _ in segments:
            pass
        return latents


def _guarded(rows: list[dict[str, Any]], work: Callable[..., Any], *args: Any) -> Any:
    """``work(*args)``; out of memory becomes the rows' status (and None) instead of the end of the benchmark."""
    try:
        return work(*args)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error) or "MemoryError"
    for row in rows:
        row["status"], row["error"] = "out of memory", reason.splitlines()[0]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _finish(row: dict[str, Any], latents: Tensor, end_to_end: Tensor | None) -> None:
    runs = row["runs"]
    row["stage_two_seconds"] = {"median": statistics.median(runs), "min": min(runs), "max": max(runs)}
    if end_to_end is not None:
        row["difference_to_end_to_end"] = ((latents - end_to_end).norm() / end_to_end.norm()).item()


def _parse_lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"frames: expected numbers separated by commas, got {text!r}") from None
    return lengths


def format_table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table; ratios are end-to-end over the row's mode, of the same clip length."""
    base = {row["num_frames"]: row for row in result["rows"] if row["mode"] == "end_to_end" and row["status"] == "ok"}
    headers = ["frames", "mode", "window, tokens", "Stage II, s", "spread", "times faster", "peak memory", "times less"]
    headers += ["Stage I + reference, s", "decode, s", "whole clip, s"]
    lines: list[Iterable[str]] = []
    for row in result["rows"]:
        cells = [str(row["num_frames"]), LABELS[row["mode"]], f"{row['window_tokens']:,}"]
        if row["status"] != "ok":
            lines.append([*cells, row["status"], *[""] * 7])
            continue
        time, peak, other = row["stage_two_seconds"], row["stage_two_peak_bytes"], base.get(row["num_frames"])
        cells += [f"{time['median']:.3f}", f"{time['min']:.3f}-{time['max']:.3f}"]
        cells += [f"{other['stage_two_seconds']['median'] / time['median']:.2f}" if other else ""]
        cells += [format_bytes(peak), f"{other['stage_two_peak_bytes'] / peak:.2f}" if other else ""]
        cells += [f"{row['stage_one_seconds'] + row['reference_seconds']:.1f}"]
        empty = "out of memory" if "decode_error" in row else ""
        cells += [f"{row[key]:.1f}" if key in row else empty for key in ("decode_seconds", "total_seconds")]
        lines.append(cells)
    table = require("tabulate", "bench").tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    settings, environment = result["settings"], result["environment"]
    caption = (
        f"Measured on {environment['device']} ({environment['device_type']}), {settings['model']},"
        f" {settings['width']}x{settings['height']}, {settings['steps']} steps, {settings['dtype']},"
        f" torch {environment['packages']['torch']}, median of {settings['repeats']}."
    )
    return f"{table}\n\n{caption}"
