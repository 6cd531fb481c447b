"""Shared parts of the commands: options, their parsing, and one line instead of a traceback for bad input."""

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
from pathlib import Path
from typing import Any, NoReturn

import torch

from model.cli.interruption import work_interruptible
from model.config import PRESETS
from model.csg.sampler import SegmentPlan, plan_segments
from model.csg.schedule import MOST_STEPS, SHIFTS
from model.errors import InputError, NoMemoryError, printable
from model.machine.host import machine_memory
from model.machine.measure import is_out_of_memory, parse_bytes
from model.pipeline.components import Components
from model.sizes import check_pixels
from model.streaming.placement import MATMUL, QUANTIZE
from model.weights.lora import LoRA
from swifti2v_kernels import default_backend

#: Bytes of a file's name and of a path at most, some less than systems take (4096): names are appended to folders.
_NAME_MAX, _PATH_MAX = 255, 3800
#: Random weights of three models take this seed and the next two, and torch one below 2**64.
MOST_SEED = 2**64 - 3
#: Strength of a LoRA at most, either way: float32 holds no more.
MOST_STRENGTH = 3.4e38
LORA_OPTIONS = {"stage1-lora": "stage1", "stage1-low-noise-lora": "stage1_low_noise", "stage2-lora": "stage2"}


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like those of the commands themselves."""

    def error(self, message: str) -> NoReturn:
        """Prints the message without the usage and exits with 2."""
        self.exit(2, f"{_told(f'error: {message}')} (see {self.prog} --help)\n")


def _told(message: str) -> str:
    """Returns a message as it is printed, without the middle of one that is very long: it may cite what was given."""
    text = printable(message)
    return text if len(text) <= _MOST_TOLD else f"{text[: _MOST_TOLD // 2]} ... {text[-_MOST_TOLD // 2 :]}"


def run_command(command: Callable[[], None]) -> int:
    """Runs a command's body and returns its exit code: 0, 2 for bad input, 1 for lack of memory or of room on the disk,
    130 if interrupted.

    Any other exception is a defect of this project or of the machine and keeps its traceback.
    """
    try:
        default_backend()
    except ValueError as error:  # a word that names no backend
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        with work_interruptible(), no_interruption_lost(), warnings_in_lines():
            command()
    except InputError as error:
        print(_told(f"error: {error}"), file=sys.stderr)
        return 2
    except NoMemoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory; try a smaller --size or fewer --frames ({error})", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has gone. Nothing more can be said, also not when Python flushes it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        print(f"error: disk: {error.strerror}: {error.filename or 'a file'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


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

    A finalizer and a weak reference's callback have no caller to raise to: Python prints what they raise and goes on,
    and a run that was told to stop would not.
    """
    before, timers = sys.unraisablehook, []

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            before(unraisable)
            return
        # It is raised later and from another thread: here and now it would meet the hook, which has no caller either.
        timers.append(threading.Timer(0.02, _thread.interrupt_main))
        timers[-1].daemon = True
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


#: Characters of a message at most.
_MOST_TOLD = 4000
#: Error numbers of a disk that is full, or that must not be written to.
_DISK_IS_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)


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
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch sees no GPU")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype called ``name``; ``"auto"`` is bfloat16 on CUDA, float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


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
        problem = "expected a name"
    elif re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text):
        problem = "expected a name in UTF-8 without control characters"
    elif max(len(part.encode()) for part in text.split(os.sep)) > _NAME_MAX:
        problem = f"expected names of at most {_NAME_MAX} bytes"
    elif len(os.path.abspath(text).encode()) > _PATH_MAX:
        problem = f"expected a path of at most {_PATH_MAX} bytes"
    else:
        try:
            os.stat(text)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            problem = f"expected a name that can be looked up ({error.strerror})"
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{problem}, got {text!r}")
    return Path(text)


def parse_file(text: str) -> Path:
    """Parses the name of a file (an argparse type), which need not be there, and is not that of a folder."""
    if text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"expected the name of a file, got {text!r}")
    return parse_path(text)


