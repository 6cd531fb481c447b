"""``python -m model.plan --vram 12GB``: what a clip takes of a card and how long it takes, before anything runs.

Everything comes from shapes; no GPU is needed and no weights are read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from model.command import (
    CommandParser,
    add_lora_options,
    add_memory_options,
    add_model_options,
    build_components,
    chosen_loras,
    parse_ram,
    parse_size,
    pick_dtype,
    run_command,
    segment_plan,
)
from model.components import Components
from model.config import get_preset
from model.cost.gpus import GPU, GPUS, get_gpu
from model.csg import MODES, SegmentPlan
from model.errors import InputError
from model.measure import parse_bytes
from model.memory_plan import plan_memory
from model.memory_report import NOT_PREDICTED, MemoryPlan, StagePlan, gigabytes
from model.memory_request import DiTRequest, MemoryRequest
from model.pipeline import check_frames, check_size, size_multiple, stage_one_size
from model.pipeline_plan import Card
from model.placement import NO_TENSORS
from model.weight_files import open_weights

DEFAULT_PRESET = "14b-1.3b"
#: UMT5-XXL's encoder: 5.68 billion parameters in bfloat16.
TEXT_ENCODER_BYTES = 11_360_000_000
#: Cards by the most GiB that they have; larger ones are an H200.
CLASSES = ((8, "RTX 4060"), (12, "RTX 4070"), (16, "RTX 4080"), (24, "RTX 4090"), (32, "RTX 5090"), (80, "H100"))

EXAMPLES = """\
examples:
  python -m model.plan --vram 12GB
      a Stage I of 14B and a Stage II of 1.3B on a card of 12 GB: where weights are, tiles, predicted peak and time
  python -m model.plan --vram 8GB,12GB,16GB,24GB --ram 32GB
      one row a card
  python -m model.plan --vram 24GB --gpu "RTX 4090" --storage float8
      with block weights in 8 bits
  python -m model.plan --weights DIR --size 1280x704 --frames 121 --json
      checkpoints, of which only headers are read, on this machine's GPU

Peaks and seconds are predicted. A plan takes 88 % of a card's and 90 % of a machine's memory; blocks of checkpoints can
also be read from files in every pass, those of random weights cannot (--from-files plans a preset as if they could).
"""


def request_for(
    components: Components,
    *,
    size: tuple[int, int],
    num_frames: int,
    plan: SegmentPlan,
    gpu: GPU,
    from_files: bool | None = None,
    text_encoder: bool = False,
    **options: Any,
) -> MemoryRequest:
    """The request for the models of a command.

    Args:
        components: the models.
        size: (width, height) of the clip.
        num_frames, plan, gpu: as for :class:`~model.memory_request.MemoryRequest`.
        from_files: whether blocks can be read in every pass; None: where there are checkpoints.
        text_encoder: whether the run has UMT5.
        options: other fields of the request.

    Raises:
        InputError: something does not fit.
    """
    check_size(*size, size_multiple(components.vae_config, components.stage_two_config))
    multiple = size_multiple(components.stage_one_vae_config, components.stage_one_config)

    def dit(part: str) -> DiTRequest:
        config = components.stage_two_config if part == "stage2" else components.stage_one_config
        return DiTRequest(config, components.stored.get(part, NO_TENSORS))

    return MemoryRequest(
        stage_one=dit("stage1"),
        stage_two=dit("stage2"),
        low_noise=None if components.low_noise is None else dit("stage1_low_noise"),
        vae=components.vae_config,
        motion_vae=None if components.stage_one_vae is None else components.stage_one_vae_config,
        size=size,
        motion_size=stage_one_size(*size, multiple),
        num_frames=num_frames,
        plan=plan,
        gpu=gpu,
        from_files=components.weights is not None if from_files is None else from_files,
        text_encoder_bytes=_encoder_bytes(components, options.get("capability", 90)) if text_encoder else 0,
        **options,
    )


def _encoder_bytes(components: Components, capability: int | None) -> int:
    """Of the text encoder that there is, or of UMT5-XXL's; without a GPU it runs in float32 (model/encoders.py)."""
    itemsize, folder = 2 if capability else 4, None
    if components.weights is not None and (components.weights / "text_encoder").is_dir():
        folder = components.weights / "text_encoder"
    if folder is None:
        return TEXT_ENCODER_BYTES // 2 * itemsize
    return itemsize * sum(tensor.numel for tensor in open_weights(folder).tensors.values())


