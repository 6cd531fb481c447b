"""``python -m model.generate PHOTO --out clip.mp4``: a photograph in, a video out, through both stages."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.cli.options import (
    CommandParser,
    add_lora_options,
    add_memory_options,
    add_model_options,
    count,
    parse_file,
    parse_path,
    run_command,
)
from model.cli.request import ClipRequest, resumed_arguments
from model.config import PRESETS
from model.csg.sampler import MODES
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
from model.pipeline.components import LAYOUT, Components
from model.pipeline.encoders import empty_text, encode_prompt, encoder_dtype, load_text_embedding
from model.resume.clip import ClipWork, input_shapes, make_clip
from model.resume.state import RunState
from model.sizes import MOST_FRAMES

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
  python -m model.generate photo.jpg --out clip.mp4 --weights DIR --vram 12GB
      planned for 12 GB of the card's memory (python -m model.plan shows plans without running)
  python -m model.generate --resume clip.run
      goes on with a run that was interrupted, killed or out of memory

presets:
{chr(10).join(f"  {name:<12}{preset.description}" for name, preset in PRESETS.items())}

weights:
{chr(10).join("  " + line for line in LAYOUT.splitlines())}
"""


#: Frames a second at most: far more than are shown, and few enough for every player's clock.
MOST_FPS = 1000
#: Characters of a prompt at most. UMT5 reads 512 tokens of it.
MOST_PROMPT = 100_000


