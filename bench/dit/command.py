"""The command ``python -m bench dit``."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Sequence
from operator import attrgetter

import torch

from bench.dit.layer import LAYER_PROVIDERS, TIMESTEPS, LayerProvider
from bench.dit.measure import measure_layer, targets
from bench.dit.shapes import QUICK_SHAPES, SHAPES, Shape
from bench.harness.registry import MILLISECONDS, Benchmark, chosen
from bench.harness.session import Session
from bench.harness.timing import Ceilings, Timer
from bench.operators.compare import compare_case
from bench.operators.discover import all_cases
from bench.operators.peers import PEERS, Peer, peers_of
from model.errors import InputError
from swifti2v_kernels import linear_gelu, segment_attention
from swifti2v_kernels.common.case import Arguments, Case, Cost, RealSize, Work
from swifti2v_kernels.common.dispatch import ENVIRONMENT_VARIABLE
from swifti2v_kernels.common.shapes import WINDOWS, Model

PARTS = ("ops", "layer", "all")
OP_METRICS = (
    "seconds", "launch_seconds", "bytes_per_second", "fraction_of_copy", "tflops", "fraction_of_matmul", "error",
    "peak_bytes", "flops", "bytes",
)  # fmt: skip
LAYER_METRICS = (
    "seconds", "launch_seconds", "tflops", "error", "peak_bytes", "attention_seconds", "linear_seconds",
    "other_seconds", "flops",
)  # fmt: skip

_WINDOW = WINDOWS["CSG window 2560x1408, 1.3B"]


def _linear_inputs(device: torch.device, tokens: int = _WINDOW.tokens, model: Model = _WINDOW.model) -> Arguments:
    x, weight = (torch.empty(n, model.width, dtype=torch.bfloat16, device=device) for n in (tokens, model.hidden))
    return (x.unsqueeze(0), weight, weight[:, 0].contiguous()), {}


def _linear_cost(tokens: int, model: Model) -> Cost:
    """Returns the least cost of a call in 16 bits; GELU counts as eight operations."""
    width, hidden = model.width, model.hidden
    read = 2 * (tokens * width + width * hidden + hidden)
    return Cost(2 * tokens * width * hidden + 8 * tokens * hidden, read, 2 * tokens * hidden)


#: The feed-forward's first half, which is torch's own matmul with an epilogue: the library has no kernel, and no case.
LINEAR_GELU = Case(
    "linear_gelu c1536", linear_gelu, functools.partial(_linear_inputs, tokens=64, model=Model(1, 256)),
    lambda constants: Work(0, 0),
    RealSize(_WINDOW.name, _linear_inputs, _linear_cost(_WINDOW.tokens, _WINDOW.model)),
)  # fmt: skip


def compared_cases() -> list[Case]:
    """Returns the cases at real sizes of operators that have peers; attention has a benchmark of its own."""
    found = [case for case in all_cases() if case.operator in PEERS.keys() - {segment_attention} and case.real]
    # No peer quantises what it norms.
    return [*(case for case in found if "quantize" not in case.inputs(torch.device("meta"))[1]), LINEAR_GELU]


EXAMPLES = """\
examples:
  python -m bench dit                          all operators, then the layer, on all shapes (minutes on a GPU)
  python -m bench dit --quick                  one case of every operator, one shape, one timestep
  python -m bench dit --part ops --ops norm    cases of operators whose name contains "norm"
  python -m bench dit --part layer --shapes 5B

