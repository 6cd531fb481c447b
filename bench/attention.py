"""Attention of our kernels against every other implementation in the environment, on the shapes of real models.

Every implementation is first held against float64 on sampled rows; what is wrong is not timed. Fractions are of a
matrix product's speed measured in the same run. With several sources the others must concatenate, which is timed with
them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.attention_providers import QUICK_SHAPES, SHAPES, Provider, Shape, Unavailable, inputs, own_kernel, providers
from bench.environment import capture
from bench.files import write_text
from bench.plot import plot_attention
from bench.timing import Timer, cuda_timer, failure, make_folder, matmul_tflops, peak_of
from model.command import pick_device
from model.errors import InputError, require
from model.measure import format_bytes, is_out_of_memory
from swifti2v_kernels.common.target import interpreting

SCHEMA = "swifti2v-attention-1"
TABLE = Path(__file__).resolve().parent.parent / "swifti2v_kernels" / "configs" / "attention.json"
#: Relative L2 error against float64 above which an implementation is wrong: bfloat16 rounds p and the output once, with
#: at most 2**-8 each; 8-bit products are allowed ten times as much.
TOLERANCE = {True: 8e-3, False: 8e-2}

EXAMPLES = """\
examples:
  python -m bench attention                    all shapes and implementations (minutes on a GPU)
  python -m bench attention --quick            one window, with one and with three sources
  python -m bench attention --shapes "2560x1408" --update-table
  python -m bench attention                    without CUDA: what it would run, and a reduced check in the interpreter

