"""One layer of the DiT, ours and diffusers', on the same weights and the same window.

Our layer runs as ``WanDiT.run`` calls it: keys and values of the whole window, then the rest part by part, in a planned
workspace; it begins with the layer's norm done and ends with that of the next. Its text keys and values, and its
modulation, belong to the clip and are made before; diffusers' ``WanTransformerBlock`` projects the text and adds its
table in every call, as it does in its model.

Activations are all that a layer needs beyond weights and what a step makes once for all layers (text, modulation,
rotary tables): the residual stream counts, and of ours the whole workspace.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.dit.shapes import Shape
from bench.operators.eager import EPS, rotary_tables
from bench.operators.peers import library
from model.dit.layer import DiTLayer
from model.dit.model import FLOAT32_PARAMETERS
from model.dit.workspace import Part, Workspace, plan_parts
from swifti2v_kernels import Rope3D, norm_modulate, rope_3d, use_backend
from swifti2v_kernels.integrations.diffusers import accelerate

TIMESTEPS = ("one", "per block")


@dataclass(frozen=True)
class LayerInputs:
    """A layer with random weights and what its call reads. ``timesteps`` is one of ``TIMESTEPS``."""

    shape: Shape
    timesteps: str
    layer: DiTLayer
    x: Tensor  # [1, L, C]
    text: Tensor  # [1, text, C], after the text embedder
    rows: Tensor  # [1, 2, 6, C]: the embedded timesteps of given and noisy blocks, without the layer's table
    following: Tensor  # [1, 2, 6, C]: modulation of the next layer
    block_map: Tensor
    rope: Rope3D

    @property
    def modulation(self) -> Tensor:
        """The layer's modulation, [1, 2, 6, C], in float32 at least."""
        return self.layer.scale_shift_table.unsqueeze(1) + self.rows


