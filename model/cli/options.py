"""Shared parts of the commands: options, their parsing, and one line instead of a traceback for bad input."""

# ruff: noqa: RUF009 (the fields of Settings are dataclasses.field, by way of _option)
from __future__ import annotations

import _thread
import argparse
import errno
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from model.config import PRESETS
from model.csg.sampler import MODES, SegmentPlan, plan_segments
from model.csg.schedule import MOST_STEPS, SHIFTS
from model.errors import InputError, NoMemoryError, printable
from model.machine.host import machine_memory
from model.machine.measure import is_out_of_memory, parse_bytes
from model.pipeline.components import LORA_PARTS, Components
from model.sizes import MOST_FRAMES, check_pixels
from model.streaming.placement import MATMUL, QUANTIZE
from model.weights.lora import LoRA
from swifti2v_kernels import default_backend

#: Bytes of a file's name and of a path at most, some less than systems take (4096): names are appended to folders.
_NAME_MAX, _PATH_MAX = 255, 3800
#: Characters of a message at most, and error numbers of a disk that is full or must not be written to.
_MOST_TOLD, _DISK_IS_FULL = 4000, (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
#: Random weights of three models take this seed and the next two, and torch one below 2**64.
MOST_SEED = 2**64 - 3
#: Frames a second at most: far more than are shown, and few enough for every player's clock.
MOST_FPS = 1000
#: Characters of a prompt at most. UMT5 reads 512 tokens of it.
MOST_PROMPT = 100_000
#: Strength of a LoRA at most, either way: float32 holds no more.
MOST_STRENGTH = 3.4e38


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like those of the commands themselves."""

    def error(self, message: str) -> NoReturn:
        """Prints the message without the usage and exits with 2."""
        self.exit(2, f"{_told(f'error: {message}')} (see {self.prog} --help)\n")


def _told(message: str) -> str:
    """Returns a message as it is printed, without the middle of one that is very long: it may cite what was given."""
    text = printable(message)
    return text if len(text) <= _MOST_TOLD else f"{text[: _MOST_TOLD // 2]} ... {text[-_MOST_TOLD // 2 :]}"


def run_command(command: Callable[[], int | None]) -> int:
    """Runs a command's body and returns its exit code: what the body returns, or 0; 2 for bad input; 1 for lack of
    memory or of room on the disk; 130 if interrupted.

    Any other exception is a defect of this project or of the machine and keeps its traceback.
    """
    code, told = 1, ""
    try:
        try:
            default_backend()
        except ValueError as error:  # a word that names no backend
            raise InputError(str(error)) from error
        with no_interruption_lost(), warnings_in_lines():
            code = command() or 0
            sys.stdout.flush()  # here, where an interruption and a reader that is gone are handled
            return code
    except InputError as error:
        code, told = 2, f"error: {error}"
    except NoMemoryError as error:
        told = f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = f"error: out of memory; try a smaller --size or fewer --frames ({error})"
    except BrokenPipeError:
        # Whoever read the output has gone. Nothing more can be said, also not when Python flushes it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        told = f"error: disk: {error.strerror}: {error.filename or 'a file'}"
    except KeyboardInterrupt:
        code, told = 130, "interrupted"
    print(_told(told), file=sys.stderr)
    return code


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Prints each warning of the body on standard error as one line, and another with the same text not again."""
    shown = set()

    def show(message: Warning | str, *_: object) -> None:
        text = printable(" ".join(str(message).split()))
        if text not in shown:
            shown.add(text)
            print(f"warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def no_interruption_lost() -> Iterator[None]:
    """Raises an interruption once more if it met a finalizer while the body runs.

    A finalizer and a weak reference's callback, which planning has one of a tensor, have no caller to raise to: Python
    prints what they raise and goes on, and a run that was told to stop would not.
    """
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            before(unraisable)
            return
        # Later and from another thread: here and now it would meet the hook, which has no caller either.
        timer = threading.Timer(0.02, _thread.interrupt_main)
        timer.daemon = True
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def parse_size(text: str) -> tuple[int, int]:
    """Parses ``"2560x1408"`` as ``(2560, 1408)``.

    Raises:
        InputError: another form, or more pixels than a video can have.
    """
    match = re.fullmatch(r"([0-9]{1,9})[xX*]([0-9]{1,9})", text.strip())
    if match is None:
        raise InputError(f"size: expected WIDTHxHEIGHT such as 2560x1408, got {text!r}")
    size = int(match[1]), int(match[2])
    check_pixels(*size)
    return size


def pick_device(name: str) -> torch.device:
    """Returns the device called ``name``; ``"auto"`` is CUDA where there is a GPU, else the CPU.

    Raises:
        InputError: the device is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch sees no GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype called ``name``; ``"auto"`` is bfloat16 on CUDA, float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def count(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Returns a parser (an argparse type) of integers from ``least`` to ``most``, in the digits 0 to 9."""

    def parse(text: str) -> int:
        match = re.fullmatch(r"([+-]?)0*([0-9]+)", text.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
        # Python reads no more than 4300 digits; the first 40 say on which side of the bounds a longer number is.
        return _between(least, most, int(match[1] + match[2][:40]), text)

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """Returns a parser (an argparse type) of decimal numbers from ``least`` to ``most``."""

    def parse(text: str) -> float:
        if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text.strip().lower()) is None:
            raise argparse.ArgumentTypeError(f"expected a number from {least:g} to {most:g}, got {text!r}")
        return _between(least, most, float(text), text)

    return parse


def _between(least: float, most: float, value: Any, text: str) -> Any:
    if value < least:
        raise argparse.ArgumentTypeError(f"expected at least {least:g}, got {text.strip()}")
    if value > most:
        told = most if isinstance(most, int) else f"{most:g}"
        raise argparse.ArgumentTypeError(f"expected at most {told}, got {text.strip()}")
    return value


positive, not_negative = count(1), count(0)


def parse_path(text: str) -> Path:
    """Parses the name of a file or folder (an argparse type), which need not be there."""
    problem = None
    if not text.strip():
        problem = "a name"
    elif re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text):
        problem = "a name in UTF-8 without control characters"
    elif max(len(part.encode()) for part in text.split(os.sep)) > _NAME_MAX:
        problem = f"names of at most {_NAME_MAX} bytes"
    elif len(os.path.abspath(text).encode()) > _PATH_MAX:
        problem = f"a path of at most {_PATH_MAX} bytes"
    try:
        if problem is None:
            os.stat(text)
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            problem = f"a name that can be looked up ({error.strerror})"
    if problem is not None:
        raise argparse.ArgumentTypeError(f"expected {problem}, got {text!r}")
    return Path(text)


def parse_file(text: str) -> Path:
    """Parses the name of a file (an argparse type), which need not be there, and is not that of a folder."""
    if text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"expected the name of a file, got {text!r}")
    return parse_path(text)


