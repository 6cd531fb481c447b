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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness.timing import Timer, without_tf32
from bench.operators.check import relative_error
from bench.records.outcome import FAILURES, failure
from bench.vae.shapes import Shape
from model.memory.vae_plan import META, SETTLED, meta_vae
from model.vae.model import WHOLE
from swifti2v_kernels import causal_conv3d, frames_out, pretend_gpu, rms_norm_silu, upsample_conv2d
from swifti2v_kernels.common.dispatch import ENVIRONMENT_VARIABLE
from swifti2v_kernels.conv.causal_conv3d import cost as conv_cost
from swifti2v_kernels.conv.frames_out import cost as frames_cost
from swifti2v_kernels.conv.upsample_conv2d import cost as upsample_cost

#: Relative L2 error against float32 above which a layer is wrong: its result is rounded once, and so is its norm.
TOLERANCE = 1e-2
CUDNN = "cudnn"
BACKENDS = {"swifti2v": "triton", CUDNN: "torch"}


@dataclass(frozen=True)
class Layer:
    """One call of a convolution."""

    operator: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    channels: int
    columns: int
    #: Size of the input; ``past`` counts the frames before it.
    frames: int
    height: int
    width: int
    past: int = 0
    #: Operations fused after the convolution, and whether the sum itself is stored.
    norm: bool = False
    residual: bool = False
    keep_sum: bool = True
    #: ``frames_out``: pixels in each direction of a feature pixel.
    patch_size: int = 1

    @property
    def table_key(self) -> dict[str, Any]:
        """The key of the layer in ``configs/conv3d.json``."""
        kernel = {"upsample_conv2d": "upsample", "frames_out": "frames"}.get(self.operator, list(self.kernel))
        pixels = self.frames * self.height * self.width
        return {"kernel": kernel, "channels": [self.channels, self.columns], "pixels": pixels}

    @property
    def result_size(self) -> tuple[int, int, int]:
        """The result's frames, rows and columns, before patches are unfolded."""
        scale = 2 if self.operator == "upsample_conv2d" else 1
        sides = zip((self.height, self.width), self.kernel[-2:], self.padding[::2], self.padding[1::2], strict=True)
        spans = (scale * size - taps + before + after for size, taps, before, after in sides)
        rows, columns = (span // step + 1 for span, step in zip(spans, self.stride[1:], strict=True))
        return self.frames // self.stride[0], rows, columns

    @property
    def result_pixels(self) -> int:
        """The number of pixels of all frames of the result, before patches are unfolded."""
        return math.prod(self.result_size)

    @property
    def flops(self) -> int:
        """The number of operations; a multiply-add is two."""
        taps = math.prod(self.kernel)
        if self.operator == "upsample_conv2d":
            return upsample_cost(self.result_pixels, self.channels, self.columns).flops
        if self.operator == "frames_out":
            return frames_cost(self.result_pixels, self.channels, taps, self.patch_size).flops
        return conv_cost(self.result_pixels, self.channels, self.columns, taps).flops

    def __str__(self) -> str:
        taps = "x".join(map(str, self.kernel))
        steps = "" if set(self.stride) <= {1} else f"/{'x'.join(map(str, self.stride))}"
        extras = "".join(f" + {name}" for name in ("residual", "norm") if getattr(self, name))
        extras += " alone" * (self.norm and not self.keep_sum) + f", {self.past} before" * (self.past > 0)
        size = f"{self.frames} x {self.width}x{self.height}"
        return f"{self.operator} {taps}{steps}, {self.channels} to {self.columns}, {size}{extras}"


class Recorder(TorchDispatchMode):
    """A mode that counts convolutions by their layers: ``with Recorder() as recorder: ...; recorder.calls``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Layer] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        if namespace == "swifti2v" and name in ("causal_conv3d", "upsample_conv2d", "frames_out"):
            names = [argument.name for argument in func._schema.arguments]
            self.calls[_layer(name, dict(zip(names, args, strict=False)) | (kwargs or {}))] += 1
        return func(*args, **(kwargs or {}))


def _layer(name: str, given: dict[str, Any]) -> Layer:
    x, past, patch_size = given["x"], given.get("past"), given.get("patch_size", 1)
    if name == "upsample_conv2d":
        kernel, columns = (3, 3), given["phases"].shape[1]
    else:
        kernel, columns = tuple(given["weight"].shape[2:]), given["weight"].shape[0]
    return Layer(
        name, kernel, tuple(given.get("stride", (1, 1, 1))), tuple(given["padding"]), x.shape[4], columns,
        *x.shape[1:4], past=0 if past is None else past.shape[1], norm=given.get("norm_weight") is not None,
        residual=given.get("residual") is not None, keep_sum=given["out"] is not None, patch_size=patch_size,
    )  # fmt: skip


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


def settled_layers(shape: Shape, part: str) -> Counter[Layer]:
    """Returns the convolutions of one settled latent frame, and how often each is called."""
    with Recorder() as recorder:
        settle(shape, part, lambda: recorder.calls.clear())
    return recorder.calls


def measure_layer(
    layer: Layer, calls: int, where: str, dtype: torch.dtype, device: torch.device, timer: Timer | None, matmul: float
) -> list[dict[str, Any]]:
    """Returns a row for each implementation, checked against float32, then timed in turns if both are right.

    Without a ``timer`` they are only checked.
    """
    base: dict[str, Any] = {"where": where, "layer": str(layer), "dtype": str(dtype).removeprefix("torch.")}
    base |= {"calls": calls, "flops": layer.flops, **layer.table_key}
    rows = {name: {**base, "provider": name, "ours": name != CUDNN} for name in BACKENDS}
    try:
        arguments = make_inputs(layer, dtype, device)
        with without_tf32():
            wide = {name: t.float() if isinstance(t, Tensor) else t for name, t in arguments.items()}
            expected = numbers(call(layer, wide, "torch"))
        del wide
        for name, backend in BACKENDS.items():
            found = numbers(call(layer, arguments, backend))
            error = relative_error(found, expected)
            del found
            rows[name]["error"] = error if math.isfinite(error) else None
            if not error < TOLERANCE:
                return _all(
                    rows, {"status": "wrong", "reason": f"{name}: error {error:.1e} against float32; not timed"}
                )
        del expected
        if timer is None:
            return _all(rows, {"status": "ok"})
        calls_of = {name: functools.partial(call, layer, arguments, backend) for name, backend in BACKENDS.items()}
        for name, timing in timer(calls_of).items():
            tflops = layer.flops / timing.median / 1e12
            rows[name] |= {**timing.row(), "tflops": tflops, "fraction_of_matmul": tflops / matmul, "status": "ok"}
    except FAILURES as error:
        return _all(rows, failure(error))
    return list(rows.values())


def _all(rows: dict[str, dict[str, Any]], found: dict[str, str]) -> list[dict[str, Any]]:
    return [row | found for row in rows.values()]


def make_inputs(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Returns tensors for a layer, scaled so that results are as large as inputs."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    x = random(1, layer.frames, layer.height, layer.width, layer.channels)
    past = random(1, layer.past, *x.shape[2:]) if layer.past else None
    scale = (math.prod(layer.kernel) * layer.channels) ** -0.5
    arguments: dict[str, Any] = {"x": x, "bias": random(layer.columns), "padding": layer.padding}
    if layer.operator == "upsample_conv2d":
        # A phase has four taps, of which each stands for several of the nine.
        phases = 1.5 * scale * random(4, layer.columns, 2, 2, layer.channels)
        return arguments | {"phases": phases} | _fused(layer, random)
    weight = scale * random(layer.columns, layer.channels, *layer.kernel)
    arguments |= {"weight": weight.contiguous(memory_format=torch.channels_last_3d), "past": past}
    if layer.operator == "frames_out":
        frames, *size = layer.result_size
        rows, columns = (layer.patch_size * n for n in size)
        out = torch.zeros(1, frames, rows, columns, 3, dtype=torch.uint8, device=device)
        return arguments | {"out": out, "patch_size": layer.patch_size}
    return arguments | {"stride": layer.stride, "keep_sum": layer.keep_sum} | _fused(layer, random)


def _fused(layer: Layer, random: Callable[..., Tensor]) -> dict[str, Any]:
    residual = random(1, *layer.result_size, layer.columns) if layer.residual else None
    return {"norm_weight": 1 + 0.1 * random(layer.columns) if layer.norm else None, "residual": residual}


def numbers(results: Sequence[Tensor]) -> list[Tensor]:
    """Converts results to float32; uint8 holds 127.5 v + 127.5."""
    return [y.float() / 127.5 - 1 if y.dtype == torch.uint8 else y.float() for y in results]


def call(layer: Layer, arguments: dict[str, Any], backend: str) -> list[Tensor]:
    """Runs the layer by a backend; returns all its results."""
    arguments = dict(arguments)
    if layer.operator == "frames_out":
        out = arguments["out"]
        if arguments["x"].dtype == torch.float32:  # the exact one, before rounding
            arguments["out"] = out.float()
        weight, bias = arguments.pop("weight"), arguments.pop("bias")
        y = frames_out(arguments.pop("x"), weight, bias, arguments.pop("out"), **arguments, backend=backend)
        return [y if y.dtype == torch.uint8 else y.clamp(-1, 1)]
    norm_weight = arguments["norm_weight"]
    apart = backend == "torch" and norm_weight is not None
    if apart:
        arguments |= {"norm_weight": None}
        if "keep_sum" in arguments:
            arguments["keep_sum"] = True
    if layer.operator == "upsample_conv2d":
        y = upsample_conv2d(arguments.pop("x"), arguments.pop("phases"), **arguments, backend=backend)
    else:
        y = causal_conv3d(arguments.pop("x"), arguments.pop("weight"), **arguments, backend=backend)
    if apart:
        normed = rms_norm_silu(y, norm_weight)
        return [y, normed] if layer.keep_sum else [normed]
    return list(y) if isinstance(y, tuple) else [y]


def table_entries(environment: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns entries of ``configs/conv3d.json`` from measured rows.

    Layers that differ only in what is fused after them share one: the mean of their calls.
    """
    major, minor = environment["gpu"]["capability"]
    head = {"capability": 10 * major + minor}
    sums: dict[str, tuple[dict[str, Any], Counter[str], Counter[str]]] = {}
    for row in rows:
        if row["status"] == "ok":
            entry = {**head, **{name: row[name] for name in ("dtype", "kernel", "channels", "pixels")}}
            _, seconds, calls = sums.setdefault(repr(entry), (entry, Counter(), Counter()))
            seconds[row["provider"]] += row["calls"] * row["seconds"]
            calls[row["provider"]] += row["calls"]
    return [
        {**entry, "card": environment["device"], "seconds": {name: s / calls[name] for name, s in seconds.items()}}
        for entry, seconds, calls in sums.values()
    ]


def unique_layers(shapes: Sequence[Shape], parts: Sequence[str]) -> list[tuple[Layer, int, str]]:
    """Returns all layers of all shapes, each once, with its calls and the place where it was met first."""
    found: dict[Layer, tuple[int, str]] = {}
    for shape in {(s.version, s.width, s.height): s for s in shapes}.values():
        for part in parts:
            for layer, calls in settled_layers(shape, part).items():
                found.setdefault(layer, (calls, f"{shape.version}, {part}, {shape.name}"))
    return [(layer, calls, where) for layer, (calls, where) in found.items()]