--update-table writes the measured times of dense calls to swifti2v_kernels/configs/attention.json, by which
segment_attention chooses between its own kernel and torch's.
"""


def add_parser(commands: Any, name: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        name,
        help="our attention kernels against SDPA, FlexAttention, flash-attn and sageattention",
        description="TFLOP/s, error against float64 and memory of attention on the shapes of video DiTs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", metavar="TEXT", default="", help="only shapes whose name contains TEXT")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--milliseconds", type=int, default=300, help="time for each timing (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results folder (default out/attention-DATE-TIME)")
    parser.add_argument("--update-table", action="store_true", help="write the table of measured choices")
    parser.add_argument("--json", action="store_true", help="also print the JSON")
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer implementations")


def run(args: argparse.Namespace) -> None:
    """The benchmark; without CUDA its reduced check."""
    for module in ("tabulate", "matplotlib"):
        require(module, "bench")
    device = pick_device(args.device)
    shapes = [s for s in (QUICK_SHAPES if args.quick else SHAPES) if args.shapes in s.name]
    if not shapes:
        names = ", ".join(s.name for s in SHAPES)
        raise InputError(f"shapes: no shape contains {args.shapes!r}; the shapes are {names}")
    if args.milliseconds < 1:
        raise InputError(f"milliseconds: expected at least 1, got {args.milliseconds}")
    if device.type != "cuda":
        if args.update_table:
            raise InputError("update-table: expected a CUDA device, since the table holds measurements")
        _without_cuda(shapes, args)
        return
    require("pynvml", "bench")
    folder = args.out or Path("out") / f"attention-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    result = run_shapes(shapes, providers(args.quick), device, cuda_timer(args.milliseconds), folder)
    print(f"\n{format_table(result)}\n")
    if args.json:
        print(json.dumps(result, indent=1))
    if args.update_table:
        write_text(TABLE, json.dumps(merge_table(json.loads(TABLE.read_text()), result, shapes), indent=1) + "\n")
        print(f"table updated: {TABLE.name}")
    print(f"results in {folder.resolve()}")


def run_shapes(
    shapes: list[Shape],
    found: list[Provider],
    device: torch.device,
    timer: Timer,
    folder: Path,
    matmul_size: int = 8192,
) -> dict[str, Any]:
    """Measures every shape by every implementation; after each shape the folder holds what there is so far."""
    make_folder(folder)
    result: dict[str, Any] = {"schema": SCHEMA, "environment": capture(device), "rows": []}
    result["matmul_tflops"] = matmul_tflops(device, timer, matmul_size)
    tqdm = require("tqdm", "bench").tqdm
    with tqdm(total=len(shapes) * len(found), unit="timing", dynamic_ncols=True, disable=None) as bar:
        for shape in shapes:
            result["rows"] += measure(shape, found, device, timer, result["matmul_tflops"], bar)
            write_text(folder / "result.json", json.dumps(result, indent=1))
    write_text(folder / "table.md", format_table(result) + "\n")
    if any(row["status"] == "ok" for row in result["rows"]):
        plot_attention(result, folder / "attention.png")
    return result


def measure(
    shape: Shape, found: list[Provider], device: torch.device, timer: Timer, matmul: float, bar: Any
) -> list[dict[str, Any]]:
    """One row for every implementation: checked, then timed."""
    try:
        q, sources = inputs(shape, device, torch.bfloat16)
        rows_checked = torch.linspace(0, shape.queries - 1, min(64, shape.queries), device=device).long()
        expected = exact_rows(q, sources, rows_checked)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        bar.update(len(found))
        reason = {"status": "out of memory", "reason": "the inputs alone do not fit"}
        return [{"shape": shape.name, "provider": provider.name, **reason} for provider in found]
    rows = []
    for provider in found:
        bar.set_description(f"{shape.name}, {provider.name}")
        row: dict[str, Any] = {"shape": shape.name, "sources": len(shape.keys), "provider": provider.name}
        row |= {"exact": provider.exact, "ours": provider.ours, "flops": shape.cost.flops, "bytes": shape.cost.bytes}
        row["copied_bytes"] = 0 if provider.ours else shape.copied_bytes
        try:
            row |= _one(provider, q, sources, rows_checked, expected, timer, device)
        except Unavailable as reason:
            row |= {"status": "not available", "reason": str(reason)}
        except (RuntimeError, MemoryError) as error:
            row |= failure(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if row["status"] == "ok":
            row["tflops"] = shape.cost.flops / row["seconds"] / 1e12
            row["fraction_of_matmul"] = row["tflops"] / matmul
        rows.append(row)
        bar.update()
    return rows


def _one(
    provider: Provider,
    q: Tensor,
    sources: list[tuple[Tensor, Tensor]],
    checked: Tensor,
    expected: Tensor,
    timer: Timer,
    device: torch.device,
) -> dict[str, Any]:
    provider.call(q, sources)  # compiles, and fills workspaces that stay
    out, peak = peak_of(lambda: provider.call(q, sources), device)
    error = ((out[:, checked].double() - expected).norm() / expected.norm()).item()
    del out
    found: dict[str, Any] = {"error": error, "peak_bytes": peak}
    if not error < TOLERANCE[provider.exact]:
        return {**found, "status": "wrong", "reason": f"error {error:.1e} against float64; not timed"}
    seconds, low, high = timer(lambda: provider.call(q, sources))
    return {**found, "status": "ok", "seconds": seconds, "seconds_20": low, "seconds_80": high}


def exact_rows(q: Tensor, sources: list[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """The given query rows ``[1, n, H, D]`` in float64, head by head."""
    heads = []
    for h in range(q.shape[2]):
        k, v = (torch.cat([pair[i][0, :, h] for pair in sources]).double() for i in range(2))
        weights = (q[0, rows, h].double() @ k.T * q.shape[3] ** -0.5).softmax(-1)
        heads.append(weights @ v)
    return torch.stack(heads, dim=1).unsqueeze(0)


def merge_table(table: dict[str, Any], result: dict[str, Any], shapes: list[Shape]) -> dict[str, Any]:
    """The table with this run's dense single-source measurements in place of older ones of the same key."""
    environment = result["environment"]
    major, minor = environment["gpu"]["capability"]
    fresh: dict[tuple[int, str, int, int], dict[str, Any]] = {}
    for shape in shapes:
        rows = [r for r in result["rows"] if r["shape"] == shape.name and r["status"] == "ok" and r["exact"]]
        times = {r["provider"]: r["seconds"] for r in rows if r["provider"] in ("swifti2v", "sdpa-cudnn", "sdpa-flash")}
        if len(shape.keys) == 1 and "swifti2v" in times and len(times) > 1:
            key = (10 * major + minor, "bfloat16", shape.head_dim, shape.keys[0])
            entry = dict(zip(("capability", "dtype", "head_dim", "tokens"), key, strict=True))
            fresh[key] = {**entry, "card": environment["device"], "seconds": times, "environment": environment}
    old = {(e["capability"], e["dtype"], e["head_dim"], e["tokens"]): e for e in table["entries"]}
    return {**table, "entries": [entry for _, entry in sorted({**old, **fresh}.items())]}