def parse_prompt(text: str) -> str:
    """Parses a prompt (an argparse type): any text that can be written down."""
    if len(text) > MOST_PROMPT:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_PROMPT} characters, got {len(text)}")
    odd = re.search(r"[\0\ud800-\udfff]", text)
    if odd is not None:
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, got {odd[0]!r} as character {odd.start() + 1}")
    return text


#: Titles of the groups of options in the help.
GROUPS = ("model", "segments", "machine", "memory", "LoRAs", "a run that goes on")
MODEL, SEGMENTS, MACHINE, MEMORY, LORAS, RUNS = GROUPS
_ABOUT = {
    MEMORY: "weights, tiles and formats are chosen so that a run fits; python -m model.plan shows how",
    LORAS: "FILE or FILE:STRENGTH (default 1), merged as the weights are read; each option may be repeated",
    RUNS: "what is made is kept in a folder until the video is complete",
}
_STEPS = count(1, MOST_STEPS)
_QUANTIZE = """\
form of layer weights: none: in --dtype; file: 8 bits where the file has them so; float8 or int8, which change numbers
(default auto: none or file)"""
_STRICT = """\
refuse a LoRA if any of its keys does not fit; else keys that the model has no place for are left out with a warning, as
long as half of the file fits"""


def _option(group: str | None, default: Any, help: str, flag: str | None = None, **how: Any) -> Any:
    """Returns a field of :class:`Settings` with the option of a group that sets it.

    ``flag`` is ``--`` and the field's name unless it is given, ``how`` what else ``add_argument`` takes.
    """
    return field(default=default, metadata={"group": group, "flag": flag, "how": {**how, "help": help}})


