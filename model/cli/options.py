"""Shared parts of the commands: options, their parsing, and one line instead of a traceback for bad input."""

from __future__ import annotations

import _thread
import argparse
import errno
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from model.config import PRESETS
from model.csg.sampler import SegmentPlan, plan_segments
from model.errors import InputError, NoMemoryError, printable
from model.machine.host import machine_memory
from model.machine.measure import is_out_of_memory, parse_bytes
from model.pipeline.components import Components
from model.streaming.placement import MATMUL, QUANTIZE
from model.weights.lora import LoRA
from swifti2v_kernels import default_backend

LORA_OPTIONS = {"stage1-lora": "stage1", "stage1-low-noise-lora": "stage1_low_noise", "stage2-lora": "stage2"}


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like those of the commands themselves."""

    def error(self, message: str) -> NoReturn:
        """Prints the message without the usage and exits with 2."""
        self.exit(2, printable(f"error: {message} (see {self.prog} --help)\n"))


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
        with no_interruption_lost():
            command()
    except InputError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
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


#: Error numbers of a disk that is full, or that must not be written to.
_DISK_IS_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)


def parse_size(text: str) -> tuple[int, int]:
    """Parses ``"2560x1408"`` as ``(2560, 1408)``.

    Raises:
        InputError: another form.
    """
    match = re.fullmatch(r"(\d+)[xX*](\d+)", text.strip())
    if match is None:
        raise InputError(f"size: expected WIDTHxHEIGHT such as 2560x1408, got {text!r}")
    return int(match[1]), int(match[2])


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


def positive(text: str) -> int:
    """Parses an integer of at least 1 (an argparse type)."""
    return _integer(text, 1)


def not_negative(text: str) -> int:
    """Parses an integer of at least 0 (an argparse type)."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
    return value


def add_model_options(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Adds the options that ``model.generate`` and the benchmarks share, ``--device`` among them if ``device`` is."""
    group = parser.add_argument_group("model")
    group.add_argument("--preset", help=f"one of {', '.join(PRESETS)}; see below")
    group.add_argument("--weights", type=Path, metavar="DIR", help="checkpoints; without them the weights are random")
    group.add_argument(
        "--seed", type=not_negative, default=0, help="seed of the noise and of random weights (default 0)"
    )
    group.add_argument("--steps", type=positive, default=4, help="denoising steps of Stage II (default 4)")
    group.add_argument("--stage1-steps", type=positive, default=4, help="denoising steps of Stage I (default 4)")
    group.add_argument("--shift", type=float, default=5.0, help="timestep shift of both stages (default 5)")
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


def parse_lora(text: str, expert: int = 1) -> LoRA:
    """Parses ``"few_step.safetensors:0.8"`` as ``LoRA("few_step.safetensors", 0.8)``; the default strength is 1.

    Raises:
        InputError: the text after the colon is no finite number.
    """
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return LoRA(Path(text), expert=expert)
    try:
        return LoRA(Path(path), float(strength), expert)
    except ValueError as error:
        raise InputError(f"lora: expected FILE or FILE:STRENGTH, a finite number, got {text!r}") from error


def chosen_loras(args: argparse.Namespace) -> dict[str, list[LoRA]]:
    """Returns the LoRAs of the options, by part of the weights.

    Raises:
        InputError: one is not understood, or there are no ``--weights`` that it could go to.
    """
    chosen = {
        part: [parse_lora(text, 2 if part == "stage1_low_noise" else 1) for text in getattr(args, f"{part}_loras")]
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
