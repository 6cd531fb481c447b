"""``python -m model.plan --vram 12GB``: what a clip takes of a card and how long it takes, before anything runs.

Everything comes from shapes; no GPU is needed and no weights are read.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import torch

from model.cli.options import CLIP, GROUPS, OPTIONS, RUNS, CommandParser, Settings, add_option, add_options, run_command
from model.cli.request import ClipSettings
from model.config import get_preset
from model.errors import InputError
from model.machine.cards import CARDS, chosen_gpu, device_options
from model.machine.measure import parse_bytes
from model.memory.plan import plan_memory
from model.memory.request import MemoryRequest

DEFAULT_PRESET = "14b-1.3b"
EXAMPLES = """\
examples:
  python -m model.plan --vram 12GB
      a Stage I of 14B and a Stage II of 1.3B on a card of 12 GB: where weights are, tiles, predicted peak and time
  python -m model.plan --vram 24GB --gpu "RTX 4090" --quantize float8
      with layer weights in 8 bits
  python -m model.plan --weights DIR --size 1280x704 --frames 121 --json
      checkpoints, of which only headers are read, on this machine's GPU

Peaks and seconds are predicted. A plan takes 88 % of a card's and 90 % of a machine's memory; layers of checkpoints can
also be read from files in every pass, those of random weights cannot (--from-files plans a preset as if they could).
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of ``python -m model.plan``."""
    parser = CommandParser(
        prog="python -m model.plan",
        description="Plans a clip's memory: where weights are and in what form, tiles, peak and time. Needs no GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_option(parser, "size", help="pixels (default: the preset's)")
    add_option(parser, "frames")
    add_option(parser, "mode")
    parser.add_argument(
        "--gpu",
        help=f"the card to predict seconds and to plan kernels for: one of {', '.join(CARDS)} (default: by the memory)",
    )
    parser.add_argument("--no-text-encoder", dest="text_encoder", action="store_false", help="embeddings are given")
    parser.add_argument("--from-files", action="store_true", help="plan a preset as if its weights were checkpoints")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    add_options(parser, *(group for group in GROUPS if group not in (CLIP, RUNS)))
    return parser


@dataclass(frozen=True)
class PlanSettings(Settings):
    """The options of ``model.plan``."""

    gpu: str | None = None
    text_encoder: bool = True
    from_files: bool = False
    json: bool = False


def request_of(given: PlanSettings) -> MemoryRequest:
    """Returns the memory request of the options; ``--vram auto`` is the memory of the CUDA device.

    Raises:
        InputError: an option does not fit, or there is no CUDA device to ask.
    """
    if given.vram != "auto":
        vram = parse_bytes("vram", given.vram)
    elif torch.cuda.is_available():
        vram = device_options(torch.device("cuda"))["vram"]
    else:
        raise InputError("vram: expected a size such as 12GB, since torch sees no GPU whose memory it is")
    gpu = chosen_gpu(given.gpu, vram)  # an unknown name is told before weights are opened
    default = DEFAULT_PRESET if given.weights is None else "1.3b"
    preset = default if given.preset is None else given.preset
    dtype = "bfloat16" if given.dtype == "auto" else given.dtype
    options = {name: getattr(given, name) for name in OPTIONS} | {"device": "cpu", "preset": preset, "dtype": dtype}
    area = get_preset(preset)
    clip = ClipSettings(**options, photo_size=(area.width, area.height))
    return clip.memory(
        gpu=gpu,
        capability=gpu.capability,
        vram=vram,
        text_encoder=given.text_encoder and (clip.weights is None or clip.components.text_encoder is not None),
        from_files=given.from_files or clip.weights is not None,
    )


def run(given: PlanSettings) -> None:
    """Runs the command.

    Raises:
        InputError: an option does not fit.
    """
    plan = plan_memory(request_of(given))
    print(json.dumps(plan.to_json(), indent=2) if given.json else plan)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    given = PlanSettings(**vars(build_parser().parse_args(argv)))
    return run_command(lambda: run(given))


if __name__ == "__main__":
    raise SystemExit(main())