def parse_prompt(text: str) -> str:
    """Parses a prompt (an argparse type): any text that can be written down."""
    if len(text) > MOST_PROMPT:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_PROMPT} characters, got {len(text)}")
    odd = re.search(r"[\0\ud800-\udfff]", text)
    if odd is not None:
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, got {odd[0]!r} as character {odd.start() + 1}")
    return text


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of ``python -m model.generate``."""
    parser = CommandParser(
        prog="python -m model.generate",
        description="Turns a photograph into a video by SwiftI2V: a motion reference at 360P, then segment by segment.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "photo", metavar="PHOTO", nargs="?", type=parse_file, help="the first frame: any image that Pillow reads"
    )
    parser.add_argument("--out", type=parse_file, metavar="FILE.mp4", help="the video to write")
    parser.add_argument(
        "--prompt", type=parse_prompt, default="", help="what should happen; needs a text encoder in --weights"
    )
    parser.add_argument(
        "--text-embeddings", type=parse_file, metavar="FILE", help="precomputed, one safetensors tensor [L, D]"
    )
    parser.add_argument("--size", metavar="WxH", help="default: the preset's area in the photograph's aspect ratio")
    parser.add_argument("--frames", type=count(1, MOST_FRAMES), help="1 + 4n (default 81)")
    parser.add_argument("--fps", type=count(1, MOST_FPS), help="frames a second (default: the preset's)")
    parser.add_argument(
        "--mode", default="bidirectional", choices=MODES, help="how Stage II runs (default bidirectional)"
    )
    add_model_options(parser)
    add_memory_options(parser)
    add_lora_options(parser)
    group = parser.add_argument_group(
        "a run that goes on", "what is made is kept in a folder until the video is complete"
    )
    group.add_argument(
        "--resume", type=parse_path, metavar="DIR", help="go on with the run in DIR; PHOTO and --out are its own"
    )
    group.add_argument("--state", type=parse_path, metavar="DIR", help="the folder (default: FILE.run beside FILE.mp4)")
    group.add_argument("--keep-state", action="store_true", help="leave the folder when the video is complete")
    group.add_argument("--restart", action="store_true", help="begin anew where the folder holds an unfinished run")
    return parser


def given_embedding(args: argparse.Namespace, components: Components) -> Tensor | None:
    """Returns the embedding of ``--text-embeddings``, and checks that there is what the other inputs take.

    Raises:
        InputError: the embedding does not fit, both stages read texts of different widths, or there is no CLIP encoder
            for a DiT that reads its tokens.
    """
    dims = {components.stage_one_config.text_dim, components.stage_two_config.text_dim}
    if len(dims) > 1:
        raise InputError(f"weights: both stages must read the same text width, got {sorted(dims)}")
    components.check_image_encoder()
    return None if args.text_embeddings is None else load_text_embedding(args.text_embeddings, *dims)


def text_embedding(
    args: argparse.Namespace, components: Components, given: Tensor | None, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, str]:
    """Returns the text embedding ``[1, 512, D]``, ``given`` or the prompt's, and a sentence that says whence it is.

    An encoder runs on ``device`` in ``dtype``.
    """
    if given is not None:
        return given, f"embeddings from {args.text_embeddings}"
    text_dim = components.stage_two_config.text_dim
    if components.weights is not None and (components.weights / "text_encoder").is_dir():
        text = encode_prompt(args.prompt, components.weights, dtype=dtype, device=device)
        if text.shape[2] != text_dim:
            raise InputError(f"weights: the text encoder gives {text.shape[2]} channels, the DiTs read {text_dim}")
        return text, f"prompt {args.prompt!r} encoded by UMT5"
    ignored = f"; the prompt {args.prompt!r} is NOT used" if args.prompt else ""
    return empty_text(text_dim), f"no text encoder and no --text-embeddings: empty-prompt embedding (zeros){ignored}"


class Progress(Watcher):
    """A watcher that times the stages and draws a bar for each, with time left and peak memory.

    Args:
        device: where the work runs.
        totals: the number of steps of every stage that has a bar.
    """

    def __init__(self, device: torch.device, totals: Mapping[str, int]):
        self.timer = StageTimer(device)
        self._device, self._totals = device, totals
        self._bar: Any = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charges the time of the ``with`` body to a stage, under its bar."""
        with self.timer.stage(name), self.bar(name) if name in self._totals else nullcontext():
            yield

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and times the making of each, under the bar of the stage."""
        with self.bar(name) if name in self._totals else nullcontext():
            yield from self.timer.iterate(name, items)

    @contextmanager
    def bar(self, name: str) -> Iterator[None]:
        """Shows the bar of a stage while it runs."""
        tqdm = require("tqdm", "generate").tqdm
        with tqdm(total=self._totals[name], desc=name, unit="step", dynamic_ncols=True) as self._bar:
            yield

    def step(self, name: str, done: int, total: int, where: str) -> None:
        """Advances the bar; steps of an earlier run count as done."""
        self._bar.set_postfix_str(f"{where}, peak {format_bytes(peak_memory(self._device)[0])}", refresh=False)
        self._bar.update(done - self._bar.n)


def run(args: argparse.Namespace) -> None:
    """Runs the command: checks everything first, then makes Stage I, the reference, Stage II and the file.

    A run that goes on begins where it stopped.
    """
    started = time.perf_counter()
    require("av", "generate")
    require("tqdm", "generate")
    if args.resume is not None:
        if args.restart or args.state is not None:
            raise InputError("resume: not together with --restart or --state; a run goes on in its own folder")
        with RunState.open(args.resume) as state:
            resumed_arguments(args, state.job, build_parser())
            with reserved(args.out):
                _run(args, state, started)
        return
    if args.photo is None or args.out is None:
        raise InputError("PHOTO and --out FILE.mp4 are needed, or --resume DIR")
    folder = state_folder(args)
    if RunState.holds(folder) and not args.restart:
        raise InputError(f"state: {folder} holds a run; --resume {folder} goes on with it, --restart begins anew")
    with reserved(args.out):
        _run(args, None, started)


def _run(args: argparse.Namespace, state: RunState | None, started: float) -> None:
    """Makes the clip, from the state of an earlier run if there is one."""
    out = check_places(args)
    photo = open_image(args.photo) if state is None or args.photo.is_file() else None
    request = ClipRequest.resolve(args, None if photo is None else photo.size)
    given = given_embedding(args, request.components) if state is None else None
    plan = plan_memory(request.memory())
    description = request.description(
        plan, photo=None if state is None or photo is not None else state.job["inputs"]["photo"]
    )
    inputs = None
    if state is not None:
        _go_on(state, description)
        inputs = state.load("inputs", input_shapes(request.components, request.size, request.motion_size))
        if inputs is None:
            if photo is None:
                problems = "".join(f"{problem}; " for problem in state.damaged)
                raise InputError(f"resume: {problems}the photograph {args.photo}, of which they are made, is not there")
            given = given_embedding(args, request.components)
    again = state is not None and inputs is None
    progress = Progress(
        request.device,
        {
            "Stage I": len(request.sigmas_one) - 1,
            "reference": request.plan.num_blocks,
            "Stage II": len(request.plan) * (len(request.sigmas_two) - 1),
        },
    )
    if inputs is None:
        inputs, note = _inputs(args, request, given, photo, plan, progress)
        print(f"text: {note}")
    if state is None:
        with _begun(args, description) as state:
            state.save("inputs", inputs)
            _make(args, request, plan, inputs, state, out, progress)
    else:
        if again:
            state.restore("inputs", inputs)
        _make(args, request, plan, inputs, state, out, progress)
    peak, what = peak_memory(request.device)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in progress.timer.seconds.items())
    print(f"time: {time.perf_counter() - started:.1f} s ({spent})")
    print(f"peak memory: {format_bytes(peak)} ({what})")


def check_places(args: argparse.Namespace) -> Path:
    """Returns ``--out`` if a run can keep its film and its state without a file of the user's in their place.

    Raises:
        InputError: it cannot.
    """
    out = check_video_path(args.out)
    for name, path in (("PHOTO", args.photo), ("--text-embeddings", args.text_embeddings)):
        if path is not None and path.exists() and out.exists() and path.samefile(out):
            raise InputError(f"out: {out} is {name}, which the video would replace")
    folder = args.resume or state_folder(args)
    check_place(folder / "job.json", "state")
    film, partial = (Path(os.path.realpath(path)) for path in (out, out.with_suffix(".partial.mp4")))
    if Path(os.path.realpath(folder)) in (film, partial, *film.parents):
        raise InputError(f"state: expected a folder of the run alone, got {folder}, where --out {out} is")
    return out


def state_folder(args: argparse.Namespace) -> Path:
    """Returns the folder for the state of a new run."""
    return args.state or args.out.with_suffix(".run")


def _begun(args: argparse.Namespace, description: dict[str, Any]) -> RunState:
    """Returns the state of a new run, which is removed first if one is to be begun anew."""
    folder = state_folder(args)
    if args.restart:
        RunState.discard(folder)
    return RunState.create(folder, description)


def _go_on(state: RunState, description: dict[str, Any]) -> None:
    """Prints what differs from the run as it was begun.

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


