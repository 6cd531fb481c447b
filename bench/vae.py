"""The VAE: whole clips decoded and encoded, ours untiled and in tiles against diffusers' untiled and tiled; its layers.

Every implementation is first held against float32; what is wrong is not timed. On CUDA tiles of ours run under a limit
that the allocator enforces, and every convolution is timed by our kernel and by cuDNN, which is what
``configs/conv3d.json`` is made of. Without CUDA bytes are counted and peaks predicted at the real sizes, and the same
paths run on a small VAE.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.environment import capture
from bench.files import write_text
from bench.plot import plot_vae
from bench.timing import Timer, cuda_timer, make_folder, matmul_tflops
from bench.vae_count import count_rows
from bench.vae_layers import Layer, measure_layer, merge_table, unique_layers
from bench.vae_measure import measure, release, targets
from bench.vae_providers import PROVIDERS, Provider
from bench.vae_report import format_counts, format_plans, format_result, format_savings
from bench.vae_shapes import PARTS, QUICK_SHAPES, SHAPES, Shape
from model.command import pick_device, positive
from model.errors import InputError, require
from model.measure import parse_bytes

SCHEMA = "swifti2v-vae-1"
TABLE = Path(__file__).resolve().parent.parent / "swifti2v_kernels" / "configs" / "conv3d.json"
LIMIT = "4GB"

EXAMPLES = """\
examples:
  python -m bench vae                                 everything; without CUDA counts and a small VAE (10 minutes)
  python -m bench vae --quick                         decode and encode 81 frames of 720p
  python -m bench vae --shapes "2.1, 2K, 81" --part decode --limit 6GB
  python -m bench vae --part layers --update-table    our kernels against cuDNN; the faster one is used from then on

Reported are time, peak memory, error against float32 and, in tiles, the step across their borders; difference-*.png
shows where tiles change a frame. The figures to be reached at 2K: twice the speed of diffusers' fastest setting that
fits, a third of its tiled peak, seams as in the untiled frame.
"""


def add_parser(commands: Any, name: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        name,
        help="the VAE in exact tiles against diffusers untiled and tiled; its convolutions against cuDNN",
        description="Time, peak memory, error and seams of VAE decode and encode.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = (*PARTS, "layers", "all")
    parser.add_argument("--part", choices=parts, default="all", help="decode, encode, layers or all (default all)")
    parser.add_argument("--shapes", metavar="TEXT", default="", help="only clips whose name contains TEXT")
    parser.add_argument(
        "--limit", metavar="SIZE", default=LIMIT, help="memory for our tiles, enforced on CUDA (default %(default)s)"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="timed runs of each (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results folder (default out/vae-DATE-TIME)")
    parser.add_argument("--update-table", action="store_true", help="write the table of measured choices")
    parser.add_argument("--json", action="store_true", help="also print the JSON")
    parser.add_argument("--quick", action="store_true", help="one clip, one run of each")


def run(args: argparse.Namespace) -> None:
    """The benchmark."""
    for module in ("tabulate", "matplotlib", "tqdm"):
        require(module, "bench")
    device = pick_device(args.device)
    available = QUICK_SHAPES if args.quick else SHAPES
    shapes = [shape for shape in available if args.shapes in str(shape)]
    if not shapes:
        raise InputError(f"shapes: none contains {args.shapes!r}; they are {'; '.join(map(str, available))}")
    limit = parse_bytes(args.limit)
    parts = [part for part in PARTS if args.part in (part, "all")]
    repeats = 1 if args.quick else args.repeats
    folder = args.out or Path("out") / f"vae-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if device.type != "cuda":
        if args.update_table or args.part == "layers":
            given = "update-table" if args.update_table else "part"
            raise InputError(f"{given}: layers are measured on a CUDA device, and there is none")
        result = _without_cuda(shapes, parts, repeats, limit, folder, quiet=args.json)
    else:
        require("pynvml", "bench")
        wanted = PARTS if args.part in ("layers", "all") else ()
        layers = unique_layers(shapes, wanted)
        result = run_all(
            shapes, parts, device, folder, limit=limit, repeats=repeats, layers=layers, timer=cuda_timer(100)
        )
        if args.update_table:
            write_text(TABLE, json.dumps(merge_table(json.loads(TABLE.read_text()), result), indent=1) + "\n")
            print(f"table updated: {TABLE.name}")
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"\n{format_result(result)}\n")
        print(f"results in {folder.resolve()}")


def run_all(
    shapes: Sequence[Shape],
    parts: Sequence[str],
    device: torch.device,
    folder: Path,
    *,
    limit: int | None = None,
    repeats: int = 3,
    providers: Sequence[Provider] = PROVIDERS,
    layers: Sequence[tuple[Layer, int, str]] = (),
    timer: Timer | None = None,
    dtype: torch.dtype = torch.bfloat16,
    matmul_size: int = 8192,
) -> dict[str, Any]:
    """Measures everything; after each row the folder holds what there is so far.

    Layers come first: they are short. Without a ``timer`` there are none.
    """
    make_folder(folder)
    result: dict[str, Any] = {"schema": SCHEMA, "environment": capture(device), "rows": [], "layers": [], "targets": []}
    result["matmul_tflops"] = None if timer is None else matmul_tflops(device, timer, matmul_size)
    total = len(layers) + len(shapes) * len(parts) * len(providers)
    with require("tqdm", "bench").tqdm(total=total, unit="timing", dynamic_ncols=True, disable=None) as bar:

        def report(kind: str, row: dict[str, Any]) -> None:
            result[kind].append(row)
            result["targets"] = targets(result["rows"])
            write_text(folder / "result.json", json.dumps(result, indent=1))
            bar.update()

        with torch.no_grad():
            for layer, calls, where in layers if timer is not None else ():
                bar.set_description(str(layer))
                report("layers", measure_layer(layer, calls, where, dtype, device, timer, result["matmul_tflops"]))
                release(device)
            for shape in shapes:
                for part in parts:
                    bar.set_description(f"{shape}, {part}")
                    measure(
                        shape, part, device, providers=providers, limit=limit, repeats=repeats, folder=folder,
                        report=lambda row: report("rows", row),
                    )  # fmt: skip
    write_text(folder / "table.md", format_result(result) + "\n")
    for part in parts:
        rows = [row for row in result["rows"] if row["part"] == part and row["status"] == "ok"]
        if rows:
            plot_vae(rows, result["environment"]["device"], folder / f"{part}.png")
    return result


def _without_cuda(
    shapes: Sequence[Shape], parts: Sequence[str], repeats: int, limit: int, folder: Path, quiet: bool
) -> dict[str, Any]:
    """Counts at the real sizes, and the same paths on a small VAE."""
    counted = count_rows(shapes, parts, limit)
    if not quiet:
        largest = [row for row in counted if row["size"] == counted[-1]["size"]]
        print("no CUDA device: no card is timed. One settled latent frame (4 frames; bfloat16), predicted by counting:")
        print("every operator reads its operands once and writes its results once (bench/vae_count.py)")
        print(f"\n{format_counts(counted)}\n\n{format_savings(largest)}\n")
        print("Unfused: the leanest separate operators. Predicted peak memory, three latent frames at once, to decode")
        print(f"in bfloat16 and to encode in float32:\n\n{format_plans(counted, limit)}\n")
        print("The same paths on a small VAE, on this CPU:")
    result = run_all([s.reduced() for s in shapes], parts, torch.device("cpu"), folder, repeats=repeats)
    result["counted"] = counted
    write_text(folder / "result.json", json.dumps(result, indent=1))
    return result
