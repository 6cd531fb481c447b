"""The command ``python -m bench precision``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from bench.harness.registry import Benchmark, names
from bench.harness.session import Session
from bench.precision import encoder, layers, window
from bench.precision.forms import BASELINE, COMPUTE, FORMS
from bench.precision.weights import CheckpointWeights, SyntheticWeights, Weights
from model.cli.options import parse_path, parse_size, positive
from model.config import PRESETS, VAEConfig, get_preset
from model.dit.model import WanDiT
from model.errors import InputError
from model.pipeline.components import Components
from model.sizes import check_size, size_multiple
from model.streaming.placement import Placement
from model.vae.model import WanVAE
from model.weights.load import random_weights

Value = TypeVar("Value")
#: The model that is examined: its name, VAE, DiT weights of every kind, and what builds the VAE (encoder in float32).
Subject = tuple[str, VAEConfig, list[Weights], Callable[[], WanVAE]]

KINDS = ("random", "structured")
PARTS = ("layers", "window", "encoder", "all")
#: The defaults on a CPU take minutes at the width of 1.3B; those on CUDA are a part of a window's tokens.
CPU_LAYERS, CPU_TOKENS, CPU_SIZE = 4, 256, (256, 144)
CUDA_TOKENS, CUDA_SIZE = 2816, (1280, 704)
QUICK_LAYERS, QUICK_TOKENS, QUICK_SIZE = 1, 64, (128, 96)
STRUCTURED = (
    "Structured weights imitate what makes trained ones hard for a quantiser (bench/precision/weights.py); they are no"
    " checkpoint, for which --weights states the errors."
)

EXAMPLES = """\
examples:
  python -m bench precision                           the 1.3B; on a CPU with 4 of its layers (3 minutes)
  python -m bench precision --part layers --preset 14b-1.3b --stage 1          matrices of the 14B
  python -m bench precision --forms float8,float8-matmul --layers 8
  python -m bench precision --weights checkpoints     of a checkpoint's Stage II, instead of random ones
  python -m bench precision --part encoder --weights checkpoints               could its VAE encode in float16?

Forms: int8 and float8 (e4m3) are weights with one scale a row, unpacked to bfloat16 for matmul in bfloat16;
int8-matmul and float8-matmul quantise activations too, one scale a token. Each is compared with exact weights and with
bfloat16, whose error is what 16 bits cost anyhow. The VAE's encoder is run in float32, float16 and bfloat16.
Speed is not measured here.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that this benchmark alone has."""
    parser.add_argument("--part", choices=PARTS, default="all", help="layers, window, encoder or all (default all)")
    parser.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default 1.3b)")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=2, help="the stage whose DiT is examined (default 2)"
    )
    parser.add_argument(
        "--weights", type=parse_path, metavar="DIR", help="directory of checkpoints, as for the pipeline"
    )
    parser.add_argument(
        "--forms", metavar="FORM,...", type=names(FORMS), default=",".join(FORMS),
        help=f"some of {', '.join(FORMS)} (default all)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=positive, metavar="N",
        help=f"layers of the window's DiT (default {CPU_LAYERS} on a CPU, all on CUDA and with --weights)",
    )  # fmt: skip
    sizes = ("x".join(map(str, size)) for size in (CPU_SIZE, CUDA_SIZE))
    parser.add_argument(
        "--size", metavar="WxH", help="frames of the window (default {} on a CPU, {} on CUDA)".format(*sizes)
    )


def run(args: argparse.Namespace, session: Session) -> None:
    """Measures one layer of each shape and a window for every kind of weights, and the VAE's encoder."""
    forms = [form for name, form in FORMS.items() if name == BASELINE or name in args.forms]
    model, vae, kinds, build = _checkpoint(args, session) if args.weights is not None else _synthetic(args, session)
    size = parse_size(args.size) if args.size else _default(args, session, QUICK_SIZE, CPU_SIZE, CUDA_SIZE)
    check_size(*size, size_multiple(vae, kinds[0].config))
    tokens = _default(args, session, QUICK_TOKENS, CPU_TOKENS, CUDA_TOKENS)
    latent_size = size[1] // vae.spatial_stride, size[0] // vae.spatial_stride
    parts = {
        "layers": ("one linear layer", layers, lambda w: layers.layer_rows(w, model, forms, tokens)),
        "window": (
            "a window through the DiT", window, lambda w: window.window_rows(w, model, size, latent_size, forms)
        ),
        "encoder": ("the VAE's encoder", encoder, lambda w: encoder.encoder_rows(build, model, w.kind, size)),
    }  # fmt: skip
    for part, (title, module, rows) in parts.items():
        if args.part not in (part, "all"):
            continue
        note = module.NOTE + ("" if args.weights or part == "encoder" else f" {STRUCTURED}")
        columns = window.COLUMNS if part == "window" else ()
        table = session.section.table(
            part, title, identity=module.IDENTITY, metrics=module.METRICS, columns=columns, note=note
        )
        for weights in kinds[:1] if part == "encoder" else kinds:
            session.say(f"{model}, {weights.kind} weights: {title}")
            with torch.no_grad():
                for row in rows(weights):
                    table.add(row)


def _synthetic(args: argparse.Namespace, session: Session) -> Subject:
    """Returns the model of a preset with synthetic weights.

    Raises:
        InputError: the preset has fewer layers.
    """
    name = args.preset or "1.3b"
    preset = get_preset(name)
    config = preset.stage_one if args.stage == 1 else preset.stage_two
    if args.layers is not None and args.layers > config.num_layers:
        raise InputError(f"layers: expected at most {config.num_layers}, those of {name}, got {args.layers}")
    usual = _default(args, session, QUICK_LAYERS, CPU_LAYERS, config.num_layers)
    config = replace(config, num_layers=args.layers or min(usual, config.num_layers))
    found: list[Weights] = [SyntheticWeights(kind, config, session.device) for kind in KINDS]
    build = functools.partial(random_weights, WanVAE, preset.vae, 0, device=session.device)
    return _named(name, args.stage), preset.vae, found, build


def _checkpoint(args: argparse.Namespace, session: Session) -> Subject:
    for option in ("preset", "layers"):
        if getattr(args, option) is not None:
            raise InputError(f"{option}: expected nothing beside --weights, whose DiT is taken as it is")

    def load(dtype: torch.dtype, placement: Placement) -> WanDiT:
        components = Components.from_directory(args.weights, dtype, session.device)
        return components.dit(f"stage{args.stage}", placement)

    components = Components.from_directory(args.weights, COMPUTE, session.device)
    config, vae, part = components.stage_two_config, components.vae_config, "vae"
    if args.stage == 1:
        config, vae = components.stage_one_config, components.stage_one_vae_config
        part = "stage1_vae" if "stage1_vae" in components.parts else part
    build = functools.partial(components.vae, part)
    return _named(args.weights.resolve().name, args.stage), vae, [CheckpointWeights(config, load)], build


def _named(model: str, stage: int) -> str:
    return f"{model}, Stage I" if stage == 1 else model


def _default(args: argparse.Namespace, session: Session, quick: Value, cpu: Value, cuda: Value) -> Value:
    return quick if args.quick else cuda if session.cuda else cpu


BENCHMARK = Benchmark(
    name="precision",
    summary="what 8-bit weights and matmul cost in accuracy, and 16 bits the VAE's encoder",
    description="The error of a DiT with weights and matmul in 8 bits, and of the VAE's encoder in 16.",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    measure=run,
    title="Precision",
    order=26,
    quick="one layer of the window, few tokens",
)
