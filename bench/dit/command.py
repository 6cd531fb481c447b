"""The command ``python -m bench dit``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.dit.check import check_reduced
from bench.dit.count import layer_rows, op_rows
from bench.dit.layer import LAYER_PROVIDERS, TIMESTEPS, LayerProvider
from bench.dit.measure import Machine, measure_layer, measure_op, targets
from bench.dit.ops import OPS, Op
from bench.dit.providers import Provider, providers
from bench.dit.shapes import QUICK_SHAPES, SHAPES, Shape
from bench.harness.interpreted import run_interpreted
from bench.harness.registry import MILLISECONDS, Benchmark, matches
from bench.harness.session import Session
from bench.harness.timing import Timer
from bench.records.plot import plot_layers, plot_operators
from bench.records.write import Table
from model.errors import InputError, require
from swifti2v_kernels.common.dispatch import ENVIRONMENT_VARIABLE
from swifti2v_kernels.common.target import interpreting

PARTS = ("ops", "layer", "all")
OP_METRICS = (
    "seconds", "launch_seconds", "bytes_per_second", "fraction_of_copy", "tflops", "fraction_of_matmul", "error",
    "peak_bytes", "flops", "bytes",
)  # fmt: skip
LAYER_METRICS = (
    "seconds", "launch_seconds", "tflops", "error", "peak_bytes", "attention_seconds", "linear_seconds",
    "other_seconds", "flops",
)  # fmt: skip

EXAMPLES = """\
examples:
  python -m bench dit                          all operators, then the layer, on all shapes (minutes on a GPU)
  python -m bench dit --quick                  one shape, one timestep
  python -m bench dit --part ops --ops norm    operators whose name contains "norm"
  python -m bench dit --part layer --shapes 5B
  python -m bench dit                          without CUDA: bytes counted, and a reduced check in the interpreter

