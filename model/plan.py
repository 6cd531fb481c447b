"""``python -m model.plan --vram 12GB``: what a clip takes of a card and how long it takes, before anything runs.

Everything comes from shapes; no GPU is needed and no weights are read.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.cli.options import (
    LORAS,
    MACHINE,
    MEMORY,
    MODEL,
    SEGMENTS,
    CommandParser,
    Settings,
    add_options,
    build_components,
    chosen_loras,
    count,
    memory_limits,
    parse_size,
    pick_dtype,
    positive,
    run_command,
    segment_plan,
)
from model.cli.request import request_for
from model.config import Preset, get_preset
from model.csg.sampler import MODES
from model.errors import InputError
from model.machine.measure import format_bytes, parse_bytes
from model.memory.cards import CARDS, chosen_gpu, get_gpu
from model.memory.plan import plan_memory
from model.memory.report import NOT_PREDICTED, SCHEMA_VERSION, MemoryPlan, StagePlan, vae_data
from model.memory.request import MemoryRequest
from model.memory.vae_places import Card
from model.memory.vae_plan import PARTS, PlannedVAE, plan_vae
from model.sizes import MOST_FRAMES, check_frames

DEFAULT_PRESET = "14b-1.3b"
#: Sizes in --vram at most, each of which is planned for.
MOST_LIMITS = 32
#: Whose kernels the VAE alone is planned for, unless a card is named.
DEFAULT_GPU = "H100"
#: The options that --vae takes.
VAE_OPTIONS = ("vae", "piece", "size", "frames", "preset", "weights", "dtype", "gpu", "vae_memory", "json")

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
  python -m model.plan --vae --size 2560x1408 --vae-memory 4GB
      the VAE alone: its tiles and peak within 4 GB, decode and encode, the whole clip handed over
  python -m model.plan --vae decode --preset 5b --size 1280x704 --vae-memory 6GB --gpu "RTX 5090" --piece 3
      Wan2.2's decoder alone, segment by segment as SwiftI2V streams

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
        card = Card.of(torch.device("cuda")) if torch.cuda.is_available() else None
        if card is None:
            raise InputError(
                "vram: expected sizes such as 12GB or 8GB,24GB, since torch sees no GPU whose memory it is"
            )
        found.append(card.memory)
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
        help="the card to predict seconds and to plan kernels for: one of"
        f" {', '.join(CARDS)} (default: by the memory; with --vae {DEFAULT_GPU})",
    )
    parser.add_argument("--no-text-encoder", dest="text_encoder", action="store_false", help="embeddings are given")
    parser.add_argument("--from-files", action="store_true", help="plan a preset as if its weights were checkpoints")
    parser.add_argument(
        "--vae",
        nargs="?",
        const="both",
        choices=(*PARTS, "both"),
        help="plan the VAE alone, within --vae-memory: decode, encode or both (default both)",
    )
    parser.add_argument(
        "--piece",
        type=positive,
        metavar="N",
        help="with --vae: latent frames that are handed over at once (default: all of the clip)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON; of several limits a list")
    add_options(parser, MEMORY, MODEL, SEGMENTS, MACHINE, LORAS, without="device")
    parser.set_defaults(vram=None)
    return parser


@dataclass(frozen=True)
class PlanSettings(Settings):
    """The options of ``model.plan``; without checkpoints and ``--preset`` the preset is :data:`DEFAULT_PRESET`."""

    gpu: str | None = None
    text_encoder: bool = True
    from_files: bool = False
    vae: str | None = None
    piece: int | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if self.weights is None and self.preset is None:
            object.__setattr__(self, "preset", DEFAULT_PRESET)

    @property
    def defaults(self) -> Preset:
        """The preset whose size and number of frames are taken where none are given."""
        return get_preset("1.3b" if self.preset is None else self.preset)


def parse(argv: list[str] | None = None) -> PlanSettings:
    """Returns what a command line asks for; as argparse does, one that it does not understand ends the process."""
    return PlanSettings(**vars(build_parser().parse_args(argv)))


def planner(args: PlanSettings) -> Callable[[int], MemoryRequest]:
    """Returns a function from the bytes of a card to the memory request of the options.

    Raises:
        InputError: an option does not fit.
    """
    defaults = args.defaults
    dtype = pick_dtype("bfloat16" if args.dtype == "auto" else args.dtype, torch.device("cpu"))
    limits = memory_limits(args)
    size = (defaults.width, defaults.height) if args.size is None else parse_size(args.size)
    if args.gpu is not None:
        get_gpu(args.gpu)
    components = build_components(args, torch.device("cpu"), dtype, chosen_loras(args))
    num_frames = defaults.num_frames if args.frames is None else args.frames
    blocks = check_frames(num_frames, components.vae_config.temporal_stride)
    text = args.text_encoder and (components.weights is None or (components.weights / "text_encoder").is_dir())
    options = {
        "mode": args.mode, "steps": args.steps, "stage_one_steps": args.stage1_steps, "dtype": dtype, **limits,
        "quantize": args.quantize, "matmul": args.matmul, "text_encoder": text,
        "from_files": True if args.from_files else None,
    }  # fmt: skip

    def request(vram: int) -> MemoryRequest:
        gpu = chosen_gpu(args.gpu, vram)
        clip = {"size": size, "num_frames": num_frames, "plan": segment_plan(args, blocks)}
        return request_for(components, **clip, gpu=gpu, capability=gpu.capability, vram=vram, **options)

    return request


def vae_plans(args: PlanSettings) -> dict[str, PlannedVAE]:
    """Plans the VAE alone, as ``--vae`` asks, and returns the plans by part.

    Raises:
        InputError: an option does not fit, or does not go with ``--vae``; or no plan fits.
    """
    # Options are named in the error as on the command line, where --no-text-encoder differs from the name of its value.
    options = {action.dest: action for action in build_parser()._actions}
    odd = [a for name, a in options.items() if name not in VAE_OPTIONS and getattr(args, name, a.default) != a.default]
    if odd:
        named = ", ".join(action.option_strings[-1] for action in odd)
        allowed = ", ".join(options[name].option_strings[-1] for name in VAE_OPTIONS[1:])
        raise InputError(f"vae: the VAE alone takes {allowed}; got {named} too")
    preset = args.defaults
    limit = memory_limits(args)["vae_limit"]
    capability = get_gpu(DEFAULT_GPU if args.gpu is None else args.gpu).capability
    width, height = (preset.width, preset.height) if args.size is None else parse_size(args.size)
    config = build_components(args, torch.device("cpu"), torch.float32, {}).vae_config
    frames, stride = preset.num_frames if args.frames is None else args.frames, config.temporal_stride
    if frames < 1 or (frames - 1) % stride:
        raise InputError(f"frames: expected 1 + {stride}n, got {frames}")
    blocks = 1 + (frames - 1) // stride
    piece = blocks if args.piece is None else args.piece
    if piece > blocks:
        raise InputError(f"piece: expected 1 to {blocks}, the clip's latent frames, got {piece}")
    chosen = {"limit": limit, "capability": capability, "piece": piece}
    found = {}
    for part in PARTS if args.vae == "both" else (args.vae,):
        # Decoding in 16 bits loses nothing that shows; the reference is encoded in float32
        # (model/memory/vae_places.py).
        own = "bfloat16" if part == "decode" else "float32"
        dtype = pick_dtype(own if args.dtype == "auto" else args.dtype, torch.device("cpu"))
        try:
            found[part] = plan_vae(config, part, width, height, dtype=dtype, **chosen)
        except InputError as error:
            raise InputError(re.sub("^limit:", "vae-memory:", str(error))) from error
    return found


def vae_json(plans: Mapping[str, PlannedVAE]) -> dict[str, Any]:
    """Returns plans of the VAE alone as plain data: the request, and by part the decision."""
    one = next(iter(plans.values()))
    return {
        "schema": SCHEMA_VERSION,
        "basis": "predicted",
        "width": one.request.width,
        "height": one.request.height,
        "piece": one.request.piece,
        "capability": one.request.capability,
        "limit_bytes": one.limit,
        "vae": {part: vae_data(planned) for part, planned in plans.items()},
    }


def run(args: PlanSettings) -> None:
    """Runs the command.

    Raises:
        InputError: an option does not fit.
    """
    if args.vae is not None:
        plans = vae_plans(args)
        print(json.dumps(vae_json(plans), indent=2) if args.json else "\n".join(map(str, plans.values())))
        return
    if args.piece is not None:
        raise InputError("piece: goes with --vae")
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
    stage: StagePlan = getattr(plan, name)
    homes = stage.placement.homes(stage.config.num_layers)
    counts = "+".join(str(homes.count(home)) for home in ("device", "host", "file"))
    forms = {"none": f"in {8 * plan.request.dtype.itemsize} bits", "file": "as in the file"}
    form = forms.get(stage.placement.quantize, f"in {stage.placement.quantize}")
    return f"{counts.removesuffix('+0+0').removesuffix('+0')} {form}"


def tiles_told(plan: MemoryPlan, place: str) -> str:
    """Returns ``2x2* float32``: rows x columns of a place's VAE tiles, * where states wait in host memory, dtype."""
    planned = getattr(plan.vae_plans, place)
    dtype = str(planned.request.dtype).removeprefix("torch.")
    return f"{planned.plan.rows}x{planned.plan.columns}{'*' * planned.plan.park} {dtype}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parse(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
