"""``python -m model.generate PHOTO --out clip.mp4``: a photograph in, a video out, through both stages."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.cli.options import GROUPS, CommandParser, Settings, add_options, pick_dtype, resumed, run_command
from model.cli.request import ClipSettings
from model.config import PRESETS
from model.errors import InputError, require
from model.io.durable import check_place
from model.io.media import VideoWriter, check_video_path, reserved
from model.io.photo import fit_image, open_image
from model.machine.finite import NotFiniteError
from model.machine.host import release
from model.machine.measure import StageTimer, format_bytes, full_memory, peak_memory
from model.memory.plan import plan_memory
from model.memory.report import MemoryPlan
from model.pipeline.clip import ClipJob, Item, Watcher
from model.pipeline.components import LAYOUT
from model.pipeline.encoders import empty_text, encode_prompt, load_text_embedding
from model.resume.clip import make_clip
from model.resume.state import RunState

#: What most likely makes the results of a run NaN or infinite.
NOT_FINITE = "--dtype float16, a LoRA or its strength, --quantize or --matmul, unsuitable weights or embeddings"
EXAMPLES = f"""\
examples:
  python -m model.generate photo.jpg --out clip.mp4
      the tiny preset with random weights: shows the path, not quality; runs on a CPU
  python -m model.generate photo.jpg --out clip.mp4 --weights DIR --prompt "waves roll in" --size 2560x1408
      checkpoints, laid out as below
  python -m model.generate photo.jpg --out clip.mp4 --weights DIR --stage1-lora few_step.safetensors \\
      --stage1-lora style.safetensors:0.6
      the same with LoRAs on Stage I, at strengths 1 and 0.6
  python -m model.generate photo.jpg --out clip.mp4 --weights DIR --vram 12GB
      planned for 12 GB of the card's memory (python -m model.plan shows plans without running)
  python -m model.generate --resume clip.run
      goes on with a run that was interrupted, killed or out of memory

presets:
{chr(10).join(f"  {name:<12}{preset.description}" for name, preset in PRESETS.items())}

