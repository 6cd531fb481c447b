"""The implementations of every operator that ``python -m bench dit`` compares: ours, eager, compiled and libraries'.

A provider is prepared with inputs, outside of the timing, and then called without arguments. Ours are called by their
public names as the model calls them, in place where it does; the others return new tensors, as their users call them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.dit import eager
from bench.dit.eager import EPS
from bench.dit.ops import Inputs, Op
from bench.records.outcome import Unavailable
from swifti2v_kernels import (
    embed_window,
    gated_residual,
    gated_residual_norm_modulate,
    linear_gelu,
    norm_modulate,
    project_step,
    qk_norm_rope,
)

Call = Callable[[], tuple[Tensor, ...]]
#: Our kernels are asked for by name, so that nothing else can be timed under our name.
BACKEND = "triton"


@dataclass(frozen=True)
class Provider:
    """An implementation of one operator; ``note`` says what its time holds besides."""

    name: str
    prepare: Callable[[Inputs], Call]
    note: str = ""
    ours: bool = False


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function compiled by ``torch.compile``, anew for the shapes of each call."""
    return torch.compile(function, dynamic=False)


def providers(op: Op) -> list[Provider]:
    """Returns all implementations of an operator; what is not installed says so when it is prepared."""
    return [
        *_OURS[op.name],
        Provider("eager", lambda inputs: functools.partial(op.run, inputs.arguments)),
        Provider("torch.compile", functools.partial(_compiled, op)),
        *_DIFFUSERS.get(op.name, ()),
        *_LIGER.get(op.name, ()),
    ]


def _compiled(op: Op, inputs: Inputs) -> Call:
    function = compiled(op.function)

    def call() -> tuple[Tensor, ...]:
        result = function(**inputs.arguments)
        return result if isinstance(result, tuple) else (result,)

    return call


def _own_norm(inputs: Inputs) -> Call:
    a = inputs.arguments
    rows = {"block_map": a["block_map"], "eps": EPS, "backend": BACKEND}
    return lambda: (norm_modulate(a["x"], a["shift"], a["scale"], **rows),)


def _own_residual(inputs: Inputs) -> Call:
    a = inputs.arguments
    rows = {"block_map": a["block_map"], "backend": BACKEND}
    return lambda: (gated_residual(a["x"], a["update"], a["gate"], inplace=True, **rows),)


def _own_residual_norm(inputs: Inputs) -> Call:
    names = ("shift", "scale", "weight", "bias", "block_map")
    a = inputs.arguments
    options = {name: a[name] for name in names if name in a}
    return lambda: gated_residual_norm_modulate(
        a["x"], a["update"], a["gate"], **options, eps=EPS, inplace=True, backend=BACKEND
    )


def _own_rope(fused: bool, inputs: Inputs) -> Call:
    a = inputs.arguments
    q, k = inputs.extra["qkv"].chunk(3, dim=2)[:2] if fused else (a["q"], a["k"])
    weights, rope = (a["q_weight"], a["k_weight"]), inputs.extra["rope"]
    return lambda: qk_norm_rope(q, k, *weights, rope, a["heads"], eps=EPS, inplace=fused, backend=BACKEND)


def _own_embed(inputs: Inputs) -> Call:
    a = dict(inputs.arguments)
    first = [a.pop(name) for name in ("latents", "weight", "bias")]
    return lambda: (embed_window(*first, **a, backend=BACKEND),)


def _own_project(inputs: Inputs) -> Call:
    a, extra = inputs.arguments, inputs.extra
    first = [a[name] for name in ("weight", "bias", "shift", "scale", "latents")]
    options = {"latent_index": extra["index"], "block_map": extra["block_map"], "step": a["step"]}
    return lambda: (project_step(extra["window"], *first, **options, eps=EPS, backend=BACKEND),)


def _own_linear(inputs: Inputs) -> Call:
    a = inputs.arguments
    return lambda: (linear_gelu(a["x"], a["weight"], a["bias"]),)


def _module(name: str) -> ModuleType:
    """Imports a module of another library.

    Raises:
        Unavailable: it is not installed, or does not load here.
    """
    package = name.split(".")[0]
    try:
        return import_module(name)
    except ImportError as error:
        label = {"liger_kernel": "liger-kernel"}.get(package, package)
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        raise Unavailable(f"{label} is not installed" if missing else f"{label} does not load: {error}") from error