def add_model_options(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Adds the options that ``model.generate`` and the benchmarks share, ``--device`` among them if ``device`` is."""
    steps = count(1, MOST_STEPS)
    group = parser.add_argument_group("model")
    group.add_argument("--preset", help=f"one of {', '.join(PRESETS)}; see below")
    group.add_argument(
        "--weights", type=parse_path, metavar="DIR", help="checkpoints; without them the weights are random"
    )
    group.add_argument(
        "--seed", type=count(0, MOST_SEED), default=0, help="seed of the noise and of random weights (default 0)"
    )
    group.add_argument("--steps", type=steps, default=4, help="denoising steps of Stage II (default 4)")
    group.add_argument("--stage1-steps", type=steps, default=4, help="denoising steps of Stage I (default 4)")
    group.add_argument("--shift", type=number(*SHIFTS), default=5.0, help="timestep shift of both stages (default 5)")
    group = parser.add_argument_group("segments")
    group.add_argument("--blocks", type=positive, default=3, metavar="M", help="latent frames a segment (default 3)")
    group.add_argument("--left", type=not_negative, default=1, metavar="N", help="neighbours before it (default 1)")
    group.add_argument("--right", type=not_negative, default=0, metavar="N", help="neighbours after it (default 0)")
    group.add_argument(
        "--no-anchor", dest="anchor", action="store_false", help="an ablation: windows without the input image's block"
    )
    group = parser.add_argument_group("machine")
    if device:
        group.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="dtype of the DiTs"
    )
    group.add_argument(
        "--vae-memory",
        metavar="SIZE",
        default="auto",
        help="what the VAE may take, such as 4GB: it then works in exact tiles (default: what the card leaves)",
    )
    group.add_argument(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_false",
        help="launch every step anew instead of replaying it as a CUDA graph (which has no effect on a CPU)",
    )


def add_memory_options(parser: argparse.ArgumentParser, vram: str | None = "auto") -> None:
    """Adds the options of the memory planner (``model/memory/plan.py``); ``vram`` is the default of ``--vram``."""
    group = parser.add_argument_group(
        "memory", "weights, tiles and formats are chosen so that a run fits; python -m model.plan shows how"
    )
    group.add_argument(
        "--vram",
        metavar="SIZE",
        default=vram,
        help="memory of the card, such as 12GB; auto: what the GPU has (default auto)",
    )
    group.add_argument(
        "--ram",
        metavar="SIZE",
        default="auto",
        help="memory of the machine; none: no limit (default auto: what there is)",
    )
    group.add_argument(
        "--quantize",
        choices=("auto", *QUANTIZE),
        default="auto",
        help="form of layer weights: none: in --dtype; file: 8 bits where the file has them so; float8 or int8, which"
        " change numbers (default auto: none or file)",
    )
    group.add_argument(
        "--matmul",
        choices=MATMUL,
        default="plain",
        help="how layer weights are multiplied: plain: in --dtype; 8bit, which changes numbers (default plain)",
    )


def parse_ram(text: str) -> int | None:
    """Returns the bytes of ``--ram``: ``auto`` is :func:`machine_memory`, ``none`` no limit.

    Raises:
        InputError: another form.
    """
    if text == "none":
        return None
    return machine_memory() if text == "auto" else parse_bytes("ram", text)


def memory_limits(args: argparse.Namespace) -> dict[str, int | None]:
    """Returns the bytes of ``--ram`` and ``--vae-memory`` as :class:`~model.memory.request.MemoryRequest` takes them.

    Raises:
        InputError: one is no size.
    """
    vae = None if args.vae_memory == "auto" else parse_bytes("vae-memory", args.vae_memory)
    return {"ram": parse_ram(args.ram), "vae_limit": vae}


def segment_plan(args: argparse.Namespace, num_blocks: int) -> SegmentPlan:
    """Returns the plan that the segment options ask for.

    Raises:
        InputError: there is no such plan.
    """
    return plan_segments(num_blocks, args.blocks, args.left, args.right, args.anchor)


def add_lora_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name LoRAs, which may be repeated."""
    group = parser.add_argument_group(
        "LoRAs", "FILE or FILE:STRENGTH (default 1), merged as the weights are read; each option may be repeated"
    )
    for option, part in LORA_OPTIONS.items():
        group.add_argument(
            f"--{option}",
            dest=f"{part}_loras",
            action="append",
            default=[],
            metavar="FILE[:STRENGTH]",
            help=f"for {part} of --weights",
        )
    add_strict_option(group)


def add_strict_option(parser: argparse._ActionsContainer) -> None:
    """Adds ``--strict-loras``, with which a LoRA is merged whole or refused."""
    parser.add_argument(
        "--strict-loras",
        action="store_true",
        help="refuse a LoRA if any of its keys does not fit; else keys that the model has no place for are left out"
        " with a warning, as long as half of the file fits",
    )


def parse_lora(text: str, expert: int = 1, strict: bool = False) -> LoRA:
    """Parses ``"few_step.safetensors:0.8"`` as ``LoRA("few_step.safetensors", 0.8)``; the default strength is 1.

    Raises:
        InputError: the text after the colon is no finite number.
    """
    path, colon, strength = text.rpartition(":")
    whole = not colon or os.path.exists(text)
    try:
        file = parse_path(text if whole else path)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"lora: {error}") from error
    if whole:
        return LoRA(file, expert=expert, strict=strict)
    try:
        return LoRA(file, number(-MOST_STRENGTH, MOST_STRENGTH)(strength), expert, strict)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise InputError(f"lora: expected FILE or FILE:STRENGTH, a finite number, got {text!r}") from error


def chosen_loras(args: argparse.Namespace) -> dict[str, list[LoRA]]:
    """Returns the LoRAs of the options, by part of the weights.

    Raises:
        InputError: one is not understood, or there are no ``--weights`` that it could go to.
    """
    chosen = {
        part: [
            parse_lora(text, 2 if part == "stage1_low_noise" else 1, args.strict_loras)
            for text in getattr(args, f"{part}_loras")
        ]
        for part in LORA_OPTIONS.values()
    }
    if args.weights is None and any(chosen.values()):
        raise InputError("lora: expected --weights too, since random weights are nothing that a LoRA was made for")
    return chosen


def build_components(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    loras: Mapping[str, Sequence[LoRA]] | None = None,
) -> Components:
    """Returns the models of ``--weights``, with ``loras`` by part, or random ones of ``--preset`` (default tiny)."""
    if args.weights is not None:
        return Components.from_directory(args.weights, dtype, device, loras)
    return Components.from_preset(args.preset or "tiny", args.seed, dtype, device)
