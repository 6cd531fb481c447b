"""Calls of convolutions as the Wan VAEs make them, with which their kernels are compiled, checked, timed and tuned."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..common.case import Arguments, Case, Cost, RealSize, Work
from ..common.shapes import SIZES
from .calls import output_size
from .causal_conv3d import causal_conv3d
from .frames_out import frames_out
from .upsample_conv2d import upsample_conv2d

#: Zeros above and left of a tile in a corner of larger frames; on the other sides it has a halo.
_CORNER = (1, 0, 1, 0)


@dataclass(frozen=True)
class _Tile:
    """A tile with a halo on two sides, and the numbers that it is convolved to."""

    channels: int
    columns: int = 3
    kernel: tuple[int, int, int] = (3, 3, 3)
    norm: bool = False
    residual: bool = False
    stride: tuple[int, int, int] = (1, 1, 1)
    #: The history lies in memory of another layout.
    mixed: bool = False
    patch_size: int = 1
    out: torch.dtype = torch.uint8
    dtype: torch.dtype = torch.bfloat16
    frames: int = 2
    #: Rows and columns of the tile.
    size: tuple[int, int] = (20, 32)
    new: Callable[..., Tensor] = torch.ones

    def ones(self, *shape: int) -> Tensor:
        return self.new(shape, dtype=self.dtype)

    def weight(self, columns: int) -> Tensor:
        return self.ones(columns, *self.kernel, self.channels).permute(0, 4, 1, 2, 3)

    def after(self, *size: int) -> dict[str, Any]:
        """Returns the options of what follows the sum of this size: a residual, overwritten by it, and a norm."""
        options: dict[str, Any] = {"norm_weight": self.ones(self.columns)} if self.norm else {}
        if self.residual:
            options["residual"] = options["out"] = self.ones(1, *size, self.columns)
        return options

    def convolution(self) -> Arguments:
        """Returns a call of ``causal_conv3d`` on a tile, and a history, within larger frames."""

        def tile(frames: int) -> Tensor:
            return self.ones(1, frames, rows + 4, columns + 16, self.channels)[:, :, 2:-2, 4:-12]

        rows, columns = self.size
        x, weight = tile(self.frames), self.weight(self.columns)
        past = self.ones(1, 2, rows, columns, self.channels) if self.mixed else tile(2)
        padding = _CORNER if self.kernel[1] == 3 else None
        options: dict[str, Any] = {"padding": padding, "stride": self.stride, "backend": "triton"}
        options["past"] = past[:, : self.kernel[0] - 1] if self.kernel[0] > 1 else None
        options |= self.after(*output_size(x, weight, self.stride, padding or (0, 0, 0, 0)))
        if self.norm:
            options["keep_sum"] = self.residual
        return (x, weight, self.ones(self.columns)), options

    def upsampling(self) -> Arguments:
        rows, columns = self.size
        x = self.ones(1, self.frames, rows, columns, self.channels)
        options = {"padding": _CORNER, "backend": "triton", **self.after(self.frames, 2 * rows - 1, 2 * columns - 1)}
        return (x, self.ones(4, self.columns, 2, 2, self.channels), self.ones(self.columns)), options

    def head(self) -> Arguments:
        """Returns a call of ``frames_out`` into a part of larger frames."""
        p, (rows, columns) = self.patch_size, self.size
        x, weight = self.ones(1, self.frames, rows, columns, self.channels), self.weight(3 * p * p)
        height, width = (rows - 1) * p, (columns - 1) * p
        out = torch.zeros(1, self.frames + 1, height + 21 * p, width + 33 * p, 3, dtype=self.out)
        options: dict[str, Any] = {"past": x[:, -2:], "padding": _CORNER, "patch_size": p, "backend": "triton"}
        return (x, weight, torch.zeros(3 * p * p, dtype=self.dtype), out[:, 1:, :height, :width]), options

    def work(self, constants: Mapping[str, Any]) -> Work:
        """Returns the work of one step of channels of one tap, pixels and weights.

        The norm of many channels is a kernel of its own, without matrix multiplications.
        """
        if "BLOCK_N" not in constants:
            return Work(0, 2 * 2 * constants["C"] * constants["BLOCK_M"])
        rows, depth = constants["BLOCK_M"], constants["BLOCK_K"]
        columns = constants["BLOCK_N"] + constants.get("TAIL_N", 0)
        fma = 0 if self.dtype == torch.float32 else rows * columns * depth  # which the tensor cores do not take
        return Work(fma, self.dtype.itemsize * (rows + columns) * depth)

    def cost(self, operator: Callable[..., Any]) -> Cost:
        """Returns the least cost of a call in 16 bits; history, biases and norm weights are negligible."""
        read = written = self.frames * math.prod(self.size)  # pixels
        columns, taps, weights = self.columns, math.prod(self.kernel), math.prod(self.kernel)
        if operator is upsample_conv2d:
            written, taps, weights = 4 * read, 4, 16  # each of four phases has four taps
        if operator is frames_out:
            columns = 3 * self.patch_size**2
        results = 1 + (self.norm and (self.residual or operator is upsample_conv2d))
        elements = read * self.channels + written * self.residual * columns + weights * self.channels * columns
        itemsize = 1 if operator is frames_out else 2
        return Cost(2 * written * self.channels * columns * taps, 2 * elements, written * columns * results * itemsize)


_INPUTS = {causal_conv3d: _Tile.convolution, upsample_conv2d: _Tile.upsampling, frames_out: _Tile.head}


def _case(operator: Callable[..., Any], name: str, tile: _Tile, *size: int) -> Case:
    """Returns a case, whose real size is that of the decoder of Wan2.1 (up to 384 channels) or 2.2 for a latent frame.

    ``size`` are its frames, rows and columns, if it has one.
    """

    if operator is causal_conv3d:
        tile = replace(tile, frames=4)  # of which the last two see no history

    def inputs(tile: _Tile, device: torch.device) -> Arguments:
        with device:
            return _INPUTS[operator](tile)

    real = None
    if size:
        frames, rows, columns = size
        whole = replace(tile, frames=frames, size=(rows, columns), new=torch.empty)
        shape = f"decode 2560x1408, {frames} x {columns}x{rows}"
        real = RealSize(shape, functools.partial(inputs, whole), whole.cost(operator))
    return Case(f"{operator.__name__} {name}", operator, functools.partial(inputs, tile), tile.work, real)


_conv = functools.partial(_case, causal_conv3d)
_upsample = functools.partial(_case, upsample_conv2d)
_frames = functools.partial(_case, frames_out)
#: Rows and columns of the frames of a 2K clip, and of a decoder's levels below them.
_2K, _HALF, _QUARTER, _EIGHTH = ((SIZES["2K"][1] // n, SIZES["2K"][0] // n) for n in (1, 2, 4, 8))
CASES = [
    _conv("C96 norm", _Tile(96, 96, norm=True), 4, *_2K),
    _conv("C96 residual norm", _Tile(96, 96, norm=True, residual=True), 4, *_2K),
    _conv("C192 norm", _Tile(192, 192, norm=True), 4, *_HALF),
    _conv("C192 residual norm", _Tile(192, 192, norm=True, residual=True), 4, *_HALF),
    _conv("C192 residual norm, history elsewhere", _Tile(192, 192, norm=True, residual=True, mixed=True)),
    _conv("C160 residual norm", _Tile(160, 160, norm=True, residual=True)),
    _conv("C384 residual", _Tile(384, 384, residual=True), 2, *_QUARTER),
    _conv("C1024 residual", _Tile(1024, 1024, residual=True), 2, *_EIGHTH),
    _conv("C512 to C256", _Tile(512, 256), 4, *_HALF),
    _conv("C256 residual", _Tile(256, 256, residual=True), 4, *_HALF),
    _conv("C16 to C384", _Tile(16, 384)),
    _conv("C48 to C1024", _Tile(48, 1024)),
    _conv("C192 to C384 pointwise", _Tile(192, 384, (1, 1, 1))),
    _conv("C384 in time", _Tile(384, 384, (3, 1, 1))),
    _conv("C192 half frames", _Tile(192, 192, (1, 3, 3), stride=(1, 2, 2))),
    _conv("C192 half rate", _Tile(192, 192, (3, 1, 1), stride=(2, 1, 1))),
    _conv("C96 residual norm float16", _Tile(96, 96, norm=True, residual=True, dtype=torch.float16)),
    _conv("C96 norm float32", _Tile(96, 96, norm=True, dtype=torch.float32)),
    _conv("C192 residual float32", _Tile(192, 192, residual=True, dtype=torch.float32)),
    _conv("C12, nothing aligned", _Tile(12, 160)),
    _upsample("C384 to C192 norm", _Tile(384, 192, norm=True), 4, *_QUARTER),
    _upsample("C192 to C96 norm", _Tile(192, 96, norm=True), 4, *_HALF),
    _upsample("C512 residual", _Tile(512, 512, residual=True), 4, *_QUARTER),
    _upsample("C192 to C96 norm float16", _Tile(192, 96, norm=True, dtype=torch.float16)),
    _upsample("C192 to C96 float32", _Tile(192, 96, dtype=torch.float32)),
    _frames("C96", _Tile(96), 4, *_2K),
    _frames("C256 patches of 2", _Tile(256, patch_size=2), 4, *_HALF),
    _frames("C96 float", _Tile(96, out=torch.bfloat16)),
]
