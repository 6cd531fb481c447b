"""The VAE's convolutions one by one: which there are, and each by our kernel and by cuDNN.

Layers are recorded from the model itself, run on ``meta`` tensors of the real sizes, one settled latent frame. cuDNN's
time is that of all that stands in for the kernel's one call: history concatenated, borders padded, the convolution, the
residual added, the norm (by our own kernel for it), the last one's clamp and rounding.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

import swifti2v_kernels
from bench.harness.timing import Ceilings, Timer, without_tf32
from bench.operators.check import TOLERANCE, leaves
from bench.operators.compare import compare_case
from bench.operators.peers import Peer
from bench.vae.shapes import Shape
from model.memory.vae_plan import META, SETTLED, meta_vae
from model.vae.model import WHOLE
from swifti2v_kernels import pretend_gpu, rms_norm_silu
from swifti2v_kernels.common.case import Arguments, Case, Cost, RealSize, Work
from swifti2v_kernels.common.dispatch import ENVIRONMENT_VARIABLE

#: The convolutions, and what ``configs/conv3d.json`` calls a kernel that is not told by its taps.
OPERATORS = {"causal_conv3d": "", "upsample_conv2d": "upsample", "frames_out": "frames"}


@dataclass
class Layer:
    """A convolution: the operator, its arguments without memory, and how often and where first it is called."""

    operator: str
    arguments: dict[str, Any]
    cost: Cost
    calls: int = 0
    where: str = ""

    def row(self) -> dict[str, Any]:
        """Returns what rows of the layer have in common, its key in ``configs/conv3d.json`` among it."""
        given = self.arguments
        x, past, stride = given["x"], given.get("past"), given.get("stride", (1,))
        weight = given.get("weight")
        kernel, columns = ((3, 3), given["phases"].shape[1]) if weight is None else (weight.shape[2:], weight.shape[0])
        _, frames, height, width, channels = x.shape
        name = f"{self.operator} {'x'.join(map(str, kernel))}"
        name += f"/{'x'.join(map(str, stride))}" if max(stride) > 1 else ""
        name += f", {channels} to {columns}, {frames} x {width}x{height}"
        name += " + residual" if given.get("residual") is not None else ""
        name += " + norm" if given.get("norm_weight") is not None else ""
        name += "" if given.get("keep_sum", True) else " alone"
        name += "" if past is None else f", {past.shape[1]} before"
        return {
            "where": self.where, "layer": name, "dtype": str(x.dtype).removeprefix("torch."), "calls": self.calls,
            "kernel": OPERATORS[self.operator] or list(kernel), "channels": [channels, columns],
            "pixels": math.prod(x.shape[:4]),
        }  # fmt: skip

    def case(self) -> Case:
        """Returns the layer as a case whose small size is the real one."""

        def inputs(device: torch.device) -> Arguments:
            def new(x: Tensor) -> Tensor:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

            return (), tree_map_only(Tensor, new, self.arguments)

        name, operator = self.row()["layer"], getattr(swifti2v_kernels, self.operator)
        return Case(name, operator, inputs, lambda constants: Work(0, 0), RealSize(name, inputs, self.cost))


class Recorder(TorchDispatchMode):
    """A mode that keeps convolutions by their names: ``with Recorder() as recorder: ...; recorder.layers``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, Layer] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, name = func.name().split("::")
        if namespace == "swifti2v" and name in OPERATORS:
            names = (argument.name for argument in func._schema.arguments)
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            written = {out: given[out] for out in ("out", "normed") if given.get(out) is not None}
            read = [x for key, x in given.items() if isinstance(x, Tensor) and key not in written]
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            cost = Cost(flops, sum(x.nbytes for x in read), sum(x.nbytes for x in written.values()))
            if name == "causal_conv3d" and given["norm_weight"] is not None:
                given["keep_sum"] = "out" in written
            if name != "frames_out":  # which alone is given its memory; the others make it
                del given["out"], given["normed"]
            layer = Layer(name, given | {"backend": "triton"}, cost)
            self.layers.setdefault(layer.row()["layer"], layer).calls += 1
        return result