def _loras(part: str, flag: str) -> Any:
    return _option(LORAS, (), f"for {part} of --weights", flag, action="append", metavar="FILE[:STRENGTH]")


@dataclass(frozen=True)
class Settings:
    """The options that a command was given: those of ``model.generate``, each with its parsing and its help.

    Other commands have some of these. A field that a command has no option for keeps its default.
    """

    photo: Path | None = _option(
        None, None, "the first frame: any image that Pillow reads", "photo", metavar="PHOTO", nargs="?", type=parse_file
    )
    out: Path | None = _option(None, None, "the video to write", type=parse_file, metavar="FILE.mp4")
    prompt: str = _option(None, "", "what should happen; needs a text encoder in --weights", type=parse_prompt)
    text_embeddings: Path | None = _option(
        None, None, "precomputed, one safetensors tensor [L, D]", type=parse_file, metavar="FILE"
    )
    size: str | None = _option(None, None, "default: the preset's area in the photograph's aspect ratio", metavar="WxH")
    frames: int | None = _option(None, None, "1 + 4n (default 81)", type=count(1, MOST_FRAMES))
    fps: int | None = _option(None, None, "frames a second (default: the preset's)", type=count(1, MOST_FPS))
    mode: str = _option(None, "bidirectional", "how Stage II runs (default bidirectional)", choices=MODES)

    preset: str | None = _option(MODEL, None, f"one of {', '.join(PRESETS)}; see below")
    weights: Path | None = _option(MODEL, None, "checkpoints (default: random weights)", type=parse_path, metavar="DIR")
    seed: int = _option(MODEL, 0, "seed of the noise and of random weights (default 0)", type=count(0, MOST_SEED))
    steps: int = _option(MODEL, 4, "denoising steps of Stage II (default 4)", type=_STEPS)
    stage1_steps: int = _option(MODEL, 4, "denoising steps of Stage I (default 4)", type=_STEPS)
    shift: float = _option(MODEL, 5.0, "timestep shift of both stages (default 5)", type=number(*SHIFTS))

    blocks: int = _option(SEGMENTS, 3, "latent frames a segment (default 3)", type=positive, metavar="M")
    left: int = _option(SEGMENTS, 1, "neighbours before it (default 1)", type=not_negative, metavar="N")
    right: int = _option(SEGMENTS, 0, "neighbours after it (default 0)", type=not_negative, metavar="N")
    anchor: bool = _option(
        SEGMENTS, True, "an ablation: windows without the input image's block", "--no-anchor", action="store_false"
    )

    device: str = _option(MACHINE, "auto", "auto, cpu or cuda (default auto)")
    dtype: str = _option(MACHINE, "auto", "dtype of the DiTs", choices=("auto", "float32", "bfloat16", "float16"))
    vae_memory: str = _option(
        MACHINE, "auto", "what the VAE may take, such as 4GB, in exact tiles (default: what there is)", metavar="SIZE"
    )
    cuda_graph: bool = _option(
        MACHINE, True, "launch every step anew, not as a CUDA graph", "--no-cuda-graph", action="store_false"
    )

    vram: str = _option(MEMORY, "auto", "memory of the card, such as 12GB (default auto: all of it)", metavar="SIZE")
    ram: str = _option(MEMORY, "auto", "memory of the machine; none: no limit (default auto: all)", metavar="SIZE")
    quantize: str = _option(MEMORY, "auto", _QUANTIZE, choices=("auto", *QUANTIZE))
    matmul: str = _option(MEMORY, "plain", "in --dtype, or 8bit, which changes numbers (default plain)", choices=MATMUL)

    stage1_loras: Sequence[str] = _loras("stage1", "--stage1-lora")
    stage1_low_noise_loras: Sequence[str] = _loras("stage1_low_noise", "--stage1-low-noise-lora")
    stage2_loras: Sequence[str] = _loras("stage2", "--stage2-lora")
    strict_loras: bool = _option(LORAS, False, _STRICT, action="store_true")

    resume: Path | None = _option(RUNS, None, "go on with the run in DIR", type=parse_path, metavar="DIR")
    state: Path | None = _option(RUNS, None, "default: FILE.run beside FILE.mp4", type=parse_path, metavar="DIR")
    keep_state: bool = _option(RUNS, False, "leave the folder when the video is complete", action="store_true")
    restart: bool = _option(RUNS, False, "begin anew where the folder holds an unfinished run", action="store_true")


