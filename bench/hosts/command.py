"""The command ``python -m bench hosts``."""

from __future__ import annotations

import argparse
import math

from bench.harness.registry import MILLISECONDS, TOKENS, Benchmark, matches
from bench.harness.session import Session
from bench.hosts.measure import COLUMNS, FRAMES, IDENTITY, METRICS, MODELS, host_rows
from model.errors import InputError, require

#: Tokens by default: attention is then most of the work.
CPU_TOKENS, CUDA_TOKENS, QUICK_TOKENS = 4096, 36864, 1024
HEAD_DIMS = {"cpu": (24,), "cuda": (24, 128)}

EXAMPLES = """\
examples:
  python -m bench hosts                                  all models; on a CPU about two minutes
  python -m bench hosts --models Hunyuan --tokens 9216
  python -m bench hosts --device cuda                    also with a head_dim that the attention kernels take

A head_dim of 24 has no attention kernel on any card, and a pass with gradients has none at all: these rows show what
PyTorch costs where no kernel runs. accelerate() should not make that larger, nor slower at the default sizes. At about
a thousand tokens, as with --quick, and below, the overhead of small calls shows and the accelerated model is slower.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only this benchmark has."""
    parser.add_argument(
        "--models", metavar="TEXT|TEXT", default="", help="only models whose name contains one of the texts"
    )
    parser.add_argument(
        "--tokens", type=TOKENS, metavar="N",
        help=f"tokens of the video, about (default {CPU_TOKENS:,} on a CPU, {CUDA_TOKENS:,} on CUDA)",
    )  # fmt: skip
    parser.add_argument(
        "--milliseconds", type=MILLISECONDS, default=3000, help="time for each timing (default %(default)s)"
    )


def run(args: argparse.Namespace, session: Session) -> None:
    """Measures every model with and without our operators, in turns."""
    require("diffusers", "diffusers")
    hosts = [host for host in MODELS if matches(args.models, host.name)]
    if not hosts:
        raise InputError(f"models: expected a part of {', '.join(h.name for h in MODELS)}, got {args.models!r}")
    tokens = args.tokens or (QUICK_TOKENS if args.quick else CUDA_TOKENS if session.cuda else CPU_TOKENS)
    side = max(round(math.sqrt(tokens / FRAMES)), 2)
    timer = session.timer(100 if args.quick else args.milliseconds)
    table = session.section.table(
        "hosts", f"diffusers' models before and after accelerate(), {FRAMES * side * side:,} tokens", identity=IDENTITY,
        metrics=METRICS, columns=COLUMNS, note="Small random models with the layers of the real kinds, a batch of one.",
    )  # fmt: skip
    shapes = [(host, head_dim) for host in hosts for head_dim in HEAD_DIMS[session.device.type]]
    with require("tqdm", "bench").tqdm(shapes, unit="model", dynamic_ncols=True, disable=None) as bar:
        for host, head_dim in bar:
            bar.set_description(f"{host.name}, head_dim {head_dim}")
            for row in host_rows(host, head_dim, side, session.device, timer):
                table.add(row)


BENCHMARK = Benchmark(
    name="hosts",
    summary="diffusers' models before and after accelerate(): seconds and memory, with and without gradients",
    description="What accelerate() costs or saves in small models of diffusers, where kernels run and where none does.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Models of diffusers",
    order=35,
    quick=f"{QUICK_TOKENS:,} tokens, shorter timings",
)