@contextmanager
def all_kernels() -> Iterator[None]:
    """Makes ``meta`` tensors take our kernels' operators while the block runs, whatever was measured as faster."""
    with pretend_gpu(90), patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "triton"}):
        yield


def settle(shape: Shape, part: str, settled: Callable[[], None]) -> None:
    """Runs a clip on ``meta`` tensors a latent frame at a time, in bfloat16; calls ``settled`` before the last one."""
    rows, columns = shape.latent_size
    vae = meta_vae(shape.config, torch.bfloat16)

    def pieces() -> Iterator[Tensor]:
        for i in range(SETTLED):
            if i == SETTLED - 1:
                settled()
            frames = shape.config.temporal_stride if i else 1
            size = (
                (shape.config.z_dim, 1, rows, columns) if part == "decode" else (3, frames, shape.height, shape.width)
            )
            yield torch.empty(1, *size, dtype=torch.bfloat16, device=META)

    with torch.no_grad(), all_kernels():
        stream = vae.decode_frames(pieces(), WHOLE) if part == "decode" else vae.encode_stream(pieces(), WHOLE)
        for piece in stream:
            del piece


def settled_layers(shape: Shape, part: str) -> list[Layer]:
    """Returns the convolutions of one settled latent frame."""
    with Recorder() as recorder:
        settle(shape, part, recorder.layers.clear)
    return [*recorder.layers.values()]


def unique_layers(shapes: Sequence[Shape], parts: Sequence[str]) -> list[Layer]:
    """Returns all layers of all shapes, each once, with the place where it was met first."""
    found: dict[str, Layer] = {}
    for shape in {(s.version, s.width, s.height): s for s in shapes}.values():
        for part in parts:
            for layer in settled_layers(shape, part):
                layer.where = f"{shape.version}, {part}, {shape.name}"
                found.setdefault(layer.row()["layer"], layer)
    return [*found.values()]


def layer_rows(layer: Layer, device: torch.device, timer: Timer, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Returns a row for each implementation, checked against float32, then timed in turns with the other."""
    case = layer.case()
    peers = (Peer("swifti2v", case.operator, ours=True), Peer("cudnn", _by_cudnn(case.operator)))
    rows = compare_case(case, peers, device, timer, ceilings, _in_float32, shared=True)
    return [layer.row() | row for row in rows]


def _in_float32(case: Case, inputs: Arguments) -> tuple[list[Tensor], float, Callable[[Any], list[Tensor]]]:
    """Returns the results in float32: float64 would take convolutions of this size too long, and too much memory."""

    def numbers(result: Any) -> list[Tensor]:
        return [x.float() for x in leaves(result)]

    wide = {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs[1].items()}
    with without_tf32():
        expected = numbers(case.operator(**wide | {"backend": "torch"}))
    return expected, TOLERANCE[torch.bfloat16], numbers


def _by_cudnn(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the operator by cuDNN, with its parameters; the norm is our own kernel's all the same."""

    @functools.wraps(operator)
    def call(*, norm_weight: Tensor | None = None, keep_sum: bool = True, backend: str = "", **given: Any) -> Any:
        y = operator(**given, backend="torch")
        if norm_weight is None:
            return y
        normed = rms_norm_silu(y, norm_weight)
        return (y, normed) if keep_sum else normed

    return call


def table_entries(environment: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns entries of ``configs/conv3d.json`` from measured rows.

    Layers that differ only in what is fused after them share one: the mean of their calls.
    """
    major, minor = environment["gpu"]["capability"]
    sums: dict[str, tuple[dict[str, Any], Counter[str], Counter[str]]] = {}
    for row in rows:
        if row["status"] == "ok":
            entry = {"capability": 10 * major + minor}
            entry |= {name: row[name] for name in ("dtype", "kernel", "channels", "pixels")}
            _, seconds, calls = sums.setdefault(str(entry), (entry, Counter(), Counter()))
            seconds[row["provider"]] += row["calls"] * row["seconds"]
            calls[row["provider"]] += row["calls"]
    return [
        {**entry, "card": environment["device"], "seconds": {name: s / calls[name] for name, s in seconds.items()}}
        for entry, seconds, calls in sums.values()
        if len(seconds) == 2
    ]