def _inputs(
    args: argparse.Namespace,
    request: ClipRequest,
    given: Tensor | None,
    photo: Any,
    plan: MemoryPlan,
    progress: Progress,
) -> tuple[dict[str, Tensor], str]:
    """Returns everything that is made of the photograph and the prompt, on the CPU, and where the text comes from.

    ``given`` is the embedding of the text if there is no prompt to encode.
    """
    components, device = request.components, request.device
    with progress.timer.stage("text and image"):
        try:
            place = device if plan.text_on_device else torch.device("cpu")
            text, note = text_embedding(args, components, given, place, encoder_dtype(device))
        except RuntimeError as error:
            if place.type == "cpu" or full_memory(error) != "device":
                raise
            text = None
        if text is None:
            release(device)
            print("the text encoder ran out of the card's memory; it runs on the CPU")
            text, note = text_embedding(args, components, given, torch.device("cpu"), encoder_dtype(device))
        release(device)
        inputs = {
            "picture": fit_image(photo, request.size),
            "low_picture": fit_image(photo, request.size, request.motion_size),
            "text": text,
        }
        for name, stage in (("image_one", "stage1"), ("image_two", "stage2")):
            tokens = components.clip_tokens(stage, photo, device)
            if tokens is not None:
                inputs[name] = tokens
        release(device)
    return {name: tensor.cpu() for name, tensor in inputs.items()}, note


