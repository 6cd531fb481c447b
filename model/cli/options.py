"""Shared parts of the commands: options, their parsing, and one line instead of a traceback for bad input."""

# ruff: noqa: RUF009 (the fields of Settings are dataclasses.field, by way of _option)
from __future__ import annotations

import argparse
import errno
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from model.config import PRESETS
from model.csg.sampler import MODES
from model.csg.schedule import MOST_STEPS, SHIFTS
from model.errors import InputError, NoMemoryError, one_line, printable
from model.machine.measure import full_memory
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
        with warnings_in_lines():
            code = command() or 0
            sys.stdout.flush()  # here, where an interruption and a reader that is gone are handled
            return code
    except InputError as error:
        code, told = 2, f"error: {error}"
    except NoMemoryError as error:
        told = f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        if full_memory(error) is None:
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
    """Returns a parser (an argparse type) of integers from ``least`` to ``most``."""
    return functools.partial(_parsed, int, f"an integer from {least} to {most}", least, most)


def number(least: float, most: float) -> Callable[[str], float]:
    """Returns a parser (an argparse type) of decimal numbers from ``least`` to ``most``."""
    return functools.partial(_parsed, float, f"a number from {least:g} to {most:g}", least, most)


def _parsed(kind: type, wanted: str, least: float, most: float, text: str) -> Any:
    try:
        value = kind(text)
        # Python also reads 1_000 and other scripts' digits; NaN is in no range.
        fits = text.isascii() and "_" not in text and least <= value <= most
    except ValueError:
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return value


positive, not_negative = count(1), count(0)


def parse_path(text: str) -> Path:
    """Parses the name of a file or folder (an argparse type), which need not be there."""
    if not text.strip() or re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError(f"expected a name in UTF-8 without control characters, got {text!r}")
    names, path = text.split(os.sep), os.path.abspath(text)
    if max(len(name.encode()) for name in names) > _NAME_MAX or len(path.encode()) > _PATH_MAX:
        raise argparse.ArgumentTypeError(
            f"expected names of at most {_NAME_MAX} and a path of at most {_PATH_MAX} bytes, got {text!r}"
        )
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        expected = f"expected a name that can be looked up ({error.strerror})"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from error
    return Path(text)