def _per_token(inputs: Inputs, *names: str) -> list[Tensor]:
    """Returns modulation as diffusers holds it for two noise levels: a row a token, float32, strided over a table."""
    a = inputs.arguments
    rows = (inputs.extra["block_map"] if "window" in inputs.extra else a["block_map"]).long()
    table = torch.stack([a[name] for name in names], dim=2)[:, rows]
    return list(table.repeat_interleave(inputs.shape.block_len, dim=1).unbind(2))


def _layer_norm(channels: int, inputs: Inputs) -> Any:
    """Builds diffusers' ``FP32LayerNorm``, with the weights of the inputs if there are any."""
    affine, device = "weight" in inputs.arguments and inputs.arguments["weight"].ndim == 1, inputs.arguments["x"].device
    norm = _module("diffusers.models.normalization").FP32LayerNorm(channels, EPS, elementwise_affine=affine)
    if affine:
        norm.load_state_dict({name: inputs.arguments[name] for name in ("weight", "bias")})
    return norm.to(device).requires_grad_(False)


def _diffusers_norm(inputs: Inputs) -> Call:
    x = inputs.arguments["x"]
    norm, (shift, scale) = _layer_norm(x.shape[2], inputs), _per_token(inputs, "shift", "scale")
    return lambda: ((norm(x.float()) * (1 + scale) + shift).type_as(x),)


def _diffusers_residual(inputs: Inputs) -> Call:
    x, update, (gate,) = inputs.arguments["x"], inputs.arguments["update"], _per_token(inputs, "gate")
    return lambda: ((x.float() + update * gate).type_as(x),)


def _diffusers_residual_norm(inputs: Inputs) -> Call:
    x, update = inputs.arguments["x"], inputs.arguments["update"]
    norm = _layer_norm(x.shape[2], inputs)
    if "weight" in inputs.arguments:
        (gate,) = _per_token(inputs, "gate")

        def call() -> tuple[Tensor, ...]:
            y = (x.float() + update * gate).type_as(x)
            return y, norm(y.float()).type_as(y)

        return call
    gate, shift, scale = _per_token(inputs, "gate", "shift", "scale")

    def modulated() -> tuple[Tensor, ...]:
        y = (x.float() + update * gate).type_as(x)
        return y, (norm(y.float()) * (1 + scale) + shift).type_as(y)

    return modulated


def _diffusers_embed(inputs: Inputs) -> Call:
    _module("diffusers")  # its patch embedding is torch's Conv3d; without diffusers the row would be misnamed
    a = inputs.arguments
    weight, window = a["weight"], [a[n] for n in ("latents", "reference", "mask", "latent_index", "reference_index")]
    conv = torch.nn.Conv3d(*weight.shape[1::-1], weight.shape[2:], weight.shape[2:], device="meta")
    conv.load_state_dict({"weight": weight, "bias": a["bias"]}, assign=True)
    conv.requires_grad_(False)

    def call() -> tuple[Tensor, ...]:
        return (conv(eager.gather_window(*window, weight.dtype)).flatten(2).transpose(1, 2).contiguous(),)

    return call


def _diffusers_project(inputs: Inputs) -> Call:
    a, x = inputs.arguments, inputs.extra["window"]
    norm, (shift, scale) = _layer_norm(x.shape[2], inputs), _per_token(inputs, "shift", "scale")
    head = torch.nn.Linear(*a["weight"].shape[::-1], device="meta")
    head.load_state_dict({"weight": a["weight"], "bias": a["bias"]}, assign=True)
    head.requires_grad_(False)
    latents, slots, given = a["latents"], a["slots"], inputs.shape.given
    height, width = a["grid"]

    def call() -> tuple[Tensor, ...]:
        y = head((norm(x.float()) * (1 + scale) + shift).type_as(x))
        y = y.reshape(1, -1, height, width, 1, 2, 2, latents.shape[1]).permute(0, 7, 1, 4, 2, 5, 3, 6)
        velocity = y.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, given:]
        # FlowMatchEulerDiscreteScheduler.step without its bookkeeping.
        latents[:, :, slots] = latents[:, :, slots] + a["step"] * velocity
        return (latents,)

    return call


def _diffusers_gelu(inputs: Inputs) -> Call:
    a = inputs.arguments
    gelu = _module("diffusers.models.activations").GELU(*a["weight"].shape[::-1], approximate="tanh")
    gelu.proj.load_state_dict({"weight": a["weight"], "bias": a["bias"]}, assign=True)
    gelu.requires_grad_(False)
    return lambda: (gelu(a["x"]),)