Reported are time, GB/s and their fraction of a copy, error against float64 and memory; of the layer also its parts.
The figures to be reached: memory-bound operators at 85 % of the copy, the layer at 1.25 times the speed of diffusers'
compiled one and, at 70,400 tokens, at half its peak of activations.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only this benchmark has."""
    parser.add_argument("--part", choices=PARTS, default="all", help="ops, layer or all (default all)")
    parser.add_argument("--shapes", metavar="TEXT", default="", help="only shapes whose name contains TEXT")
    parser.add_argument("--ops", metavar="TEXT", default="", help="only operators whose name contains TEXT")
    parser.add_argument(
        "--only", metavar="TEXT|TEXT", default="", help="only implementations with TEXT in their name, and ours"
    )
    parser.add_argument(
        "--timesteps", choices=(*TIMESTEPS, "all"), default="all", help="timesteps of the layer's call (default all)"
    )
    parser.add_argument(
        "--milliseconds",
        type=MILLISECONDS,
        default=200,
        help="time for each timing, five times as much for a layer (default %(default)s)",
    )


def run(args: argparse.Namespace, session: Session) -> None:
    """Measures operators and layers; without CUDA it counts them and runs a reduced check."""
    shapes = [s for s in (QUICK_SHAPES if args.quick else SHAPES) if args.shapes in s.name]
    if not shapes:
        names = ", ".join(s.name for s in (QUICK_SHAPES if args.quick else SHAPES))
        raise InputError(f"shapes: no shape contains {args.shapes!r}; the shapes are {names}")
    ops = [op for op in OPS if args.ops in op.name]
    if not ops:
        names = ", ".join(op.name for op in OPS)
        raise InputError(f"ops: no operator contains {args.ops!r}; the operators are {names}")
    known = dict.fromkeys(p.name for found in (LAYER_PROVIDERS, *map(providers, ops)) for p in found)
    if not any(matches(args.only, name) for name in known):
        raise InputError(f"only: none contains {args.only!r}; they are {'; '.join(known)}")
    if os.environ.get(ENVIRONMENT_VARIABLE) == "torch":
        raise InputError(f"{ENVIRONMENT_VARIABLE}: expected auto or triton, since it is the kernels that are measured")
    ops = ops if args.part != "layer" else []
    if session.cuda:
        layers = [p for p in LAYER_PROVIDERS if args.part != "ops" and (p.ours or matches(args.only, p.name))]
        measure_all(
            session,
            shapes,
            [(op, [p for p in providers(op) if p.ours or matches(args.only, p.name)]) for op in ops],
            layers,
            [kind for kind in (TIMESTEPS[:1] if args.quick else TIMESTEPS) if args.timesteps in (kind, "all")],
            session.timer(args.milliseconds),
            # A layer takes tens of milliseconds: enough calls for a median.
            layer_timer=session.timer(5 * args.milliseconds),
        )
    elif interpreting():
        _interpreted(session, shapes, ops, args)
    else:
        session.say("no CUDA device: nothing is timed. On one, these would run")
        if ops:
            count_ops(session, shapes, ops)
        run_interpreted(session, "our kernels on shrunken shapes")


def measure_all(
    session: Session,
    shapes: Sequence[Shape],
    ops: Sequence[tuple[Op, Sequence[Provider]]],
    layers: Sequence[LayerProvider],
    timesteps: Sequence[str],
    timer: Timer,
    *,
    layer_timer: Timer | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **ceilings: int,
) -> None:
    """Measures everything by every implementation; after each row the results folder holds what there is so far."""
    section, device = session.section, session.device
    found = session.ceilings(None if session.cuda else timer, **ceilings)
    machine = Machine(device, timer, found.copy_bytes_per_second, found.matmul_tflops)
    note = (
        "GB/s are the operator's least traffic over its time; peak memory is what a call allocates, its results"
        " included."
    )
    columns = ("shape", "op", "provider", *OP_METRICS[:8])
    op_table = section.table(
        "operators", "operators of the DiT, bf16", identity=("shape", "op", "provider"), metrics=OP_METRICS,
        columns=columns, note=note,
    ) if ops else None  # fmt: skip
    note = (
        "Text keys and values are made once a clip by ours and in every call by diffusers. One timestep is diffusers'"
        " best case; per block, it is given modulation per token (not counted as activation). Peak memory is that of"
        " activations."
    )
    identity = ("shape", "timesteps", "provider")
    layer_table = section.table(
        "layer", "one layer of the DiT, bf16", identity=identity, metrics=LAYER_METRICS,
        columns=("shape", "tokens", "timesteps", "provider", *LAYER_METRICS[:8]), note=note,
    ) if layers else None  # fmt: skip
    total = len(shapes) * (sum(len(found) for _, found in ops) + len(timesteps) * len(layers))
    with require("tqdm", "bench").tqdm(total=total, unit="timing", dynamic_ncols=True, disable=None) as bar:

        def report(table: Table, row: dict[str, Any]) -> None:
            table.add(row)
            section.verdicts(
                targets([] if op_table is None else op_table.rows, [] if layer_table is None else layer_table.rows)
            )
            bar.update()

        with torch.no_grad():
            for shape in shapes:
                for op, found in ops:
                    bar.set_description(f"{shape.name}, {op.name}")
                    measure_op(op, shape, found, dtype, machine, lambda row: report(op_table, row))
                for kind in timesteps if layers else ():
                    bar.set_description(f"{shape.name}, layer, timestep {kind}")
                    of_layers = replace(machine, timer=layer_timer or timer)
                    measure_layer(shape, kind, layers, dtype, of_layers, lambda row: report(layer_table, row))
    name = session.environment["device"]
    for table, draw in ((op_table, plot_operators), (layer_table, plot_layers)):
        if table is not None and any(row["status"] == "ok" for row in table.rows):
            session.plot(draw, table.rows, name, session.folder / f"{table.data['name']}.png")


def count_ops(session: Session, shapes: Sequence[Shape], ops: Sequence[Op]) -> None:
    """Adds a table of the least traffic of every operator, and of what plain PyTorch moves."""
    metrics = ("flops", "bytes", "eager_bytes", "ratio")
    note = (
        "Least traffic is the operator's own cost(). Eager: every operator of the plain PyTorch code reads its operands"
        " once and writes its results once."
    )
    table = session.section.table(
        "counted operators", "operators of the DiT, bf16, by counting", identity=("shape", "op"), metrics=metrics,
        note=note,
    )  # fmt: skip
    for row in op_rows(ops, shapes):
        names = "; ".join(p.name for op in ops if op.name == row["op"] for p in providers(op))
        table.add({**row, "basis": "counted", "implementations": names})


def _interpreted(session: Session, shapes: list[Shape], ops: list[Op], args: argparse.Namespace) -> None:
    """Counts the layer with our kernels' operators, and checks them on shrunken shapes."""
    if args.part != "ops":
        metrics = ("flops", "peak_bytes", "streams", "ratio", "other_bytes", "linear_bytes")
        note = (
            "Predicted by counting (bench/dit/count.py): ours and eager operator by operator at the real size, without"
            " what an operator allocates inside itself; torch.compile from a small layer of the same proportions that"
            " Inductor compiled for the CPU. Activations include the residual stream and all of our workspace; ratio is"
            " over the compiled layer's."
        )
        table = session.section.table(
            "counted layer", "one layer of the DiT, bf16, by counting", identity=("shape", "timesteps", "provider"),
            metrics=metrics, columns=("shape", "tokens", "timesteps", "provider", *metrics), note=note,
        )  # fmt: skip
        for row in layer_rows(shapes, with_compiled=not args.quick):
            table.add(row)
    metrics = ("error", "limit")
    table = session.section.table(
        "interpreted", "our kernels in Triton's interpreter (one to three heads, 60 tokens), against float64",
        identity=("op", "shape", "dtype"), metrics=metrics,
    )  # fmt: skip
    wrong = check_reduced(shapes, ops, args.part != "ops", table)
    if wrong:
        raise InputError(f"our kernels are wrong: {', '.join(wrong)}")


BENCHMARK = Benchmark(
    name="dit",
    summary="operators and one layer of the DiT against eager, torch.compile, diffusers and Liger-Kernel",
    description="Time, bandwidth and memory of the DiT's fused operators and of one whole layer.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="The DiT's operators and one layer",
    order=21,
    quick="one shape, one timestep",
)
