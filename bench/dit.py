"""Everything of the DiT but attention: each operator and one whole layer, against eager, compiled and libraries' code.

Every implementation is first held against float64 on the same inputs; what is wrong is not timed. Bandwidths are
fractions of a copy's, TFLOP/s of a matrix product's, both measured in the same run. Without CUDA nothing is timed:
bytes are counted, and the kernels are checked in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.dit_block import BLOCK_PROVIDERS, TIMESTEPS, BlockProvider, block_inputs, exact_rows
from bench.dit_count import block_rows, op_rows
from bench.dit_measure import Machine, measure_block, measure_op, targets
from bench.dit_ops import OPS, Op, relative_error
from bench.dit_providers import Provider, providers
from bench.dit_report import format_counted_blocks, format_counted_ops, format_result
from bench.dit_shapes import QUICK_SHAPES, SHAPES, Shape
from bench.environment import capture
from bench.files import write_text
from bench.plot import plot_layers, plot_operators
from bench.timing import Timer, copy_bandwidth, cuda_timer, make_folder, matmul_tflops
from model.command import pick_device
from model.errors import InputError, require
from swifti2v_kernels.common.dispatch import ENVIRONMENT_VARIABLE
from swifti2v_kernels.common.target import interpreting

SCHEMA = "swifti2v-dit-1"
PARTS = ("ops", "block", "all")

EXAMPLES = """\
examples:
  python -m bench dit                          all operators, then the layer, on all shapes (minutes on a GPU)
  python -m bench dit --quick                  one shape, one timestep
  python -m bench dit --part ops --ops norm    operators whose name contains "norm"
  python -m bench dit --part block --shapes 5B
  python -m bench dit                          without CUDA: bytes counted, and a reduced check in the interpreter