def _make(
    args: argparse.Namespace,
    request: ClipRequest,
    plan: MemoryPlan,
    inputs: dict[str, Tensor],
    state: RunState,
    out: Path,
    progress: Progress,
) -> None:
    """Makes what is still missing, and the file."""
    device = request.device
    job = ClipJob(
        inputs["picture"],
        inputs["low_picture"],
        inputs["text"].to(device),
        request.plan,
        request.sigmas_one,
        request.sigmas_two,
        plan.vae_plans.tiles,
        *(inputs[name].to(device) if name in inputs else None for name in ("image_one", "image_two")),
        seed=args.seed,
        mode=args.mode,
        cuda_graph=args.cuda_graph,
    )
    if request.components.weights is None:
        print("random weights: this clip shows the path, not quality (give --weights for a real one)")
    for part, given in request.loras.items():
        for lora in given:
            print(f"LoRA: {lora.path} at strength {lora.strength:g} on {part}")
    (width, height), low, segments = request.size, request.motion_size, len(request.plan)
    print(
        f"{width}x{height}, {request.num_frames} frames = {request.plan.num_blocks} blocks;"
        f" Stage I at {low[0]}x{low[1]};"
        f" Stage II {args.mode}: {segments} segment{'' if segments == 1 else 's'}, windows of at most"
        f" {request.window_blocks} blocks;"
        f" {device.type}, {str(request.dtype).removeprefix('torch.')}"
    )
    print(plan)
    writer = VideoWriter(out, width, height, request.fps, pieces=state.folder, run=state.digest)
    for problem in writer.damaged:
        print(problem)
    found = ""
    try:
        with writer:
            work = ClipWork(job, request.components, state, writer, progress)
            make_clip(work, plan)
    except NotFiniteError as error:
        found = str(error)
    except BaseException:
        _tell_stopped(writer, state)
        raise
    # Only here, after the handler: what the exception keeps alive includes bars, which would be drawn after the line.
    if found:
        _tell_stopped(writer, state)
        raise InputError(f"{found}; likely cause: {likely_cause(request)}")
    print(f"wrote {out}: {width}x{height}, {writer.num_frames} frames at {request.fps} a second")
    if not args.keep_state:
        state.remove()


def _tell_stopped(writer: VideoWriter, state: RunState) -> None:
    """Prints what there is of a run that stops."""
    frames = writer.film_frames
    kept = f"; {frames} frames are kept in {writer.partial_path}" if frames else ""
    print(f"\nstopped{kept}; --resume {state.folder} goes on")


def likely_cause(request: ClipRequest) -> str:
    """Returns what most likely makes the results of a run NaN or infinite."""
    if request.dtype == torch.float16:
        return "float16 holds no number above 65504; --dtype bfloat16 or float32 does (with --restart)"
    loras = [f"{lora.path} at strength {lora.strength:g}" for given in request.loras.values() for lora in given]
    if loras:
        return f"the LoRAs or their strengths: {', '.join(loras)}"
    if request.arguments["quantize"] in ("float8", "int8") or request.arguments["matmul"] == "8bit":
        return "--quantize or --matmul, which change numbers"
    weights, text = request.components.weights, request.arguments["text_embeddings"]
    given = "" if text is None else f", or embeddings in {text} that are too large"
    return f"{'the random weights of this seed' if weights is None else f'unsuitable weights in {weights}'}{given}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