def parse_prompt(text: str) -> str:
    """Parses a prompt (an argparse type): any text that can be written down."""
    if len(text) > MOST_PROMPT:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_PROMPT} characters, got {len(text)}")
    if re.search(r"[\0\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError(f"expected text in UTF-8 without zero bytes, got {text!r}")
    return text


def parse_lora(text: str) -> LoRA:
    """Parses ``few_step.safetensors:0.8`` (an argparse type), a file and its strength, which is 1 if it is left out."""
    path, colon, strength = text.rpartition(":")
    if not colon or os.path.exists(text):
        path, strength = text, "1"
    try:
        return LoRA(parse_path(path), number(-MOST_STRENGTH, MOST_STRENGTH)(strength))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected FILE or FILE:STRENGTH, got {text!r}: {error}") from error


#: Titles of the groups of options in the help; the options of the first are in no group there.
GROUPS = (None, "model", "segments", "machine", "memory", "LoRAs", "a run that goes on")
CLIP, MODEL, SEGMENTS, MACHINE, MEMORY, LORAS, RUNS = GROUPS
_ABOUT = {
    MEMORY: "weights, tiles and formats are chosen so that a run fits; python -m model.plan shows how",
    LORAS: "FILE or FILE:STRENGTH (default 1), merged as the weights are read; each option may be repeated",
    RUNS: "what is made is kept in a folder until the video is complete",
}
_STEPS = count(1, MOST_STEPS)
_QUANTIZE = """\
form of layer weights: none: in --dtype; file: 8 bits where the file has them so; float8 or int8, which change numbers
(default auto: none or file)"""


def _option(group: str | None, default: Any, help: str, **how: Any) -> Any:
    """Returns a field of :class:`Settings` with the option that sets it; ``how`` is what ``add_argument`` takes."""
    if isinstance(default, bool):
        how["action"] = argparse.BooleanOptionalAction
    return field(default=default, metadata={"group": group, "how": {**how, "help": help}})


def _loras(part: str) -> Any:
    about = f"for {part} of --weights"
    return _option(LORAS, (), about, action="append", type=parse_lora, metavar="FILE[:STRENGTH]")


@dataclass(frozen=True)
class Settings:
    """The options that a command was given: those of ``model.generate``, each with its parsing and its help.

    Other commands have some of these. A field that a command has no option for keeps its default.
    """

    photo: Path | None = _option(
        CLIP, None, "the first frame: any image that Pillow reads", metavar="PHOTO", nargs="?", type=parse_path
    )
    out: Path | None = _option(CLIP, None, "the video to write", type=parse_path, metavar="FILE.mp4")
    prompt: str = _option(CLIP, "", "what should happen; needs a text encoder in --weights", type=parse_prompt)
    text_embeddings: Path | None = _option(
        CLIP, None, "precomputed, one safetensors tensor [L, D]", type=parse_path, metavar="FILE"
    )
    size: str | None = _option(CLIP, None, "default: the preset's area in the photograph's aspect ratio", metavar="WxH")
    frames: int | None = _option(CLIP, None, "1 + 4n (default 81)", type=count(1, MOST_FRAMES))
    fps: int | None = _option(CLIP, None, "frames a second (default: the preset's)", type=count(1, MOST_FPS))
    mode: str = _option(CLIP, "bidirectional", "how Stage II runs (default bidirectional)", choices=MODES)
    device: str = _option(CLIP, "auto", "auto, cpu or cuda (default auto)")

    preset: str | None = _option(MODEL, None, f"one of {', '.join(PRESETS)}; see below")
    weights: Path | None = _option(MODEL, None, "checkpoints (default: random weights)", type=parse_path, metavar="DIR")
    seed: int = _option(MODEL, 0, "seed of the noise and of random weights (default 0)", type=count(0, MOST_SEED))
    steps: int = _option(MODEL, 4, "denoising steps of Stage II (default 4)", type=_STEPS)
    stage1_steps: int = _option(MODEL, 4, "denoising steps of Stage I (default 4)", type=_STEPS)
    shift: float = _option(MODEL, 5.0, "timestep shift of both stages (default 5)", type=number(*SHIFTS))

    blocks: int = _option(SEGMENTS, 3, "latent frames a segment (default 3)", type=positive, metavar="M")
    left: int = _option(SEGMENTS, 1, "neighbours before it (default 1)", type=not_negative, metavar="N")
    right: int = _option(SEGMENTS, 0, "neighbours after it (default 0)", type=not_negative, metavar="N")
    anchor: bool = _option(SEGMENTS, True, "the input image's block in every window; without it: an ablation")

    dtype: str = _option(MACHINE, "auto", "dtype of the DiTs", choices=("auto", "float32", "bfloat16", "float16"))
    vae_memory: str = _option(
        MACHINE, "auto", "what the VAE may take, such as 4GB, in exact tiles (default: what there is)", metavar="SIZE"
    )
    cuda_graph: bool = _option(MACHINE, True, "launch steps as CUDA graphs, else each anew")

    vram: str = _option(MEMORY, "auto", "memory of the card, such as 12GB (default auto: all of it)", metavar="SIZE")
    ram: str = _option(MEMORY, "auto", "memory of the machine; none: no limit (default auto: all)", metavar="SIZE")
    quantize: str = _option(MEMORY, "auto", _QUANTIZE, choices=("auto", *QUANTIZE))
    matmul: str = _option(MEMORY, "plain", "in --dtype, or 8bit, which changes numbers (default plain)", choices=MATMUL)

    stage1_lora: Sequence[LoRA] = _loras("stage1")
    stage1_low_noise_lora: Sequence[LoRA] = _loras("stage1_low_noise")
    stage2_lora: Sequence[LoRA] = _loras("stage2")

    resume: Path | None = _option(RUNS, None, "go on with the run in DIR", type=parse_path, metavar="DIR")
    state: Path | None = _option(RUNS, None, "default: FILE.run beside FILE.mp4", type=parse_path, metavar="DIR")
    keep_state: bool = _option(RUNS, False, "leave the folder when the video is complete")
    restart: bool = _option(RUNS, False, "begin anew where the folder holds an unfinished run")


OPTIONS = {one.name: one for one in fields(Settings)}
#: Options that a resumed run may be given anew: those that say how a machine does it, not what is made, and those that
#: say where things are. What these are is told by fingerprints, so that a run can go on elsewhere.
PATHS = ("photo", "out", "weights", "text_embeddings")
CHANGEABLE = (*PATHS, *(f"{part}_lora" for part in LORA_PARTS), "device", "vram", "ram", "vae_memory", "cuda_graph")
#: The options that a run is kept with: all but those about the state of a run.
STORED = [name for name, one in OPTIONS.items() if one.metadata["group"] != RUNS]


def flag_of(name: str) -> str:
    """Returns how a field of :class:`Settings` is called on a command line."""
    return name if name == "photo" else f"--{name.replace('_', '-')}"


def add_option(parser: argparse._ActionsContainer, name: str, **other: Any) -> None:
    """Adds the option of one field of :class:`Settings`; ``other`` is what ``add_argument`` is to take instead."""
    one = OPTIONS[name]
    # argparse appends to lists alone.
    default = [] if one.default == () else one.default
    parser.add_argument(flag_of(name), **{"default": default, **one.metadata["how"], **other})


def add_options(parser: argparse.ArgumentParser, *groups: str | None) -> None:
    """Adds the options of groups, each under its title."""
    for title in groups:
        group = parser if title is None else parser.add_argument_group(title, _ABOUT.get(title))
        for name, one in OPTIONS.items():
            if one.metadata["group"] == title:
                add_option(group, name)


def resumed(given: Settings, job: Mapping[str, Any]) -> Settings:
    """Returns what a stored job was asked for; of ``given`` it has what is about machine, places and the run's state.

    Args:
        given: the options that were given with ``--resume``.
        job: as ``ClipSettings.description`` returns it, but read from a file that anybody may have written.

    Raises:
        InputError: another option was given, which would be another run, or the job is none of this program.
    """
    new = {name: getattr(given, name) for name in STORED if getattr(given, name) not in (OPTIONS[name].default, [])}
    other = [flag_of(name) for name in new if name not in CHANGEABLE]
    if other:
        allowed = ", ".join(map(flag_of, CHANGEABLE))
        raise InputError(f"resume: the run has its options; got {', '.join(other)} too. New may be only {allowed}")
    if not isinstance(job.get("inputs", {}).get("photo"), str):
        raise InputError("resume: the stored run has no fingerprint of its photograph")
    parser = _StoredParser(add_help=False, allow_abbrev=False)
    add_options(parser, *(group for group in GROUPS if group != RUNS))
    stored = vars(parser.parse_args(_words(job.get("arguments", {}))))
    return replace(given, **stored | new)


class _StoredParser(CommandParser):
    """A parser of a stored run's options: what is wrong with them is an error of that run."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"resume: the stored run: {one_line(message)}")


def _words(stored: Mapping[str, Any]) -> list[str]:
    """Returns a stored job's options as the words of a command line, which its parser then checks."""
    words = []
    for name, value in stored.items():
        for one in value if isinstance(value, list) else [value]:
            if one is False and name not in OPTIONS:
                continue  # a switch of an earlier version, which was off
            if isinstance(one, bool):
                words.append(flag_of(name if one else f"no_{name}"))
            elif one is not None:
                words.append(f"{flag_of(name)}={one}" if name != "photo" else str(one))
    return words


def build_components(
    given: Settings, device: torch.device, dtype: torch.dtype, loras: Mapping[str, Sequence[LoRA]] | None = None
) -> Components:
    """Returns the models of ``--weights``, with ``loras`` by part, or random ones of ``--preset`` (default tiny)."""
    if given.weights is not None:
        return Components.from_directory(given.weights, dtype, device, loras)
    return Components.from_preset(given.preset or "tiny", given.seed, dtype, device)
