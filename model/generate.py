"""``python -m model.generate PHOTO --out clip.mp4``: a photograph in, a video out, through both stages."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from model.command import (
    CommandParser,
    add_model_options,
    build_components,
    parse_size,
    pick_device,
    pick_dtype,
    positive,
    run_command,
)
from model.components import LAYOUT, Components
from model.config import PRESETS, get_preset
from model.csg import MODES, SegmentPlan, plan_for, sample_latents
from model.encoders import empty_text, encode_prompt, load_text_embedding
from model.errors import InputError, require
from model.measure import StageTimer, format_bytes, peak_memory
from model.media import VideoWriter, check_video_path, fit_image, open_image
from model.pipeline import (
    area_size,
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

EXAMPLES = f"""\
examples:
  python -m model.generate photo.jpg --out clip.mp4
      the tiny preset with random weights: shows the path, not quality; runs on a CPU
  python -m model.generate photo.jpg --out clip.mp4 --weights DIR --prompt "waves roll in" --size 2560x1408
      checkpoints, laid out as below
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


@contextmanager
def progress(title: str, total: int, device: torch.device) -> Iterator[Callable[[str], None]]:
    """A bar with time left and peak memory; the function that it gives advances it by one and shows its argument."""
    tqdm = require("tqdm", "generate").tqdm
    with tqdm(total=total, desc=title, unit="step", dynamic_ncols=True) as bar:

        def advance(where: str) -> None:
            bar.set_postfix_str(f"{where}, peak {format_bytes(peak_memory(device)[0])}", refresh=False)
            bar.update()

        yield advance


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
    components = build_components(args, device, dtype)
    multiple = size_multiple(components.vae_config, components.stage_two_config)
    if args.size is None:
        width, height = area_size(photo.size, defaults.width * defaults.height, multiple)
    else:
        width, height = parse_size(args.size)
    check_size(width, height, multiple)
    num_frames = defaults.num_frames if args.frames is None else args.frames
    num_blocks = check_frames(num_frames, components.vae_config.temporal_stride)
    plan = plan_for(args.mode, SegmentPlan(num_blocks, args.blocks, args.left, args.right))
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
    timer = StageTimer(device)

    with timer.stage("text and image"):
        text, text_note = text_embedding(args, components, device)
        text = text.to(device)
        image_one = components.clip_tokens("stage1", photo, device)
        image_two = components.clip_tokens("stage2", photo, device)
    if components.weights is None:
        print("random weights: this clip shows the path, not quality (give --weights for a real one)")
    print(f"text: {text_note}")
    print(
        f"{width}x{height}, {num_frames} frames = {num_blocks} blocks; Stage I at {low_size[0]}x{low_size[1]};"
        f" Stage II {args.mode}: {len(plan)} segments, windows of at most"
        f" {max(len(window.blocks) for window in plan)} blocks; {device.type}, {str(dtype).removeprefix('torch.')}"
    )
    print(vae_plans)

    with timer.stage("load"):
        vae = components.vae()
        vae_one = vae if components.stage_one_vae is None else components.stage_one_vae()
        dit = components.stage_one()
        low_noise = None if components.low_noise is None else components.low_noise()
    with timer.stage("Stage I"), progress("Stage I", args.stage1_steps, device) as advance:
        motion = make_motion(
            dit,
            vae_one,
            fit_image(photo, (width, height), low_size).to(device),
            text,
            image_one,
            num_blocks=num_blocks,
            sigmas=sigmas_one,
            seed=args.seed,
            low_noise_dit=low_noise,
            cuda_graph=args.cuda_graph,
            on_step=lambda step, steps: advance(f"step {step}/{steps}"),
            vae_plan=vae_plans.condition.plan,
        )
    del dit, low_noise
    _release(device)
    with timer.stage("reference"), progress("reference", num_blocks, device) as advance:
        picture = fit_image(photo, (width, height)).to(device)
        vae.to_dtypes(encode=vae_plans.encode_dtype)
        reference = make_reference(
            motion, vae_one, vae, picture, lambda block, blocks: advance(f"block {block}/{blocks}"),
            plan=vae_plans.reference.plan, motion_plan=vae_plans.motion.plan,
        )  # fmt: skip
    del vae_one, picture, motion
    vae.drop_encoder()
    _release(device)
    with timer.stage("load"):
        dit = components.stage_two()
    fps = args.fps or defaults.fps
    with progress("Stage II", len(plan) * args.steps, device) as advance:
        segments = sample_latents(
            dit,
            reference,
            text,
            image_two,
            plan=plan,
            sigmas=sigmas_two,
            seed=args.seed,
            mode=args.mode,
            cuda_graph=args.cuda_graph,
            on_step=lambda segment, total, step, steps: advance(f"segment {segment}/{total} step {step}/{steps}"),
        )
        made = timer.iterate("Stage II", segments)
        frames = decode_frames(vae, reference[:, :, :1], made, plan=vae_plans.decode.plan)
        writer = VideoWriter(out, width, height, fps)
        try:
            with writer, timer.stage("file"):
                for block in timer.iterate("decode", frames):
                    writer.write(block)
        except BaseException:
            if writer.num_frames:
                print(f"\nstopped after {writer.num_frames} frames; they are kept in {writer.partial_path}")
            raise
    peak, what = peak_memory(device)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in timer.seconds.items())
    print(f"time: {time.perf_counter() - started:.1f} s ({spent})")
    print(f"peak memory: {format_bytes(peak)} ({what})")
    print(f"wrote {out}: {width}x{height}, {writer.num_frames} frames at {fps} a second")


def _release(device: torch.device) -> None:
    """Gives the memory of a model that is no longer referenced back, before the next one arrives."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
