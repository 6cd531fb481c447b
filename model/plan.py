"""``python -m model.plan --vram 12GB``: what a clip takes of a card and how long it takes, before anything runs.

Everything comes from shapes; no GPU is needed and no weights are read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.cli.options import GROUPS, OPTIONS, RUNS, CommandParser, Settings, add_options, count, run_command
from model.cli.request import ClipSettings
from model.config import get_preset
from model.csg.sampler import MODES
from model.errors import InputError
from model.machine.cards import CARDS, chosen_gpu, device_options
from model.machine.measure import format_bytes, parse_bytes
from model.memory.dit_bytes import StageChoice
from model.memory.plan import plan_memory
from model.memory.report import NOT_PREDICTED, MemoryPlan
from model.memory.request import MemoryRequest
from model.sizes import MOST_FRAMES

DEFAULT_PRESET = "14b-1.3b"
#: Sizes in --vram at most, each of which is planned for.
MOST_LIMITS = 32

EXAMPLES = """\
examples:
  python -m model.plan --vram 12GB
      a Stage I of 14B and a Stage II of 1.3B on a card of 12 GB: where weights are, tiles, predicted peak and time
  python -m model.plan --vram 8GB,12GB,16GB,24GB --ram 32GB
      one row a card
  python -m model.plan --vram 24GB --gpu "RTX 4090" --quantize float8
      with layer weights in 8 bits
  python -m model.plan --weights DIR --size 1280x704 --frames 121 --json
      checkpoints, of which only headers are read, on this machine's GPU

Peaks and seconds are predicted. A plan takes 88 % of a card's and 90 % of a machine's memory; layers of checkpoints can
also be read from files in every pass, those of random weights cannot (--from-files plans a preset as if they could).
"""


def vram_limits(text: str | None) -> list[int]:
    """Parses ``--vram``, sizes with commas between, as bytes; ``auto`` or None is the memory of the CUDA device.

    Raises:
        InputError: a size has another form, or there is no CUDA device to ask.
    """
    found = []
    parts = ("auto" if text is None else text).split(",")
    if len(parts) > MOST_LIMITS:
        raise InputError(f"vram: expected at most {MOST_LIMITS} sizes, got {len(parts)}")
    for part in parts:
        if part.strip() != "auto":
            found.append(parse_bytes("vram", part.strip()))
            continue
        if not torch.cuda.is_available():
            raise InputError(
                "vram: expected sizes such as 12GB or 8GB,24GB, since torch sees no GPU whose memory it is"
            )
        found.append(device_options(torch.device("cuda"))["vram"])
    return list(dict.fromkeys(found))


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of ``python -m model.plan``."""
    parser = CommandParser(
        prog="python -m model.plan",
        description="Plans a clip's memory: where weights are and in what form, tiles, peak and time. Needs no GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", metavar="WxH", help="pixels (default: the preset's)")
    parser.add_argument("--frames", type=count(1, MOST_FRAMES), help="1 + 4n (default 81)")
    parser.add_argument(
        "--mode", default="bidirectional", choices=MODES, help="how Stage II runs (default bidirectional)"
    )
    parser.add_argument(
        "--gpu",
        help=f"the card to predict seconds and to plan kernels for: one of {', '.join(CARDS)} (default: by the memory)",
    )
    parser.add_argument("--no-text-encoder", dest="text_encoder", action="store_false", help="embeddings are given")
    parser.add_argument("--from-files", action="store_true", help="plan a preset as if its weights were checkpoints")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON; of several limits a list")
    add_options(parser, *(group for group in GROUPS if group != RUNS), without="device")
    parser.set_defaults(vram=None)
    return parser


@dataclass(frozen=True)
class PlanSettings(Settings):
    """The options of ``model.plan``; without checkpoints and ``--preset`` the preset is :data:`DEFAULT_PRESET`."""

    gpu: str | None = None
    text_encoder: bool = True
    from_files: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        if self.weights is None and self.preset is None:
            object.__setattr__(self, "preset", DEFAULT_PRESET)


def parse(argv: list[str] | None = None) -> PlanSettings:
    """Returns what a command line asks for; as argparse does, one that it does not understand ends the process."""
    return PlanSettings(**vars(build_parser().parse_args(argv)))


