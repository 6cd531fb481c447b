"""Calls of convolutions as the Wan VAEs make them, with which their kernels are compiled, checked, timed and tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..common.case import Arguments, Case, RealSize
from ..common.cost import Cost, Work
from ..common.shapes import SIZES
from .causal_conv3d import causal_conv3d
from .causal_conv3d import cost as conv_cost
from .checks import output_size
from .frames_out import cost as frames_cost
from .frames_out import frames_out
from .upsample_conv2d import cost as upsample_cost
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

    def ones(self, device: torch.device, *shape: int) -> Tensor:
        return self.new(shape, dtype=self.dtype, device=device)

    def weight(self, columns: int, device: torch.device) -> Tensor:
        return self.ones(device, columns, *self.kernel, self.channels).permute(0, 4, 1, 2, 3)

    def after(self, size: tuple[int, ...], device: torch.device) -> dict[str, Any]:
        """Returns the options of what follows the sum of this size: a residual, overwritten by it, and a norm."""
        options: dict[str, Any] = {"norm_weight": self.ones(device, self.columns)} if self.norm else {}
        if self.residual:
            residual = self.ones(device, 1, *size, self.columns)
            options |= {"residual": residual, "out": residual}
        return options

    def convolution(self, device: torch.device) -> Arguments:
        """Returns a call of ``causal_conv3d`` on a tile, and a history, within larger frames."""

        def tile(frames: int) -> Tensor:
            return self.ones(device, 1, frames, rows + 4, columns + 16, self.channels)[:, :, 2:-2, 4:-12]

        rows, columns = self.size
        x, weight = tile(self.frames), self.weight(self.columns, device)
        past = self.ones(device, 1, 2, rows, columns, self.channels) if self.mixed else tile(2)
        padding = _CORNER if self.kernel[1] == 3 else None
        options: dict[str, Any] = {"padding": padding, "stride": self.stride, "backend": "triton"}
        options["past"] = past[:, : self.kernel[0] - 1] if self.kernel[0] > 1 else None
        options |= self.after(output_size(x, weight, self.stride, padding or (0, 0, 0, 0)), device)
        if self.norm:
            options["keep_sum"] = self.residual
        return (x, weight, self.ones(device, self.columns)), options

    def upsampling(self, device: torch.device) -> Arguments:
        """Returns a call of ``upsample_conv2d``."""
        rows, columns = self.size
        x = self.ones(device, 1, self.frames, rows, columns, self.channels)
        phases = self.ones(device, 4, self.columns, 2, 2, self.channels)
        options = {"padding": _CORNER, "backend": "triton"}
        options |= self.after((self.frames, 2 * rows - 1, 2 * columns - 1), device)
        return (x, phases, self.ones(device, self.columns)), options

    def head(self, device: torch.device) -> Arguments:
        """Returns a call of ``frames_out`` into a part of larger frames."""
        p, (rows, columns) = self.patch_size, self.size
        x, weight = self.ones(device, 1, self.frames, rows, columns, self.channels), self.weight(3 * p * p, device)
        bias = torch.zeros(3 * p * p, dtype=self.dtype, device=device)
        height, width = (rows - 1) * p, (columns - 1) * p
        out = torch.zeros(1, self.frames + 1, height + 21 * p, width + 33 * p, 3, dtype=self.out, device=device)
        options: dict[str, Any] = {"past": x[:, -2:], "padding": _CORNER, "patch_size": p, "backend": "triton"}
        return (x, weight, bias, out[:, 1:, :height, :width]), options

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

    def at(self, inputs: str, cost: Cost, frames: int, rows: int, columns: int) -> RealSize:
        """Returns a call as the decoder of Wan2.1 (up to 384 channels) or 2.2 makes it for one latent frame."""
        whole = replace(self, frames=frames, size=(rows, columns), new=torch.empty)
        return RealSize(f"decode 2560x1408, {frames} x {columns}x{rows}", getattr(whole, inputs), cost)


def _conv(name: str, tile: _Tile, *size: int) -> Case:
    tile = replace(tile, frames=4)
    taps, results = math.prod(tile.kernel), 1 + (tile.norm and tile.residual)
    pixels, channels = math.prod(size), (tile.channels, tile.columns)
    least = conv_cost(pixels, *channels, taps, residual=tile.residual, results=results)
    real = tile.at("convolution", least, *size) if size else None
    return Case(f"causal_conv3d {name}", causal_conv3d, tile.convolution, tile.work, real)


def _upsample(name: str, tile: _Tile, *size: int) -> Case:
    pixels, channels = 4 * math.prod(size), (tile.channels, tile.columns)
    least = upsample_cost(pixels, *channels, residual=tile.residual, results=1 + tile.norm)
    real = tile.at("upsampling", least, *size) if size else None
    return Case(f"upsample_conv2d {name}", upsample_conv2d, tile.upsampling, tile.work, real)


def _frames(name: str, tile: _Tile, *size: int) -> Case:
    least = frames_cost(math.prod(size), tile.channels, 27, tile.patch_size)
    return Case(f"frames_out {name}", frames_out, tile.head, tile.work, tile.at("head", least, *size) if size else None)


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
