"""``python -m model.generate PHOTO --out clip.mp4``: a photograph in, a video out, through both stages."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.clip import ClipJob, Item, Watcher, make_condition, make_frames
from model.command import (
    CommandParser,
    add_lora_options,
    add_model_options,
    build_components,
    chosen_loras,
    parse_size,
    pick_device,
    pick_dtype,
    positive,
    run_command,
    segment_plan,
)
from model.components import LAYOUT, Components
from model.config import PRESETS, get_preset
from model.csg import MODES, plan_for
from model.encoders import empty_text, encode_prompt, load_text_embedding
from model.errors import InputError, require
from model.measure import StageTimer, format_bytes, peak_memory
from model.media import VideoWriter, check_video_path, fit_image, open_image
from model.pipeline import (
    area_size,
    check_frames,
    check_size,
    size_multiple,
    stage_one_size,
)
from model.pipeline_plan import plan_components
from model.scheduler import flow_sigmas

EXAMPLES = f"""\
examples:
  python -m model.generate photo.jpg --out clip.mp4
      the tiny preset with random weights: shows the path, not quality; runs on a CPU
  python -m model.generate photo.jpg --out clip.mp4 --weights DIR --prompt "waves roll in" --size 2560x1408
      checkpoints, laid out as below
  python -m model.generate photo.jpg --out clip.mp4 --weights DIR --stage1-lora few_step.safetensors \\
      --stage1-lora style.safetensors:0.6
      the same with LoRAs on Stage I, at strengths 1 and 0.6
  python -m model.generate photo.jpg --out clip.mp4 --mode end_to_end --frames 33
      the same models in one window of all blocks, for comparison

presets:
{chr(10).join(f"  {name:<12}{preset.description}" for name, preset in PRESETS.items())}