Reported are time, GB/s and their fraction of a copy, error against float64 and memory; of the layer also its parts.
The figures to be reached: memory-bound operators at 85 % of the copy, the layer at 1.25 times the speed of diffusers'
compiled one and, at 70,400 tokens, at half its peak of activations.
"""


def add_parser(commands: Any, name: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        name,
        help="operators and one layer of the DiT against eager, torch.compile, diffusers and Liger-Kernel",
        description="Time, bandwidth and memory of the DiT's fused operators and of one whole layer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=PARTS, default="all", help="ops, block or all (default all)")
    parser.add_argument("--shapes", metavar="TEXT", default="", help="only shapes whose name contains TEXT")
    parser.add_argument("--ops", metavar="TEXT", default="", help="only operators whose name contains TEXT")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument(
        "--milliseconds",
        type=int,
        default=200,
        help="time for each timing, five times as much for a layer (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="results folder (default out/dit-DATE-TIME)")
    parser.add_argument("--json", action="store_true", help="also print the JSON")
    parser.add_argument("--quick", action="store_true", help="one shape, one timestep")


def run(args: argparse.Namespace) -> None:
    """The benchmark; without CUDA its counts and its reduced check."""
    for module in ("tabulate", "matplotlib", "tqdm"):
        require(module, "bench")
    device = pick_device(args.device)
    shapes = [s for s in (QUICK_SHAPES if args.quick else SHAPES) if args.shapes in s.name]
    if not shapes:
        names = ", ".join(s.name for s in (QUICK_SHAPES if args.quick else SHAPES))
        raise InputError(f"shapes: no shape contains {args.shapes!r}; the shapes are {names}")
    ops = [op for op in OPS if args.ops in op.name]
    if not ops:
        names = ", ".join(op.name for op in OPS)
        raise InputError(f"ops: no operator contains {args.ops!r}; the operators are {names}")
    if args.milliseconds < 1:
        raise InputError(f"milliseconds: expected at least 1, got {args.milliseconds}")
    if os.environ.get(ENVIRONMENT_VARIABLE) == "torch":
        raise InputError(f"{ENVIRONMENT_VARIABLE}: expected auto or triton, since it is the kernels that are measured")
    ops = ops if args.part != "block" else []
    if device.type != "cuda":
        _without_cuda(shapes, ops, args)
        return
    require("pynvml", "bench")
    folder = args.out or Path("out") / f"dit-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    layers = BLOCK_PROVIDERS if args.part != "ops" else ()
    result = run_all(
        shapes,
        [(op, providers(op)) for op in ops],
        layers,
        TIMESTEPS[:1] if args.quick else TIMESTEPS,
        device,
        cuda_timer(args.milliseconds),
        folder,
        # A layer takes tens of milliseconds: enough calls for a median.
        layer_timer=cuda_timer(5 * args.milliseconds),
    )
    print(f"\n{format_result(result)}\n")
    if args.json:
        print(json.dumps(result, indent=1))
    print(f"results in {folder.resolve()}")


def run_all(
    shapes: Sequence[Shape],
    ops: Sequence[tuple[Op, Sequence[Provider]]],
    layers: Sequence[BlockProvider],
    timesteps: Sequence[str],
    device: torch.device,
    timer: Timer,
    folder: Path,
    *,
    layer_timer: Timer | None = None,
    dtype: torch.dtype = torch.bfloat16,
    copied_bytes: int = 2**30,
    matmul_size: int = 8192,
) -> dict[str, Any]:
    """Measures everything by every implementation; after each row the folder holds what there is so far."""
    make_folder(folder)
    machine = Machine(
        device, timer, copy_bandwidth(device, timer, copied_bytes), matmul_tflops(device, timer, matmul_size)
    )
    for_layers = replace(machine, timer=layer_timer or timer)
    result: dict[str, Any] = {"schema": SCHEMA, "environment": capture(device), "rows": [], "targets": []}
    result["copy_bytes_per_second"] = machine.copy_bytes_per_second
    result["matmul_tflops"] = machine.matmul_tflops
    total = len(shapes) * (sum(len(found) for _, found in ops) + len(timesteps) * len(layers))
    with require("tqdm", "bench").tqdm(total=total, unit="timing", dynamic_ncols=True, disable=None) as bar:

        def report(row: dict[str, Any]) -> None:
            result["rows"].append(row)
            result["targets"] = targets(result["rows"])
            write_text(folder / "result.json", json.dumps(result, indent=1))
            bar.update()

        with torch.no_grad():
            for shape in shapes:
                for op, found in ops:
                    bar.set_description(f"{shape.name}, {op.name}")
                    measure_op(op, shape, found, dtype, machine, report)
                for kind in timesteps if layers else ():
                    bar.set_description(f"{shape.name}, layer, timestep {kind}")
                    measure_block(shape, kind, layers, dtype, for_layers, report)
    write_text(folder / "table.md", format_result(result) + "\n")
    for part, draw in (("op", plot_operators), ("block", plot_layers)):
        if any(row["part"] == part and row["status"] == "ok" for row in result["rows"]):
            draw(result, folder / f"{part}.png")
    return result


def _without_cuda(shapes: list[Shape], ops: list[Op], args: argparse.Namespace) -> None:
    """What would run and what it moves, and the rest in a process that interprets."""
    if interpreting():
        _interpreted(shapes, ops, args)
        return
    if not args.json:
        print("no CUDA device: nothing is timed. On one, these would run")
        if ops:
            print(f"\n{format_counted_ops(op_rows(ops, shapes))}\n")
            print("Least traffic is the operator's own cost(). Eager is predicted by counting: every operator of the")
            print("plain PyTorch code reads its operands once and writes its results once.")
            for op in ops:
                print(f"  {op.name}: {'; '.join(p.name for p in providers(op))}")
        sys.stdout.flush()
    command = [sys.executable, "-m", "bench", "dit", "--device", "cpu", "--part", args.part]
    command += ["--shapes", args.shapes, "--ops", args.ops, *["--quick"] * args.quick, *["--json"] * args.json]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"})
    if done.returncode:
        raise InputError("the reduced check failed; see above")


def _interpreted(shapes: list[Shape], ops: list[Op], args: argparse.Namespace) -> None:
    """The layer's counts, with our kernels' operators, and the reduced check.

    Raises:
        InputError: an error is too large.
    """
    layers = block_rows(shapes, with_compiled=not args.quick) if args.part != "ops" else []
    if layers and not args.json:
        print(f"\n{format_counted_blocks(layers)}\n")
        print(
            "Predicted by counting (bench/dit_count.py): ours and eager operator by operator at the real size, without"
        )
        print("what an operator allocates inside itself; torch.compile from a small layer of the same proportions that")
        print("Inductor compiled for the CPU. Activations include the residual stream and all of our workspace.")
    checked = check_reduced(shapes, ops, args.part != "ops")
    if args.json:
        counted = {"ops": op_rows(ops, shapes), "blocks": layers}
        print(json.dumps({"schema": SCHEMA, "counted": counted, "interpreter_check": checked}, indent=1))
    else:
        print(
            "\nreduced check of our kernels in Triton's interpreter (one to three heads, 60 tokens), against float64:"
        )
        for row in checked:
            verdict = "ok" if row["ok"] else f"WRONG (limit {row['limit']:.0e})"
            print(f"  {row['op']}, {row['shape']}, {row['dtype']}: error {row['error']:.1e} {verdict}")
    wrong = [f"{row['op']} ({row['shape']}, {row['dtype']})" for row in checked if not row["ok"]]
    if wrong:
        raise InputError(f"our kernels are wrong: {', '.join(wrong)}")


def check_reduced(shapes: Sequence[Shape], ops: Sequence[Op], layer: bool) -> list[dict[str, Any]]:
    """Our kernels on shrunken shapes, interpreted, against float64; one row for each."""
    rows, cpu = [], torch.device("cpu")
    kinds = [
        (dtype, limit, shape) for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 2e-3)) for shape in shapes
    ]
    for dtype, limit, shape in require("tqdm", "bench").tqdm(kinds, leave=False, dynamic_ncols=True, disable=None):
        small, errors = shape.reduced(), {}
        for op in ops:
            tokens = op.rows(small, cpu)
            expected = op.exact(op.make(small, cpu, dtype), tokens)
            for provider in (p for p in providers(op) if p.ours):
                inputs = op.make(small, cpu, dtype)
                found = op.sample(inputs, provider.prepare(inputs)(), tokens)
                name = op.name + provider.name.removeprefix("swifti2v")
                errors[name] = relative_error(found, expected)
        if layer:
            errors["layer"] = _layer_error(small, dtype)
        for name, error in errors.items():
            row = {"op": name, "shape": shape.name, "dtype": str(dtype).removeprefix("torch."), "error": error}
            rows.append({**row, "limit": limit, "ok": error < limit})
    return rows


def _layer_error(shape: Shape, dtype: torch.dtype) -> float:
    """Of our layer, and that a float32 layer reaches it is a check of the exact one too."""
    with torch.no_grad():
        inputs = block_inputs(shape, torch.device("cpu"), dtype, TIMESTEPS[1])
        expected = exact_rows(inputs, torch.arange(shape.tokens))
        runner = next(p for p in BLOCK_PROVIDERS if p.ours).prepare(inputs)
        runner.load()
        x, n = runner.step()
        before = inputs.x.double()
        return relative_error((x.double() - before, n.double()), (expected[0] - before, expected[1]))
