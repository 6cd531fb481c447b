"""The operators that ``python -m bench dit`` measures: their inputs, their least cost and their exact results.

Inputs are made for a shape on any device, ``meta`` included, always the same for the same kind of device. Means are
not zero, as in trained models, and the window has two rows of modulation: of given and of noisy blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bench.dit import eager
from bench.dit.shapes import ITEMSIZE, STORE_ITEMSIZE, Shape
from swifti2v_kernels import Rope3D, rope_3d
from swifti2v_kernels.common.cost import Cost
from swifti2v_kernels.linear.linear_gelu import cost as linear_cost
from swifti2v_kernels.norm.adaln import cost as adaln_cost
from swifti2v_kernels.norm.qk_norm_rope import cost as rope_cost
from swifti2v_kernels.window.embed_window import cost as embed_cost
from swifti2v_kernels.window.project_step import cost as project_cost

#: Tokens that are compared with the exact result, at most.
CHECKED = 2048
STEP = -1.0
_PER_TOKEN = ("x", "update", "q", "k", "cos", "sin")


@dataclass(frozen=True)
class Inputs:
    """The arguments of an operator's function in ``bench/dit/eager.py``; ``extra`` is what other forms need."""

    shape: Shape
    arguments: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """One operator; ``whole`` where its exact result cannot be had for some tokens alone."""

    name: str
    function: Callable[..., Any]
    make: Callable[[Shape, torch.device, torch.dtype], Inputs]
    cost: Callable[[Shape], Cost]
    whole: bool = False
    compute_bound: bool = False

    def run(self, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """Runs the eager function; returns its results."""
        result = self.function(**arguments)
        return result if isinstance(result, tuple) else (result,)

    def exact(self, inputs: Inputs, rows: Tensor) -> list[Tensor]:
        """Returns the results in float64 for the tokens ``rows``, in the form of :meth:`sample`."""
        arguments = dict(inputs.arguments)
        if not self.whole:
            arguments |= {name: arguments[name][:, rows] for name in _PER_TOKEN if name in arguments}
            if "block_map" in arguments:
                arguments["block_map"] = arguments["block_map"][rows // inputs.shape.block_len]
        arguments = {name: _double(value) for name, value in arguments.items()}
        results = self.run(arguments)
        return self.sample(inputs, results, rows) if self.whole else list(results)

    def sample(self, inputs: Inputs, results: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Returns the tokens ``rows`` of results, in float64."""
        if "slots" in inputs.arguments:
            targets = results[0].index_select(2, inputs.arguments["slots"])
            results = [rearrange(targets, "b c t (y p) (x q) -> b (t y x) (c p q)", p=2, q=2)]
        return [result[:, rows].double() for result in results]

    def rows(self, shape: Shape, device: torch.device) -> Tensor:
        """Returns the tokens to compare: all of few, an even choice of many."""
        tokens = (shape.targets if self.function is eager.project_step else shape.blocks) * shape.block_len
        return torch.linspace(0, tokens - 1, min(CHECKED, tokens), device=device).long()


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest relative L2 error of the results; NaN if a result holds one."""
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def normal(device: torch.device) -> Callable[..., Tensor]:
    """Returns a seeded source of normal numbers, called as ``source(shape, dtype, mean, deviation)``."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def make(size: Sequence[int], dtype: torch.dtype, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        x = torch.empty(size, dtype=dtype, device=device)
        return x if generator is None else x.normal_(mean, deviation, generator=generator)

    return make


def rotary_tables(rope: Rope3D) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines ``[1, L, 1, D]`` for every token, as diffusers hands them to its layers."""
    grid = tuple(axis.shape[0] for axis in rope)
    tables = []
    for i in range(2):
        axes = [
            table[..., i].view([-1 if j == axis else 1 for j in range(3)] + [table.shape[1]]).expand(*grid, -1)
            for axis, table in enumerate(rope)
        ]
        tables.append(torch.cat(axes, dim=-1).repeat_interleave(2, dim=-1).reshape(1, math.prod(grid), 1, -1))
    return tables[0], tables[1]


def block_map(shape: Shape, device: torch.device) -> Tensor:
    """Returns the row of modulation of every block: 0 for given blocks, 1 for noisy ones."""
    return torch.tensor([0] * shape.given + [1] * shape.targets, dtype=torch.int32, device=device)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tokens(*names: str) -> Callable[[Shape, torch.device, torch.dtype], Inputs]:
    """Returns a maker of the norms' inputs: the arguments named, modulation in float32 as the model keeps it."""

    def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
        source, width = normal(device), shape.config.dim
        arguments: dict[str, Any] = {
            name: source((1, shape.tokens, width), dtype, 0.1, 0.8) for name in ("x", "update") if name in names
        }
        # Entries of one table, so that their rows are strided as in the model.
        table = source((1, 2, 6, width), torch.float32, 0.0, 0.3).unbind(2)
        arguments |= {name: row for name, row in zip(("shift", "scale", "gate"), table, strict=False) if name in names}
        affine = {"weight": source((width,), torch.float32, 1.0, 0.1), "bias": source((width,), torch.float32, 0, 0.1)}
        arguments |= {name: value for name, value in affine.items() if name in names}
        return Inputs(shape, {**arguments, "block_map": block_map(shape, device)})

    return make


def _queries(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    source, config = normal(device), shape.config
    qkv = source((1, shape.tokens, 3 * config.dim), dtype, 0.1, 0.8)
    q, k, _ = qkv.chunk(3, dim=2)
    weights = [source((config.dim,), dtype, 1.0, 0.1) for _ in range(2)]
    rope = rope_3d(shape.index, shape.height, shape.width, config.head_dim, device=device)
    cos, sin = rotary_tables(rope)
    arguments = {"q": q.contiguous(), "k": k.contiguous(), "q_weight": weights[0], "k_weight": weights[1]}
    arguments |= {"cos": cos, "sin": sin, "heads": config.num_heads}
    return Inputs(shape, arguments, {"qkv": qkv, "rope": rope})


def _stores(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns latents and reference of the clip, in float32."""
    source = normal(device)
    size = (1, shape.latent_channels, shape.clip, 2 * shape.height, 2 * shape.width)
    return source(size, torch.float32), source(size, torch.float32)


def _window(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    source, config = normal(device), shape.config
    latents, reference = _stores(shape, device)
    index = torch.tensor(shape.index, dtype=torch.int32, device=device)
    noisy = torch.tensor([-1] * shape.given + list(shape.index[shape.given :]), dtype=torch.int32, device=device)
    mask = torch.tensor([1.0] * shape.given + [0.0] * shape.targets, device=device)
    fan_in = config.in_channels * shape.pixels
    return Inputs(
        shape,
        {
            "latents": latents,
            "reference": reference,
            "mask": mask,
            "latent_index": noisy,
            "reference_index": index,
            "weight": source((config.dim, config.in_channels, *config.patch_size), dtype, 0.0, fan_in**-0.5),
            "bias": source((config.dim,), dtype, 0.0, 0.1),
        },
    )


def _head(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    source, width = normal(device), shape.config.dim
    features = shape.latent_channels * shape.pixels
    window = source((1, shape.tokens, width), dtype, 0.1, 0.8)
    shift, scale = source((1, 2, 2, width), torch.float32, 0.0, 0.3).unbind(2)
    index = [-1] * shape.given + list(shape.index[shape.given :])
    arguments = {
        "x": window[:, shape.given * shape.block_len :],
        "weight": source((features, width), dtype, 0.0, width**-0.5),
        "bias": source((features,), dtype, 0.0, 0.1),
        "shift": shift,
        "scale": scale,
        "latents": _stores(shape, device)[0],
        "slots": torch.tensor(index[shape.given :], device=device),
        "block_map": block_map(shape, device)[shape.given :],
        "step": torch.full((), STEP, device=device),
        "grid": (shape.height, shape.width),
    }
    extra = {"window": window, "index": torch.tensor(index, dtype=torch.int32, device=device)}
    return Inputs(shape, arguments, {**extra, "block_map": block_map(shape, device)})


def _feed_forward(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    source, width, hidden = normal(device), shape.config.dim, shape.config.ffn_dim
    return Inputs(
        shape,
        {
            "x": source((1, shape.tokens, width), dtype, 0.1, 0.8),
            "weight": source((hidden, width), dtype, 0.0, width**-0.5),
            "bias": source((hidden,), dtype, 0.0, 0.1),
        },
    )


def _adaln(update: bool, norm: bool) -> Callable[[Shape], Cost]:
    return lambda s: adaln_cost(1, s.tokens, s.config.dim, update=update, norm=norm, itemsize=ITEMSIZE)


def _embed_cost(s: Shape) -> Cost:
    features, unread = s.config.in_channels * s.pixels, s.mask_channels * s.pixels
    return embed_cost(1, s.tokens, features, s.config.dim, unread, ITEMSIZE, STORE_ITEMSIZE)


def _project_cost(s: Shape) -> Cost:
    tokens, features = s.targets * s.block_len, s.latent_channels * s.pixels
    return project_cost(1, tokens, s.config.dim, features, ITEMSIZE, STORE_ITEMSIZE)


OPS = (
    Op("norm_modulate", eager.norm_modulate, _tokens("x", "shift", "scale"), _adaln(False, True)),
    Op("gated_residual", eager.gated_residual, _tokens("x", "update", "gate"), _adaln(True, False)),
    Op(
        "gated_residual_norm_modulate",
        eager.gated_residual_norm_modulate,
        _tokens("x", "update", "gate", "shift", "scale"),
        _adaln(True, True),
    ),
    Op(
        "gated_residual_norm_modulate, affine",
        eager.gated_residual_norm,
        _tokens("x", "update", "gate", "weight", "bias"),
        _adaln(True, True),
    ),
    Op(
        "qk_norm_rope",
        eager.qk_norm_rope,
        _queries,
        lambda s: rope_cost(1, s.tokens, s.config.dim, itemsize=ITEMSIZE),
    ),
    Op("embed_window", eager.embed_window, _window, _embed_cost, whole=True),
    Op("project_step", eager.project_step, _head, _project_cost, whole=True),
    Op(
        "linear_gelu",
        eager.linear_gelu,
        _feed_forward,
        lambda s: linear_cost(s.tokens, s.config.dim, s.config.ffn_dim, ITEMSIZE),
        compute_bound=True,
    ),
)
