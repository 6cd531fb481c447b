"""Calls of convolutions as the Wan VAEs make them, with which their kernels are compiled, checked, timed and tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.case import Arguments, Case, RealSize
from ..common.cost import Work
from .causal_conv3d import causal_conv3d
from .causal_conv3d import cost as conv_cost
from .checks import output_size
from .frames_out import cost as frames_cost
from .frames_out import frames_out
from .upsample_conv2d import cost as upsample_cost
from .upsample_conv2d import upsample_conv2d


class _ConvInputs(NamedTuple):
    """The tensors of one case: a tile with a halo on two sides within larger frames, and its history."""

    channels: int
    columns: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    norm: bool = False
    residual: bool = False
    stride: tuple[int, int, int] = (1, 1, 1)
    #: The history lies in memory of another layout.
    mixed: bool = False
    dtype: torch.dtype = torch.bfloat16
    frames: int = 4
    #: Rows and columns of the tile.
    size: tuple[int, int] = (20, 32)
    new: Callable[..., Tensor] = torch.ones

    def __call__(self, device: torch.device) -> Arguments:
        rows, columns = self.size

        def ones(*shape: int) -> Tensor:
            return self.new(shape, dtype=self.dtype, device=device)

        def tile(frames: int) -> Tensor:
            return ones(1, frames, rows + 4, columns + 16, self.channels)[:, :, 2:-2, 4:-12]

        x = tile(self.frames)
        weight = ones(self.columns, *self.kernel, self.channels).permute(0, 4, 1, 2, 3)
        past = ones(1, 2, rows, columns, self.channels) if self.mixed else tile(2)
        options: dict[str, object] = {"padding": (1, 0, 1, 0) if self.kernel[1] == 3 else None, "backend": "triton"}
        options |= {"stride": self.stride, "past": past[:, : self.kernel[0] - 1] if self.kernel[0] > 1 else None}
        size = output_size(x, weight, self.stride, (1, 0, 1, 0) if self.kernel[1] == 3 else (0, 0, 0, 0))
        if self.norm:
            options |= {"norm_weight": ones(self.columns), "keep_sum": self.residual}
        if self.residual:
            residual = ones(1, *size, self.columns)
            options |= {"residual": residual, "out": residual}
        return (x, weight, ones(self.columns)), options


def _work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one step of channels of one tap: pixels and weights of 16 bits.

    The norm of many channels is a kernel of its own, without matrix multiplications.
    """
    if "BLOCK_N" not in constants:
        return Work(0, 2 * 2 * constants["C"] * constants["BLOCK_M"])
    rows, columns, depth = constants["BLOCK_M"], constants["BLOCK_N"] + constants.get("TAIL_N", 0), constants["BLOCK_K"]
    return Work(rows * columns * depth, 2 * (rows + columns) * depth)