def layer_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, timesteps: str) -> LayerInputs:
    """Returns a layer with its inputs, the weights random of the usual magnitude; biases and norms do something."""
    generator, config = None if device.type == "meta" else torch.Generator(device).manual_seed(0), shape.config

    def source(size: Sequence[int], dtype: torch.dtype, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        x = torch.empty(size, dtype=dtype, device=device)
        return x if generator is None else x.normal_(mean, deviation, generator=generator)

    with nullcontext() if device.type == "cpu" else device:
        layer = DiTLayer(config)
    state = {}
    for name, parameter in layer.state_dict().items():
        target = torch.float32 if any(part in name for part in FLOAT32_PARAMETERS) and dtype.itemsize < 4 else dtype
        # Queries of this size make each attend to a few keys: flat attention would hide its errors in an average.
        mean = 3.0 if "norm_q" in name else float(name.endswith("weight") and parameter.ndim == 1)
        state[name] = source(parameter.shape, target, mean, 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    layer.load_state_dict(state, assign=True)
    layer.requires_grad_(False)
    x = source((1, shape.tokens, config.dim), dtype, 0.1, 0.8)
    text = source((1, shape.text, config.dim), dtype, 0.0, 0.5)
    # Rounded to the dtype, in which diffusers' model has them.
    rows = source((1, 2, 6, config.dim), dtype, 0.0, 0.3).float()
    if timesteps == "one":
        rows = rows[:, :1].repeat(1, 2, 1, 1)
    following = source((1, 2, 6, config.dim), torch.float32, 0.0, 0.3)
    rope = rope_3d(range(shape.blocks), shape.height, shape.width, config.head_dim, device=device)
    block_map = torch.tensor([0] * shape.given + [1] * shape.targets, dtype=torch.int32, device=device)
    return LayerInputs(shape, timesteps, layer, x, text, rows, following, block_map, rope)


class OwnLayer:
    """The model's own layer, on our kernels."""

    def __init__(self, inputs: LayerInputs):
        self.inputs = inputs
        self.context = inputs.layer.attn2.context(inputs.text)
        self.modulation = inputs.modulation
        shape = inputs.shape
        self.parts = plan_parts(1, shape.block_len, range(shape.blocks), shape.part)
        self.workspace: Workspace | None = None

    def load(self) -> None:
        """Plans the workspace anew and fills the residual stream and its norm."""
        inputs, shape = self.inputs, self.inputs.shape
        self.drop()
        self.workspace = Workspace.plan(
            shape.config, 1, shape.blocks, shape.block_len, dtype=inputs.text.dtype, device=inputs.x.device,
            max_tokens=shape.part,
        )  # fmt: skip
        x, n = (self.workspace.take(name, *inputs.x.shape) for name in "xn")
        shift, scale = self.modulation[:, :, 0], self.modulation[:, :, 1]
        norm_modulate(x.copy_(inputs.x), shift, scale, block_map=inputs.block_map, eps=EPS, out=n)

    def step(self) -> tuple[Tensor, ...]:
        """Runs one layer in place; returns the residual stream and its norm for the next layer."""
        inputs, workspace = self.inputs, self.workspace
        assert workspace is not None
        x, n, k, v = (workspace.take(name, *inputs.x.shape) for name in "xnkv")
        inputs.layer(
            x, n, (k, v), None, [self.context], inputs.rope, self.modulation, inputs.following, inputs.block_map,
            self.parts, workspace,
        )  # fmt: skip
        return x, n

    def drop(self) -> None:
        """Frees the workspace of our operators."""
        self.workspace = None

    def attentions(self) -> dict[str, tuple[Any, str]]:
        """Returns both attentions with the projections of their queries and of their results."""
        return {"self": (self.inputs.layer.attn1, "attend"), "cross": (self.inputs.layer.attn2, "attend")}


class DiffusersLayer:
    """diffusers' ``WanTransformerBlock``, eager or compiled, on the same weights.

    Its attention is torch's, which chooses among its own kernels; with ``cudnn`` cuDNN's goes first. ``accelerated``:
    the layer is as users have it after ``swifti2v_kernels.integrations.diffusers.accelerate``.

    Raises:
        Unavailable: diffusers is not installed.
    """

    def __init__(self, compiled: bool, inputs: LayerInputs, cudnn: bool = False, accelerated: bool = False):
        module = library("diffusers.models.transformers.transformer_wan")
        self.inputs, config = inputs, inputs.shape.config
        with torch.device("meta"):
            layer = module.WanTransformerBlock(
                config.dim, config.ffn_dim, config.num_heads, cross_attn_norm=config.cross_attn_norm, eps=config.eps
            )
        layer.load_state_dict(inputs.layer.state_dict(), assign=True)
        self.layer = layer.requires_grad_(False)
        if accelerated:
            with redirect_stdout(io.StringIO()):  # its report
                accelerate(layer)
        self.call = layer
        if compiled:
            torch.compiler.reset()  # otherwise the limit of recompilations counts over all sizes
            self.call = torch.compile(layer, dynamic=False)
        self.rope = rotary_tables(inputs.rope)
        self.modulation = inputs.rows[:, 1]
        if inputs.timesteps != "one":
            rows = inputs.rows.to(inputs.x.dtype)[:, inputs.block_map.long()]
            self.modulation = rows.repeat_interleave(inputs.shape.block_len, dim=1)
        self.x: Tensor | None = None
        self.attention = _cudnn_first if cudnn else nullcontext

    def load(self) -> None:
        """Copies the residual stream from the inputs, as it was at first."""
        self.x = self.inputs.x.clone()

    def step(self) -> tuple[Tensor, ...]:
        """Runs one layer; the stream that comes in stays alive, as in diffusers' loop."""
        with self.attention():
            return (self.call(self.x, self.inputs.text, self.modulation, self.rope),)

    def drop(self) -> None:
        """Frees the residual stream on the device."""
        self.x = None

    def attentions(self) -> dict[str, tuple[Any, str]]:
        """Returns both attentions with all of their projections, those of keys and values too."""
        return {"self": (self.layer.attn1, "forward"), "cross": (self.layer.attn2, "forward")}


#: An implementation, ready to be called again and again.
Runner = OwnLayer | DiffusersLayer


@dataclass(frozen=True)
class LayerProvider:
    """An implementation of the layer; ``ours``: the model's own layer."""

    name: str
    prepare: Callable[[LayerInputs], Runner]
    ours: bool = False


def _cudnn_first() -> AbstractContextManager[None]:
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


COMPILED = "diffusers, torch.compile"
ACCELERATED = "diffusers, accelerate()"
LAYER_PROVIDERS = (
    LayerProvider("swifti2v", OwnLayer, ours=True),
    LayerProvider("diffusers, eager", functools.partial(DiffusersLayer, False)),
    LayerProvider(COMPILED, functools.partial(DiffusersLayer, True)),
    LayerProvider(f"{COMPILED}, cuDNN attention", functools.partial(DiffusersLayer, True, cudnn=True)),
    LayerProvider(ACCELERATED, functools.partial(DiffusersLayer, False, accelerated=True)),
    LayerProvider(f"{ACCELERATED}, torch.compile", functools.partial(DiffusersLayer, True, accelerated=True)),
)


def exact_rows(inputs: LayerInputs, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, in float64 for some tokens, the residual stream after the layer and its norm for the next.

    They are made by the model's own layer on its PyTorch paths, which the test suite holds against diffusers'.
    """
    # The stream itself is widened where it is copied to the workspace: another copy would take a GB.
    wide = {name: getattr(inputs, name).double() for name in ("text", "rows", "following")}
    layer, size = copy.deepcopy(inputs.layer).double(), inputs.shape.block_len
    with use_backend("torch"):
        runner = OwnLayer(replace(inputs, layer=layer, **wide))
        # The keys and values are those of all tokens, the rest of these alone: all would take minutes.
        runner.parts = [Part(0, t, t + 1, t // size, t // size + 1) for t in tokens.tolist()]
        runner.load()
        x, n = runner.step()
    return x[:, tokens], n[:, tokens]