def format_table(result: dict[str, Any]) -> str:
    """The rows for people, in Markdown."""
    from tabulate import tabulate

    cells = []
    for row in result["rows"]:
        if row["status"] != "ok":
            cells.append([row["shape"], row["provider"], "", "", "", "", "", f"{row['status']}: {row['reason'][:80]}"])
            continue
        cells.append([
            row["shape"], row["provider"], f"{row['seconds'] * 1e3:.3f}", f"{row['tflops']:.0f}",
            f"{row['fraction_of_matmul']:.2f}", f"{row['error']:.1e}", format_bytes(row["peak_bytes"]),
            ("" if row["exact"] else "8-bit products; ")
            + (f"concatenates {format_bytes(row['copied_bytes'])}" if row["copied_bytes"] else ""),
        ])  # fmt: skip
    headers = ["shape", "implementation", "ms", "TFLOP/s", "of matmul", "error", "peak memory", "note"]
    matmul = f"{result['matmul_tflops']:.0f} TFLOP/s"
    note = f"Measured on {result['environment']['device']}; bf16 matrix product in the same run: {matmul}."
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True) + f"\n\n{note}"


def _without_cuda(shapes: list[Shape], args: argparse.Namespace) -> None:
    """What would run, and the reduced check, in a process that interprets."""
    from tabulate import tabulate

    if interpreting():
        check_reduced(shapes, args.json)
        return
    rows = [
        [
            s.name, s.heads, s.head_dim, f"{s.queries:,}", " + ".join(f"{n:,}" for n in s.keys),
            f"{s.cost.flops / 1e12:.1f}", format_bytes(s.cost.bytes),
            format_bytes(s.copied_bytes) if s.copied_bytes else "",
        ]
        for s in shapes
    ]  # fmt: skip
    headers = ["shape", "heads", "head_dim", "queries", "keys", "TFLOP", "least traffic", "copy saved"]
    if not args.json:
        print("no CUDA device: nothing is timed. On one, these shapes would run")
        print(tabulate(rows, headers=headers, disable_numparse=True))
        print(f"by each of: {'; '.join(p.name for p in providers(args.quick))}")
        print("\nreduced check of our kernel in Triton's interpreter (one head, about 150 tokens), against float64:")
    command = [sys.executable, "-m", "bench", "attention", "--device", "cpu", "--shapes", args.shapes]
    command += ["--quick"] * args.quick + ["--json"] * args.json
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"})
    if done.returncode:
        raise InputError("the reduced check failed; see above")


def check_reduced(shapes: list[Shape], as_json: bool) -> None:
    """Our kernel on shrunken shapes, interpreted, against float64.

    Raises:
        InputError: an error is too large.
    """
    rows = []
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        for shape in require("tqdm", "bench").tqdm(
            shapes, desc=str(dtype), leave=False, dynamic_ncols=True, disable=None
        ):
            small = shape.reduced(130 + 7 * len(rows))
            q, sources = inputs(small, torch.device("cpu"), dtype)
            out = own_kernel(q, sources)
            expected = exact_rows(q, sources, torch.arange(small.queries))
            error = ((out.double() - expected).norm() / expected.norm()).item()
            rows.append({"shape": shape.name, "dtype": str(dtype).removeprefix("torch."), "queries": small.queries,
                         "keys": list(small.keys), "error": error, "limit": limit, "ok": error < limit})  # fmt: skip
    if as_json:
        print(json.dumps({"schema": SCHEMA, "interpreter_check": rows}, indent=1))
    else:
        for row in rows:
            verdict = "ok" if row["ok"] else f"WRONG (limit {row['limit']:.0e})"
            print(
                f"  {row['shape']}, {row['dtype']}, {row['queries']} x {row['keys']}:"
                f" error {row['error']:.1e} {verdict}"
            )
    wrong = [row["shape"] for row in rows if not row["ok"]]
    if wrong:
        raise InputError(f"our kernel is wrong on: {', '.join(wrong)}")