weights:
{chr(10).join("  " + line for line in LAYOUT.splitlines())}
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of ``python -m model.generate``."""
    parser = CommandParser(
        prog="python -m model.generate",
        description="Turns a photograph into a video by SwiftI2V: a motion reference at 360P, then segment by segment.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, *GROUPS)
    return parser


class Progress(Watcher):
    """A watcher that times the stages of a clip and draws a bar for each, with time left and peak memory."""

    def __init__(self, clip: ClipSettings):
        self.timer, self._device = StageTimer(clip.torch_device), clip.torch_device
        #: The number of steps of every stage that has a bar.
        self._totals = {
            "Stage I": len(clip.sigmas_one) - 1,
            "reference": clip.plan.num_blocks,
            "Stage II": len(clip.plan) * (len(clip.sigmas_two) - 1),
        }
        self._bar: Any = None

    @property
    def failed(self) -> str:
        """The innermost stage in which an error was raised last."""
        return self.timer.failed

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charges the time of the ``with`` body to a stage, under its bar."""
        with self.timer.stage(name), self._shown(name):
            yield

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and times the making of each, under the bar of the stage."""
        with self._shown(name):
            yield from self.timer.iterate(name, items)

    @contextmanager
    def _shown(self, name: str) -> Iterator[None]:
        if name not in self._totals:
            yield
            return
        tqdm = require("tqdm", "generate").tqdm
        with tqdm(total=self._totals[name], desc=name, unit="step", dynamic_ncols=True) as self._bar:
            yield

    def step(self, name: str, done: int, total: int, where: str) -> None:
        """Advances the bar; steps of an earlier run count as done."""
        self._bar.set_postfix_str(f"{where}, peak {format_bytes(peak_memory(self._device)[0])}", refresh=False)
        self._bar.update(done - self._bar.n)


def run(settings: Settings) -> None:
    """Runs the command: checks everything first, then makes Stage I, the reference, Stage II and the file.

    A run that goes on begins where it stopped.
    """
    started = time.perf_counter()
    require("av", "generate")
    require("tqdm", "generate")
    with ExitStack() as held:
        state = None
        if settings.resume is not None:
            if settings.restart or settings.state is not None:
                raise InputError("resume: not together with --restart or --state; a run goes on in its own folder")
            state = held.enter_context(RunState.open(settings.resume))
            settings = resumed(settings, state.job)
        if settings.photo is None or settings.out is None:
            raise InputError("PHOTO and --out FILE.mp4 are needed, or --resume DIR")
        held.enter_context(reserved(settings.out))
        folder = settings.resume or settings.state or settings.out.with_suffix(".run")
        if state is None and RunState.holds(folder) and not settings.restart:
            raise InputError(f"state: {folder} holds a run; --resume {folder} goes on with it, --restart begins anew")
        check_places(settings, folder)
        photo = open_image(settings.photo) if state is None or settings.photo.is_file() else None
        clip = ClipSettings(**vars(settings), photo_size=None if photo is None else photo.size)
        if state is None:
            clip.components.check_image_encoder()
        text_dim = clip.components.stage_two_config.text_dim
        text = None if clip.text_embeddings is None else load_text_embedding(clip.text_embeddings, text_dim)
        plan = plan_memory(clip.memory())
        description = clip.description(plan, None if photo is not None else state.job["inputs"]["photo"])
        progress = Progress(clip)
        inputs = None if state is None else kept_inputs(state, description)
        if inputs is None:
            if photo is None:
                problems = "".join(f"{problem}; " for problem in state.damaged)
                raise InputError(f"resume: {problems}the photograph {clip.photo}, of which they are made, is not there")
            inputs = make_inputs(clip, text, photo, plan, progress)
            if state is not None:
                state.restore("inputs", inputs)
            else:
                state = held.enter_context(RunState.create(folder, description, clip.restart))
                state.save("inputs", inputs)
        make_film(clip, plan, inputs, state, progress)
    peak, what = peak_memory(clip.torch_device)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in progress.timer.seconds.items())
    print(f"time: {time.perf_counter() - started:.1f} s ({spent})")
    print(f"peak memory: {format_bytes(peak)} ({what})")


def check_places(settings: Settings, folder: Path) -> None:
    """Checks that a run can keep its film, and its state in a folder, without a file of the user's in their place.

    Raises:
        InputError: it cannot.
    """
    out = check_video_path(settings.out)
    for name, path in (("PHOTO", settings.photo), ("--text-embeddings", settings.text_embeddings)):
        if path is not None and path.exists() and out.exists() and path.samefile(out):
            raise InputError(f"out: {out} is {name}, which the video would replace")
    check_place(folder / "job.json", "state")
    film, partial = (Path(os.path.realpath(path)) for path in (out, out.with_suffix(".partial.mp4")))
    if Path(os.path.realpath(folder)) in (film, partial, *film.parents):
        raise InputError(f"state: expected a folder of the run alone, got {folder}, where --out {out} is")


def kept_inputs(state: RunState, description: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Returns the inputs of the run that goes on, None if they are damaged; prints what differs from its beginning.

    Raises:
        InputError: the difference would make another video.
    """
    changes = state.changes(description)
    if changes.forbidding:
        raise InputError(f"resume: not what {state.folder} was begun with: {'; '.join(changes.forbidding)}")
    if changes.inexact:
        print("the rest of the video will not be the same bit for bit as without the interruption, since it is made")
        print("from the same state by another machine, plan or software:")
        print("\n".join(f"  {change}" for change in changes.inexact))
    return state.load("inputs")


def make_inputs(
    clip: ClipSettings, text: Tensor | None, photo: Any, plan: MemoryPlan, progress: Progress
) -> dict[str, Tensor]:
    """Returns everything that is made of the photograph and the prompt, on the CPU, and prints whence the text is.

    ``text`` is its embedding if there is no prompt to encode.
    """
    device, components = clip.torch_device, clip.components
    with progress.timer.stage("text and image"):
        if text is not None:
            note = f"embeddings from {clip.text_embeddings}"
        elif components.text_encoder is not None:
            text = encoded_prompt(clip, plan.text_on_device)
            note = f"prompt {clip.prompt!r} encoded by UMT5"
        else:
            text = empty_text(components.stage_two_config.text_dim)
            ignored = f"; the prompt {clip.prompt!r} is NOT used" if clip.prompt else ""
            note = f"no text encoder and no --text-embeddings: empty-prompt embedding (zeros){ignored}"
        release(device)
        inputs = {
            "picture": fit_image(photo, clip.pixels),
            "low_picture": fit_image(photo, clip.pixels, plan.request.motion_size),
            "text": text,
        }
        for name, stage in (("image_one", "stage1"), ("image_two", "stage2")):
            tokens = components.clip_tokens(stage, photo, device)
            if tokens is not None:
                inputs[name] = tokens
        release(device)
    print(f"text: {note}")
    return {name: tensor.cpu() for name, tensor in inputs.items()}