weights:
{chr(10).join("  " + line for line in LAYOUT.splitlines())}
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m model.generate``."""
    parser = CommandParser(
        prog="python -m model.generate",
        description="Turns a photograph into a video by SwiftI2V: a motion reference at 360P, then segment by segment.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photo", metavar="PHOTO", help="the first frame: any image that Pillow reads")
    parser.add_argument("--out", required=True, metavar="FILE.mp4", help="the video to write")
    parser.add_argument("--prompt", default="", help="what should happen; needs a text encoder in --weights")
    parser.add_argument(
        "--text-embeddings", type=Path, metavar="FILE", help="precomputed, one safetensors tensor [L, D]"
    )
    parser.add_argument("--size", metavar="WxH", help="default: the preset's area in the photograph's aspect ratio")
    parser.add_argument("--frames", type=int, help="1 + 4n (default 81)")
    parser.add_argument("--fps", type=positive, help="frames a second (default: the preset's)")
    parser.add_argument(
        "--mode", default="bidirectional", choices=MODES, help="how Stage II runs (default bidirectional)"
    )
    add_model_options(parser)
    add_lora_options(parser)
    return parser


def text_embedding(args: argparse.Namespace, components: Components, device: torch.device) -> tuple[Tensor, str]:
    """The text ``[1, 512, D]`` for both stages, and a sentence that says where it comes from."""
    dims = {components.stage_one_config.text_dim, components.stage_two_config.text_dim}
    if len(dims) > 1:
        raise InputError(f"weights: both stages must read the same text width, got {sorted(dims)}")
    (text_dim,) = dims
    if args.text_embeddings is not None:
        return load_text_embedding(args.text_embeddings, text_dim), f"embeddings from {args.text_embeddings}"
    if components.weights is not None and (components.weights / "text_encoder").is_dir():
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        text = encode_prompt(args.prompt, components.weights, dtype=dtype, device=device)
        if text.shape[2] != text_dim:
            raise InputError(f"weights: the text encoder gives {text.shape[2]} channels, the DiTs read {text_dim}")
        return text, f"prompt {args.prompt!r} encoded by UMT5"
    ignored = f"; the prompt {args.prompt!r} is NOT used" if args.prompt else ""
    return empty_text(text_dim), f"no text encoder and no --text-embeddings: empty-prompt embedding (zeros){ignored}"


class Progress(Watcher):
    """Times the stages, and draws a bar of each with time left and peak memory.

    Args:
        device: of the work.
        totals: steps of the stages that have a bar.
    """

    def __init__(self, device: torch.device, totals: Mapping[str, int]):
        self.timer = StageTimer(device)
        self._device, self._totals = device, totals
        self._bar: Any = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times it, under its bar."""
        with self.timer.stage(name), self.bar(name) if name in self._totals else nullcontext():
            yield

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Times the making of each item."""
        return self.timer.iterate(name, items)

    @contextmanager
    def bar(self, name: str) -> Iterator[None]:
        """The bar of a stage."""
        tqdm = require("tqdm", "generate").tqdm
        with tqdm(total=self._totals[name], desc=name, unit="step", dynamic_ncols=True) as self._bar:
            yield

    def step(self, name: str, done: int, total: int, where: str) -> None:
        """Advances the bar."""
        self._bar.set_postfix_str(f"{where}, peak {format_bytes(peak_memory(self._device)[0])}", refresh=False)
        self._bar.update()


def run(args: argparse.Namespace) -> None:
    """The command: checks everything first, then Stage I, the reference, Stage II and the file."""
    started = time.perf_counter()
    out = check_video_path(args.out)
    photo = open_image(args.photo)
    require("av", "generate")
    require("tqdm", "generate")
    defaults = get_preset(args.preset or ("tiny" if args.weights is None else "1.3b"))
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    loras = chosen_loras(args)
    components = build_components(args, device, dtype, loras)
    multiple = size_multiple(components.vae_config, components.stage_two_config)
    if args.size is None:
        width, height = area_size(photo.size, defaults.width * defaults.height, multiple)
    else:
        width, height = parse_size(args.size)
    check_size(width, height, multiple)
    num_frames = defaults.num_frames if args.frames is None else args.frames
    num_blocks = check_frames(num_frames, components.vae_config.temporal_stride)
    plan = plan_for(args.mode, segment_plan(args, num_blocks))
    sigmas_one, sigmas_two = flow_sigmas(args.stage1_steps, args.shift), flow_sigmas(args.steps, args.shift)
    low_size = stage_one_size(
        width, height, size_multiple(components.stage_one_vae_config, components.stage_one_config)
    )
    vae_plans = plan_components(
        components,
        (width, height),
        low_size,
        window_blocks=max(len(window.blocks) for window in plan),
        blocks_per_segment=args.blocks,
        memory=args.vae_memory,
        dtype=dtype,
        device=device,
    )
    totals = {"Stage I": args.stage1_steps, "reference": num_blocks, "Stage II": len(plan) * args.steps}
    progress = Progress(device, totals)
    timer = progress.timer

    with timer.stage("text and image"):
        text, text_note = text_embedding(args, components, device)
        job = ClipJob(
            fit_image(photo, (width, height)),
            fit_image(photo, (width, height), low_size),
            text.to(device),
            plan,
            sigmas_one,
            sigmas_two,
            vae_plans,
            components.clip_tokens("stage1", photo, device),
            components.clip_tokens("stage2", photo, device),
            args.seed,
            args.mode,
            args.cuda_graph,
        )
    if components.weights is None:
        print("random weights: this clip shows the path, not quality (give --weights for a real one)")
    print(f"text: {text_note}")
    for part, given in loras.items():
        for lora in given:
            print(f"LoRA: {lora.path} at strength {lora.strength:g} on {part}")
    print(
        f"{width}x{height}, {num_frames} frames = {num_blocks} blocks; Stage I at {low_size[0]}x{low_size[1]};"
        f" Stage II {args.mode}: {len(plan)} segments, windows of at most"
        f" {max(len(window.blocks) for window in plan)} blocks; {device.type}, {str(dtype).removeprefix('torch.')}"
    )
    print(vae_plans)

    condition = make_condition(components, job, progress)
    fps = args.fps or defaults.fps
    writer = VideoWriter(out, width, height, fps)
    with progress.bar("Stage II"):
        try:
            with writer, timer.stage("file"):
                for frames in make_frames(components, job, condition, progress):
                    writer.write(frames)
        except BaseException:
            if writer.num_frames:
                print(f"\nstopped after {writer.num_frames} frames; they are kept in {writer.partial_path}")
            raise
    peak, what = peak_memory(device)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in timer.seconds.items())
    print(f"time: {time.perf_counter() - started:.1f} s ({spent})")
    print(f"peak memory: {format_bytes(peak)} ({what})")
    print(f"wrote {out}: {width}x{height}, {writer.num_frames} frames at {fps} a second")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