def gpu_named(name: str) -> GPU | None:
    """The card of the table whose name is in a device's, such as ``NVIDIA GeForce RTX 4090``; None: there is none."""
    found = [known for known in GPUS if known.lower() in name.lower()]
    return GPUS[max(found, key=len)] if found else None


def gpu_of_class(memory: int) -> GPU:
    """A card that is sold with so many bytes: a GeForce up to 32 GB, then an H100 or H200."""
    # A card has up to its number of GiB.
    return GPUS[next((name for most, name in CLASSES if memory <= most * 2**30), "H200")]


def chosen_gpu(name: str | None, memory: int) -> GPU:
    """The card that seconds are predicted for: the one that was named, else the CUDA device if it is in the table and
    has that much memory, else one of the memory's class.

    Raises:
        InputError: the name is unknown.
    """
    if name is not None:
        return get_gpu(name)
    if torch.cuda.is_available():
        found = gpu_named(torch.cuda.get_device_name())
        if found is not None and memory <= torch.cuda.get_device_properties(0).total_memory:
            return found
    return gpu_of_class(memory)


def device_options(device: torch.device) -> dict[str, Any]:
    """Of a request for what a device has: the card, and whose seconds are predicted. A CPU has no limit."""
    card = Card.of(device)
    memory, capability = (None, None) if card is None else (card.memory, card.capability)
    return {"vram": memory, "capability": capability, "gpu": chosen_gpu(None, memory or 0)}


def vram_limits(text: str | None) -> list[int]:
    """Bytes of ``--vram``: sizes with commas between; ``auto`` or None is what the CUDA device has.

    Raises:
        InputError: a size has another form, or there is no CUDA device to ask.
    """
    found = []
    for part in (text or "auto").split(","):
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
    """The command line of ``python -m model.plan``."""
    parser = CommandParser(
        prog="python -m model.plan",
        description="Plans a clip's memory: where weights are and in what form, tiles, peak and time. Needs no GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", metavar="WxH", help="pixels (default: the preset's)")
    parser.add_argument("--frames", type=int, help="1 + 4n (default 81)")
    parser.add_argument("--mode", default="bidirectional", choices=MODES, help="of Stage II (default bidirectional)")
    parser.add_argument("--gpu", help=f"whose seconds are predicted: one of {', '.join(GPUS)} (default: by the memory)")
    parser.add_argument("--no-text-encoder", dest="text_encoder", action="store_false", help="embeddings are given")
    parser.add_argument("--from-files", action="store_true", help="plan a preset as if its weights were checkpoints")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON; of several limits a list")
    add_memory_options(parser, None)
    add_model_options(parser, device=False)
    add_lora_options(parser)
    return parser


def planner(args: argparse.Namespace) -> Callable[[int], MemoryRequest]:
    """What the options ask for, by the bytes of a card.

    Raises:
        InputError: an option does not fit.
    """
    defaults = get_preset(args.preset or (DEFAULT_PRESET if args.weights is None else "1.3b"))
    if args.weights is None:
        args.preset = args.preset or DEFAULT_PRESET
    dtype = pick_dtype("bfloat16" if args.dtype == "auto" else args.dtype, torch.device("cpu"))
    components = build_components(args, torch.device("cpu"), dtype, chosen_loras(args))
    size = (defaults.width, defaults.height) if args.size is None else parse_size(args.size)
    num_frames = defaults.num_frames if args.frames is None else args.frames
    blocks = check_frames(num_frames, components.vae_config.temporal_stride)
    text = args.text_encoder and (components.weights is None or (components.weights / "text_encoder").is_dir())
    ram = parse_ram(args.ram)
    options = {
        "mode": args.mode, "steps": args.steps, "stage_one_steps": args.stage1_steps, "dtype": dtype, "ram": ram,
        "storage": args.storage, "products": args.products, "text_encoder": text,
        "from_files": True if args.from_files else None,
        "vae_limit": None if args.vae_memory == "auto" else parse_bytes("vae-memory", args.vae_memory),
    }  # fmt: skip

    def request(vram: int) -> MemoryRequest:
        gpu = chosen_gpu(args.gpu, vram)
        clip = {"size": size, "num_frames": num_frames, "plan": segment_plan(args, blocks)}
        return request_for(components, **clip, gpu=gpu, capability=gpu.capability, vram=vram, **options)

    return request