OPTIONS = {one.name: one for one in fields(Settings)}


def flag_of(name: str) -> str:
    """Returns how a field of :class:`Settings` is called as an option."""
    return f"--{name.replace('_', '-')}"


def add_option(parser: argparse._ActionsContainer, name: str, **default: Any) -> None:
    """Adds the option of one field of :class:`Settings`, with another ``default`` if one is given."""
    one = OPTIONS[name]
    # argparse appends to lists alone.
    start = [] if one.default == () else one.default
    flag, how = one.metadata["flag"] or flag_of(name), {"default": start, **one.metadata["how"], **default}
    parser.add_argument(flag, **({"dest": name} if flag.startswith("-") else {}), **how)


def add_options(parser: argparse.ArgumentParser, *groups: str | None, without: str | None = None) -> None:
    """Adds the options of groups, each under its title, or those of no group (None); one field may be left out."""
    for title in groups:
        group = parser if title is None else parser.add_argument_group(title, _ABOUT.get(title))
        for name, one in OPTIONS.items():
            if one.metadata["group"] == title and name != without:
                add_option(group, name)


def parse_ram(text: str) -> int | None:
    """Returns the bytes of ``--ram``: ``auto`` is :func:`machine_memory`, ``none`` no limit.

    Raises:
        InputError: another form.
    """
    return None if text == "none" else machine_memory() if text == "auto" else parse_bytes("ram", text)


def segment_plan(given: Settings, num_blocks: int) -> SegmentPlan:
    """Returns the plan that the segment options ask for.

    Raises:
        InputError: there is no such plan.
    """
    return plan_segments(num_blocks, given.blocks, given.left, given.right, given.anchor)


def parse_lora(text: str, expert: int = 1, strict: bool = False) -> LoRA:
    """Parses ``"few_step.safetensors:0.8"`` as ``LoRA("few_step.safetensors", 0.8)``; the default strength is 1.

    Raises:
        InputError: the text after the colon is no finite number.
    """
    path, colon, strength = text.rpartition(":")
    if not colon or os.path.exists(text):
        path, strength = text, "1"
    try:
        file = parse_path(path)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"lora: {error}") from error
    try:
        return LoRA(file, number(-MOST_STRENGTH, MOST_STRENGTH)(strength), expert, strict)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise InputError(f"lora: expected FILE or FILE:STRENGTH, a finite number, got {text!r}") from error


def chosen_loras(given: Settings) -> dict[str, list[LoRA]]:
    """Returns the LoRAs of the options, by part of the weights.

    Raises:
        InputError: one is not understood, or there are no ``--weights`` that it could go to.
    """
    chosen = {
        part: [
            parse_lora(text, 2 if part == "stage1_low_noise" else 1, given.strict_loras)
            for text in getattr(given, f"{part}_loras")
        ]
        for part in LORA_PARTS
    }
    if given.weights is None and any(chosen.values()):
        raise InputError("lora: expected --weights too, since random weights are nothing that a LoRA was made for")
    return chosen


def build_components(
    given: Settings, device: torch.device, dtype: torch.dtype, loras: Mapping[str, Sequence[LoRA]] | None = None
) -> Components:
    """Returns the models of ``--weights``, with ``loras`` by part, or random ones of ``--preset`` (default tiny)."""
    if given.weights is not None:
        return Components.from_directory(given.weights, dtype, device, loras)
    return Components.from_preset(given.preset or "tiny", given.seed, dtype, device)