def _work_float32(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one step in float32, whose matrix multiplications the tensor cores do not take."""
    rows, columns, depth = constants["BLOCK_M"], constants["BLOCK_N"] + constants["TAIL_N"], constants["BLOCK_K"]
    return Work(0, 4 * (rows + columns) * depth)


def _conv_real(inputs: _ConvInputs, frames: int, rows: int, columns: int) -> RealSize:
    """Returns a call as the decoder of Wan2.1 (up to 384 channels) or 2.2 makes it for 2560x1408, one latent frame."""
    whole = inputs._replace(frames=frames, size=(rows, columns), new=torch.empty)
    pixels, results = frames * rows * columns, 1 + (inputs.norm and inputs.residual)
    least = conv_cost(
        pixels, inputs.channels, inputs.columns, math.prod(inputs.kernel), residual=inputs.residual, results=results
    )
    return RealSize(f"decode 2560x1408, {frames} x {columns}x{rows}", whole, least)


_CONV_TIMED = {
    "C96 norm": _conv_real(_ConvInputs(96, 96, norm=True), 4, 1408, 2560),
    "C96 residual norm": _conv_real(_ConvInputs(96, 96, norm=True, residual=True), 4, 1408, 2560),
    "C192 norm": _conv_real(_ConvInputs(192, 192, norm=True), 4, 704, 1280),
    "C192 residual norm": _conv_real(_ConvInputs(192, 192, norm=True, residual=True), 4, 704, 1280),
    "C384 residual": _conv_real(_ConvInputs(384, 384, residual=True), 2, 352, 640),
    "C1024 residual": _conv_real(_ConvInputs(1024, 1024, residual=True), 2, 176, 320),
    "C512 to C256": _conv_real(_ConvInputs(512, 256), 4, 704, 1280),
    "C256 residual": _conv_real(_ConvInputs(256, 256, residual=True), 4, 704, 1280),
}


_CONV_CASES = [
    Case(
        f"causal_conv3d {name}",
        causal_conv3d,
        inputs,
        _work_float32 if inputs.dtype == torch.float32 else _work,
        _CONV_TIMED.get(name),
    )
    for name, inputs in {
        "C96 norm": _ConvInputs(96, 96, norm=True),
        "C96 residual norm": _ConvInputs(96, 96, norm=True, residual=True),
        "C192 norm": _ConvInputs(192, 192, norm=True),
        "C192 residual norm": _ConvInputs(192, 192, norm=True, residual=True),
        "C192 residual norm, history elsewhere": _ConvInputs(192, 192, norm=True, residual=True, mixed=True),
        "C160 residual norm": _ConvInputs(160, 160, norm=True, residual=True),
        "C384 residual": _ConvInputs(384, 384, residual=True),
        "C1024 residual": _ConvInputs(1024, 1024, residual=True),
        "C512 to C256": _ConvInputs(512, 256),
        "C256 residual": _ConvInputs(256, 256, residual=True),
        "C16 to C384": _ConvInputs(16, 384),
        "C48 to C1024": _ConvInputs(48, 1024),
        "C192 to C384 pointwise": _ConvInputs(192, 384, (1, 1, 1)),
        "C384 in time": _ConvInputs(384, 384, (3, 1, 1)),
        "C192 half frames": _ConvInputs(192, 192, (1, 3, 3), stride=(1, 2, 2)),
        "C192 half rate": _ConvInputs(192, 192, (3, 1, 1), stride=(2, 1, 1)),
        "C96 residual norm float16": _ConvInputs(96, 96, norm=True, residual=True, dtype=torch.float16),
        "C96 norm float32": _ConvInputs(96, 96, norm=True, dtype=torch.float32),
        "C192 residual float32": _ConvInputs(192, 192, residual=True, dtype=torch.float32),
        "C12, nothing aligned": _ConvInputs(12, 160),
    }.items()
]


class _UpsampleInputs(NamedTuple):
    """The tensors of one case: a tile with a halo on two sides."""

    channels: int
    columns: int
    norm: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.bfloat16
    frames: int = 2
    #: Rows and columns of the tile.
    size: tuple[int, int] = (20, 32)
    new: Callable[..., Tensor] = torch.ones

    def __call__(self, device: torch.device) -> Arguments:
        rows, columns = self.size

        def ones(*shape: int) -> Tensor:
            return self.new(shape, dtype=self.dtype, device=device)

        options: dict[str, object] = {"padding": (1, 0, 1, 0), "backend": "triton"}
        if self.norm:
            options["norm_weight"] = ones(self.columns)
        if self.residual:
            residual = ones(1, self.frames, 2 * rows - 1, 2 * columns - 1, self.columns)
            options |= {"residual": residual, "out": residual}
        x = ones(1, self.frames, rows, columns, self.channels)
        return (x, ones(4, self.columns, 2, 2, self.channels), ones(self.columns)), options


def _upsample_real(inputs: _UpsampleInputs, frames: int, rows: int, columns: int) -> RealSize:
    """Returns a call as the decoder of Wan2.1 or 2.2 makes it for 2560x1408, one latent frame."""
    whole = inputs._replace(frames=frames, size=(rows, columns), new=torch.empty)
    least = upsample_cost(
        4 * frames * rows * columns, inputs.channels, inputs.columns, residual=inputs.residual, results=1 + inputs.norm
    )
    return RealSize(f"decode 2560x1408, {frames} x {columns}x{rows}", whole, least)


_UPSAMPLE_TIMED = {
    "C384 to C192 norm": _upsample_real(_UpsampleInputs(384, 192, norm=True), 4, 352, 640),
    "C192 to C96 norm": _upsample_real(_UpsampleInputs(192, 96, norm=True), 4, 704, 1280),
    "C512 residual": _upsample_real(_UpsampleInputs(512, 512, residual=True), 4, 352, 640),
}


_UPSAMPLE_CASES = [
    Case(
        f"upsample_conv2d {name}",
        upsample_conv2d,
        inputs,
        _work_float32 if inputs.dtype == torch.float32 else _work,
        _UPSAMPLE_TIMED.get(name),
    )
    for name, inputs in {
        "C384 to C192 norm": _UpsampleInputs(384, 192, norm=True),
        "C192 to C96 norm": _UpsampleInputs(192, 96, norm=True),
        "C512 residual": _UpsampleInputs(512, 512, residual=True),
        "C192 to C96 norm float16": _UpsampleInputs(192, 96, norm=True, dtype=torch.float16),
        "C192 to C96 float32": _UpsampleInputs(192, 96, dtype=torch.float32),
    }.items()
]


class _FramesInputs(NamedTuple):
    """The tensors of one case: a tile with a halo on two sides, into a part of larger frames."""

    channels: int
    patch_size: int = 1
    out: torch.dtype = torch.uint8
    dtype: torch.dtype = torch.bfloat16
    frames: int = 2
    #: Rows and columns of the tile.
    size: tuple[int, int] = (20, 32)
    new: Callable[..., Tensor] = torch.ones

    def __call__(self, device: torch.device) -> Arguments:
        p, (rows, columns) = self.patch_size, self.size
        x = self.new(1, self.frames, rows, columns, self.channels, dtype=self.dtype, device=device)
        weight = self.new(3 * p * p, 3, 3, 3, self.channels, dtype=self.dtype, device=device).permute(0, 4, 1, 2, 3)
        bias = torch.zeros(3 * p * p, dtype=self.dtype, device=device)
        height, width = (rows - 1) * p, (columns - 1) * p
        out = torch.zeros(1, self.frames + 1, height + 21 * p, width + 33 * p, 3, dtype=self.out, device=device)
        options: dict[str, object] = {"past": x[:, -2:], "padding": (1, 0, 1, 0), "patch_size": p, "backend": "triton"}
        return (x, weight, bias, out[:, 1:, :height, :width]), options


def _frames_real(inputs: _FramesInputs, rows: int, columns: int) -> RealSize:
    """Returns a call as the decoder of Wan2.1 or 2.2 makes it for 2560x1408, four frames."""
    whole = inputs._replace(frames=4, size=(rows, columns), new=torch.empty)
    least = frames_cost(4 * rows * columns, inputs.channels, 27, inputs.patch_size)
    return RealSize(f"decode 2560x1408, 4 x {columns}x{rows}", whole, least)


_FRAMES_TIMED = {
    "C96": _frames_real(_FramesInputs(96), 1408, 2560),
    "C256 patches of 2": _frames_real(_FramesInputs(256, 2), 704, 1280),
}


_FRAMES_CASES = [
    Case(f"frames_out {name}", frames_out, inputs, _work, _FRAMES_TIMED.get(name))
    for name, inputs in {
        "C96": _FramesInputs(96),
        "C256 patches of 2": _FramesInputs(256, 2),
        "C96 float": _FramesInputs(96, out=torch.bfloat16),
    }.items()
]

CASES = [*_CONV_CASES, *_UPSAMPLE_CASES, *_FRAMES_CASES]