def run(args: argparse.Namespace) -> None:
    """The command."""
    limits = vram_limits(args.vram)
    request = planner(args)
    if len(limits) == 1:
        plan = plan_memory(request(limits[0]))
        print(json.dumps(plan.to_json(), indent=2) if args.json else plan)
        return
    found = [_planned(request(limit)) for limit in limits]
    if args.json:
        print(json.dumps([_result(limit, entry) for limit, entry in zip(limits, found, strict=True)], indent=2))
        return
    print("\n".join(table(limits, found)))


def _planned(request: MemoryRequest) -> MemoryPlan | str:
    """The plan, or why there is none."""
    try:
        return plan_memory(request)
    except InputError as error:
        return str(error).splitlines()[0]


def _result(limit: int, entry: MemoryPlan | str) -> dict[str, Any]:
    return {"vram_bytes": limit, "refused": entry} if isinstance(entry, str) else entry.to_json()


def table(limits: list[int], found: list[MemoryPlan | str]) -> list[str]:
    """Lines: one row a limit.

    Args:
        limits: bytes of the cards.
        found: the plan of each, or why there is none.
    """
    head = (
        "card",
        "seconds for",
        "Stage I",
        "Stage II",
        "reference",
        "decode",
        "peak",
        "host",
        "seconds",
        "peak is in",
    )
    rows: list[tuple[str, ...]] = [head]
    for limit, plan in zip(limits, found, strict=True):
        if isinstance(plan, MemoryPlan):
            rows.append(
                (
                    gigabytes(limit),
                    plan.request.gpu.name,
                    blocks_told(plan.stage_one),
                    blocks_told(plan.stage_two),
                    tiles_told(plan, "reference"),
                    tiles_told(plan, "decode"),
                    gigabytes(plan.peak),
                    gigabytes(plan.host_peak),
                    f"{plan.seconds:.0f}",
                    plan.limiting.name,
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = iter("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    told = [next(lines)]
    for limit, plan in zip(limits, found, strict=True):
        told.append(next(lines) if isinstance(plan, MemoryPlan) else f"{gigabytes(limit)}  {plan}")
    return [
        *told,
        "Blocks: on the device + from pinned host memory + from files. Tiles: rows x columns, * where states wait in"
        " host memory.",
        f"All peaks and seconds are predicted; seconds for the named card, {NOT_PREDICTED}.",
    ]


def blocks_told(stage: StagePlan) -> str:
    """``24+16 plain``: blocks on the device, from pinned host memory and from files, and how they are written."""
    homes = stage.placement.homes(stage.config.num_layers)
    counts = "+".join(str(homes.count(home)) for home in ("device", "host", "file"))
    return f"{counts.removesuffix('+0+0').removesuffix('+0')} {stage.placement.storage}"


def tiles_told(plan: MemoryPlan, place: str) -> str:
    """``2x2* float32``: rows and columns of the tiles of a place of the VAE, * where states wait in host memory."""
    planned = getattr(plan.vae_plans, place)
    dtype = str(planned.request.dtype).removeprefix("torch.")
    return f"{planned.plan.rows}x{planned.plan.columns}{'*' * planned.plan.park} {dtype}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