def encoded_prompt(clip: ClipSettings, on_device: bool) -> Tensor:
    """Returns the prompt's embedding ``[1, 512, D]`` by UMT5, on the CPU if the card's memory turns out too small.

    Raises:
        InputError: the DiTs read another width.
    """
    weights, cpu = clip.components.weights, torch.device("cpu")
    # That of a run on its device, wherever the encoder is: 11 GB in bfloat16, for GPUs, and 23 GB in float32.
    dtype = pick_dtype("auto", clip.torch_device)
    for place in (clip.torch_device, cpu) if on_device else (cpu,):
        try:
            text = encode_prompt(clip.prompt, weights, dtype=dtype, device=place)
            break
        except RuntimeError as error:
            if place.type == "cpu" or full_memory(error) != "device":
                raise
        # Only here, after the handler: the exception would keep alive what was on the card.
        release(place)
        print("the text encoder ran out of the card's memory; it runs on the CPU")
    text_dim = clip.components.stage_two_config.text_dim
    if text.shape[2] != text_dim:
        raise InputError(f"weights: the text encoder gives {text.shape[2]} channels, the DiTs read {text_dim}")
    return text


def make_film(
    clip: ClipSettings, plan: MemoryPlan, inputs: Mapping[str, Tensor], state: RunState, progress: Progress
) -> None:
    """Makes what is still missing of the clip, and the file."""
    device = clip.torch_device
    job = ClipJob(
        inputs["picture"],
        inputs["low_picture"],
        inputs["text"].to(device),
        clip.plan,
        clip.sigmas_one,
        clip.sigmas_two,
        plan.vae_plans.tiles,
        *(inputs[name].to(device) if name in inputs else None for name in ("image_one", "image_two")),
        seed=clip.seed,
        mode=clip.mode,
        cuda_graph=clip.cuda_graph,
    )
    if clip.components.weights is None:
        print("random weights: this clip shows the path, not quality (give --weights for a real one)")
    for part, given in clip.loras.items():
        for lora in given:
            print(f"LoRA: {lora.path} at strength {lora.strength:g} on {part}")
    (width, height), segments = plan.request.motion_size, len(clip.plan)
    largest = max(len(window.blocks) for window in clip.plan)
    print(
        f"{clip.size}, {clip.frames} frames = {clip.plan.num_blocks} blocks; Stage I at {width}x{height}; Stage II"
        f" {clip.mode}: {segments} segment{'s' * (segments != 1)}, windows of at most {largest} blocks; {device.type},"
        f" {str(clip.torch_dtype).removeprefix('torch.')}"
    )
    print(plan)
    writer = VideoWriter(clip.out, *clip.pixels, clip.fps)
    try:
        with writer:
            make_clip(clip.components, job, plan, state, writer, progress)
    except BaseException as error:
        frames = writer.film_frames
        kept = f"; {frames} frame{'s' * (frames > 1)} kept in {writer.partial_path}" if frames else ""
        print(f"\nstopped{kept}; --resume {state.folder} goes on")
        if isinstance(error, NotFiniteError):
            raise InputError(f"{error}; likely causes: {NOT_FINITE}") from error
        raise
    print(f"wrote {clip.out}: {clip.size}, {writer.num_frames} frames at {clip.fps} a second")
    if not clip.keep_state:
        state.remove()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    settings = Settings(**vars(build_parser().parse_args(argv)))
    return run_command(lambda: run(settings))


if __name__ == "__main__":
    raise SystemExit(main())