def planner(args: PlanSettings) -> Callable[[int], MemoryRequest]:
    """Returns a function from the bytes of a card to the memory request of the options.

    Raises:
        InputError: an option does not fit.
    """
    chosen_gpu(args.gpu, 0)  # an unknown name is told before weights are opened
    preset = get_preset("1.3b" if args.preset is None else args.preset)
    given = {name: getattr(args, name) for name in OPTIONS} | {"device": "cpu", "vram": "auto"}
    given["size"] = f"{preset.width}x{preset.height}" if args.size is None else args.size
    given["dtype"] = "bfloat16" if args.dtype == "auto" else args.dtype
    clip = ClipSettings(**given)
    text = args.text_encoder and (clip.weights is None or clip.components.text_encoder is not None)
    sources = {"text_encoder": text, "from_files": True if args.from_files else None}

    def request(vram: int) -> MemoryRequest:
        gpu = chosen_gpu(args.gpu, vram)
        return clip.memory(gpu=gpu, capability=gpu.capability, vram=vram, **sources)

    return request


def run(args: PlanSettings) -> None:
    """Runs the command.

    Raises:
        InputError: an option does not fit.
    """
    limits = vram_limits(args.vram)
    request = planner(args)
    if len(limits) == 1:
        plan = plan_memory(request(limits[0]))
        print(json.dumps(plan.to_json(), indent=2) if args.json else plan)
        return
    found = [_planned(request(limit)) for limit in limits]
    if args.json:
        told = [
            {"vram_bytes": limit, "refused": entry} if isinstance(entry, str) else entry.to_json()
            for limit, entry in zip(limits, found, strict=True)
        ]
        print(json.dumps(told, indent=2))
        return
    print("\n".join(table(limits, found)))


def _planned(request: MemoryRequest) -> MemoryPlan | str:
    """Returns the plan, or why there is none."""
    try:
        return plan_memory(request)
    except InputError as error:
        return str(error).splitlines()[0]


def table(limits: list[int], found: list[MemoryPlan | str]) -> list[str]:
    """Returns the lines of a table with a row for every limit.

    Args:
        limits: bytes of the cards.
        found: the plan of each, or why there is none.
    """
    rows = [
        ("card", "seconds for", "Stage I", "Stage II", "reference", "decode", "peak", "host", "seconds", "peak is in")
    ]
    for limit, plan in zip(limits, found, strict=True):
        if isinstance(plan, MemoryPlan):
            decided = [layers_told(plan, name) for name in ("stage_one", "stage_two")]
            decided += [tiles_told(plan, place) for place in ("reference", "decode")]
            peaks = [format_bytes(plan.peak), format_bytes(plan.host_peak), f"{plan.seconds:.0f}", plan.limiting.name]
            rows.append((format_bytes(limit), plan.request.gpu.name, *decided, *peaks))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = iter("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    told = [next(lines)]
    for limit, plan in zip(limits, found, strict=True):
        told.append(next(lines) if isinstance(plan, MemoryPlan) else f"{format_bytes(limit)}  {plan}")
    return [
        *told,
        "Layers: on the device + from pinned host memory + from files. Tiles: rows x columns, * where states wait in"
        " host memory.",
        f"All peaks and seconds are predicted; seconds for the named card, {NOT_PREDICTED}.",
    ]


def layers_told(plan: MemoryPlan, name: str) -> str:
    """Returns ``24+16 in 16 bits``: layers on the device, from pinned host memory and from files, and their form."""
    stage: StageChoice = getattr(plan, name)
    counts = "+".join(map(str, stage.layers.values()))
    forms = {"none": f"in {8 * plan.request.dtype.itemsize} bits", "file": "as in the file"}
    form = forms.get(stage.placement.quantize, f"in {stage.placement.quantize}")
    return f"{counts.removesuffix('+0+0').removesuffix('+0')} {form}"


def tiles_told(plan: MemoryPlan, place: str) -> str:
    """Returns ``2x2* float32``: rows x columns of a place's VAE tiles, * where states wait in host memory, dtype."""
    planned = getattr(plan.vae_plans, place)
    return f"{planned.plan.rows}x{planned.plan.columns}{'*' * planned.plan.park} {planned.request.dtype_name}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parse(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