def _liger_norm(inputs: Inputs) -> Call:
    a = inputs.arguments
    x, affine = a["x"], _liger_affine(inputs)
    norm = _module("liger_kernel.transformers.functional").liger_layer_norm

    def call() -> tuple[Tensor, ...]:
        return (_modulated(norm(x, *affine, EPS), a),)

    return call


def _liger_residual_norm(inputs: Inputs) -> Call:
    a, affine = inputs.arguments, _liger_affine(inputs)
    norm = _module("liger_kernel.transformers.functional").liger_layer_norm

    def call() -> tuple[Tensor, ...]:
        x = eager.gated_residual(a["x"], a["update"], a["gate"], a["block_map"])
        y = norm(x, *affine, EPS)
        return x, y if "weight" in a else _modulated(y, a)

    return call


def _liger_affine(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns weights and biases for Liger's LayerNorm, which wants some: ones and zeros where there are none."""
    a = inputs.arguments
    if "weight" in a:
        return a["weight"], a["bias"]
    width, device = a["x"].shape[2], a["x"].device
    return torch.ones(width, device=device), torch.zeros(width, device=device)


def _modulated(y: Tensor, a: dict[str, Any]) -> Tensor:
    shift, scale = (eager.by_block(a[name], a["block_map"]) for name in ("shift", "scale"))
    return (y.unflatten(1, (a["block_map"].shape[0], -1)) * (1 + scale) + shift).flatten(1, 2).to(y.dtype)


def _liger_rope(inputs: Inputs) -> Call:
    a, heads = inputs.arguments, (inputs.arguments["heads"], -1)
    norm = _module("liger_kernel.transformers.functional").liger_rms_norm

    def call() -> tuple[Tensor, ...]:
        normed = (norm(a[name], a[f"{name}_weight"], EPS, in_place=False) for name in ("q", "k"))
        return tuple(eager.rotate(x.unflatten(2, heads), a["cos"], a["sin"]) for x in normed)

    return call


_RESIDUAL_NORMS = ("gated_residual_norm_modulate", "gated_residual_norm_modulate, affine")
_PER_TOKEN_NOTE = "modulation stored per token, its form for two noise levels"
_OURS = {
    "norm_modulate": [Provider("swifti2v", _own_norm, ours=True)],
    "gated_residual": [Provider("swifti2v", _own_residual, "in place", True)],
    **{name: [Provider("swifti2v", _own_residual_norm, "residual in place", True)] for name in _RESIDUAL_NORMS},
    "qk_norm_rope": [
        Provider("swifti2v", functools.partial(_own_rope, True), "slices of a fused projection, in place", True),
        Provider("swifti2v, new tensors", functools.partial(_own_rope, False), ours=True),
    ],
    "embed_window": [Provider("swifti2v", _own_embed, ours=True)],
    "project_step": [Provider("swifti2v", _own_project, "target blocks, in place", True)],
    "linear_gelu": [Provider("swifti2v", _own_linear, "cuBLASLt's epilogue, by torch", True)],
}
_DIFFUSERS = {
    "norm_modulate": [Provider("diffusers", _diffusers_norm, _PER_TOKEN_NOTE)],
    "gated_residual": [Provider("diffusers", _diffusers_residual, _PER_TOKEN_NOTE)],
    _RESIDUAL_NORMS[0]: [Provider("diffusers", _diffusers_residual_norm, _PER_TOKEN_NOTE)],
    _RESIDUAL_NORMS[1]: [Provider("diffusers", _diffusers_residual_norm, "gate stored per token")],
    "embed_window": [Provider("diffusers", _diffusers_embed, "concatenation and Conv3d")],
    "project_step": [Provider("diffusers", _diffusers_project, "the whole window's head")],
    "linear_gelu": [Provider("diffusers", _diffusers_gelu)],
}
_LIGER = {
    "norm_modulate": [Provider("liger", _liger_norm, "LayerNorm alone, modulation eager")],
    _RESIDUAL_NORMS[0]: [Provider("liger", _liger_residual_norm, "LayerNorm alone, the rest eager")],
    _RESIDUAL_NORMS[1]: [Provider("liger", _liger_residual_norm, "LayerNorm alone, residual eager")],
    "qk_norm_rope": [Provider("liger", _liger_rope, "RMSNorm alone, rotation eager (its own is for halves)")],
}