Reported are time, GB/s and their fraction of a copy, error against float64 and memory; of the layer also its parts.
The figures to be reached: memory-bound operators at 85 % of the copy, the layer at 1.25 times the speed of diffusers'
compiled one and, at 70,400 tokens, at half its peak of activations.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only this benchmark has."""
    parser.add_argument("--part", choices=PARTS, default="all", help="ops, layer or all (default all)")
    parser.add_argument("--shapes", metavar="TEXT", default="", help="only shapes whose name contains TEXT")
    parser.add_argument("--ops", metavar="TEXT", default="", help="only cases whose name contains TEXT")
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
    """Measures operators and layers, on CUDA alone."""
    shapes = [s for s in (QUICK_SHAPES if args.quick else SHAPES) if args.part != "ops"]
    cases = compared_cases() if args.part != "layer" else []
    sizes = chosen("shapes", args.shapes, [*(s.name for s in shapes), *(c.real.shape for c in cases if c.real)])
    shapes, cases = [s for s in shapes if s.name in sizes], [c for c in cases if c.real and c.real.shape in sizes]
    ops = chosen("ops", args.ops, cases, attrgetter("name")) if cases else []
    others = chosen("only", args.only, (p.name for found in (LAYER_PROVIDERS, *map(peers_of, ops)) for p in found))
    if os.environ.get(ENVIRONMENT_VARIABLE) == "torch":
        raise InputError(f"{ENVIRONMENT_VARIABLE}: expected auto or triton, since it is the kernels that are measured")
    if args.quick:
        ops = list({case.operator: case for case in ops}.values())
    if session.cuda:
        found = [(case, [p for p in peers_of(case) if p.ours or p.name in others]) for case in ops]
        measure_ops(session, found, session.timer(args.milliseconds), session.ceilings())
        layers = [p for p in LAYER_PROVIDERS if p.ours or p.name in others]
        timesteps = [kind for kind in (TIMESTEPS[:1] if args.quick else TIMESTEPS) if args.timesteps in (kind, "all")]
        # A layer takes tens of milliseconds: enough calls for a median.
        timer = session.timer(5 * args.milliseconds)
        measure_layers(session, shapes, layers, timesteps, timer)
    else:
        session.section.note(
            "no CUDA device: nothing is timed; python -m bench operators checks the kernels without one"
        )


def measure_ops(session: Session, ops: Sequence[tuple[Case, Sequence[Peer]]], timer: Timer, ceilings: Ceilings) -> None:
    """Measures cases by their implementations; after each case the results folder holds what there is so far."""
    if not ops:
        return
    table = session.section.table(
        "operators", "operators of the DiT, bf16", identity=("shape", "op", "provider"), metrics=OP_METRICS,
        columns=("shape", "op", "provider", *OP_METRICS[:8]),
        note="GB/s are the operator's least traffic over its time; peak memory is what a call allocates, its results"
        " included.",
    )  # fmt: skip
    for case, peers in session.progress(ops, unit="operator"):
        for row in compare_case(case, peers, session.device, timer, ceilings):
            table.add(row | {"op": case.name})
        session.section.verdicts(targets(table.rows, []))


def measure_layers(
    session: Session,
    shapes: Sequence[Shape],
    layers: Sequence[LayerProvider],
    timesteps: Sequence[str],
    timer: Timer,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Measures layers by all implementations; after each the results folder holds what there is so far."""
    if not shapes:
        return
    verdicts = session.section.data["verdicts"]
    table = session.section.table(
        "layer", "one layer of the DiT, bf16", identity=("shape", "timesteps", "provider"), metrics=LAYER_METRICS,
        columns=("shape", "tokens", "timesteps", "provider", *LAYER_METRICS[:8]),
        note="Text keys and values are made once a clip by ours and in every call by diffusers. One timestep is"
        " diffusers' best case; per block, it is given modulation per token (not counted as activation). Peak memory is"
        " that of activations.",
    )  # fmt: skip
    kinds = [(shape, kind) for shape in shapes for kind in timesteps]
    for shape, kind in session.progress(kinds, unit="layer"):
        with torch.no_grad():
            for row in measure_layer(shape, kind, layers, dtype, session.device, timer):
                table.add(row)
        session.section.verdicts([*verdicts, *targets([], table.rows)])


BENCHMARK = Benchmark(
    name="dit",
    summary="operators and one layer of the DiT against eager, torch.compile, diffusers and Liger-Kernel",
    description="Time, bandwidth and memory of the DiT's fused operators and of one whole layer.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="The DiT's operators and one layer",
    order=21,
    quick="one case of every operator, one shape, one timestep",
)
