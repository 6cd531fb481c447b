"""Calls of 8-bit linear layers as DiTs make them, with which their kernels are compiled, checked, timed and tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..common.case import Arguments, Case, Cost, RealSize, Work
from ..common.shapes import MODELS, WINDOWS
from .dequantize_rows import dequantize_rows
from .quantize_rows import FLOAT8_CAPABILITY, QuantizedRows, quantize_rows
from .scaled_linear import scaled_linear

_BF16 = torch.bfloat16


@dataclass(frozen=True)
class _Rows:
    """Rows of one case. Real calls have more rows and columns, by which only the number of programs grows."""

    kind: torch.dtype
    channels: int
    rows: int = 64
    columns: int = 256
    activation: str | None = None
    new: Callable[..., Tensor] = torch.ones

    @property
    def name(self) -> str:
        return str(self.kind).removeprefix("torch.")

    @property
    def least_capability(self) -> int:
        return FLOAT8_CAPABILITY if self.kind == torch.float8_e4m3fn else 80

    def at(self, rows: int, columns: int = 0) -> _Rows:
        """Returns the rows at real size."""
        return replace(self, rows=rows, columns=columns, new=torch.empty)

    def product(self, device: torch.device) -> Arguments:
        def quantized(rows: int) -> QuantizedRows:
            # Not every fill is known for float8, and as bytes a 1 is no NaN.
            values = self.new(rows, self.channels, dtype=torch.int8, device=device).view(self.kind)
            return QuantizedRows(values, self.new(rows, device=device))

        bias = self.new(self.columns, dtype=_BF16, device=device)
        options = {"activation": self.activation, "dtype": _BF16, "backend": "triton"}
        return (quantized(self.rows), quantized(self.columns), bias), options

    def wide(self, device: torch.device) -> Arguments:
        x = self.new(1, self.rows, self.channels, dtype=_BF16, device=device)
        return (x, self.kind), {"backend": "triton"}

    def stored(self, device: torch.device) -> Arguments:
        values = self.new(self.rows, self.channels, dtype=self.kind, device=device)
        return (values, self.new(self.rows, device=device)), {"dtype": _BF16, "backend": "triton"}


def _product_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one step: one tile of rows times two of columns."""
    rows, columns, depth = constants["BLOCK_M"], 2 * constants["BLOCK_N"], constants["BLOCK_K"]
    return Work(rows * columns * depth, (rows + columns) * depth)


def _scaled(kind: torch.dtype, depth: int, columns: int, activation: str | None = None) -> Case:
    """Returns a call whose real size is a fifth of a block's tokens at 2560x1408, which the DiT computes at a time."""
    rows = _Rows(kind, depth, 24, activation=activation)
    part = WINDOWS["CSG window 2560x1408, 1.3B"].block_len // 5
    # Rows and weights in 8 bits with their scales, bias and result in 16; GELU counts as eight operations.
    flops = part * columns * (2 * depth + (8 if activation else 0))
    least = Cost(flops, (part + columns) * (depth + 4) + 2 * columns, 2 * part * columns)
    real = RealSize(f"{part} x {depth} to {columns}", rows.at(part, columns).product, least)
    name = f"scaled_linear K{depth}{' gelu' if activation else ''} {rows.name}"
    return Case(name, scaled_linear, rows.product, _product_work, real, rows.least_capability)


def _quantize(rows: _Rows, name: str, number: int, shape: str) -> Case:
    """Returns a call whose programs read 16 bits and write 8."""
    size = number * rows.channels
    real = RealSize(shape, rows.at(number).wide, Cost(5 * size, 2 * size, size + 4 * number))
    name = f"quantize_rows C{rows.channels} {name}"
    return Case(name, quantize_rows, rows.wide, lambda c: Work(0, 3 * c["C"] * c["BLOCK_M"]), real,
                rows.least_capability)  # fmt: skip


def _dequantize(rows: _Rows, number: int, layer: str) -> Case:
    """Returns a call whose programs read a tile of 8 bits and write 16."""
    size = number * rows.channels
    least = Cost(2 * size, size + 4 * number, 2 * size)
    real = RealSize(f"{number} x {rows.channels}, {layer}", rows.at(number).stored, least)
    name = f"dequantize_rows C{rows.channels} {rows.name}"
    return Case(name, dequantize_rows, rows.stored, lambda c: Work(0, 3 * c["BLOCK_C"] * c["BLOCK_M"]), real)


_1B, _5B, _14B = (MODELS[name] for name in ("1.3B", "5B", "14B"))
_SMALL, _CLIP = WINDOWS["CSG window 1280x704, 1.3B"].tokens, WINDOWS["Stage I 640x352, 14B"].tokens
CASES = [
    *(
        _scaled(kind, *call)
        for kind in (torch.float8_e4m3fn, torch.int8)
        for call in ((_14B.hidden, _14B.width), (_14B.width, _14B.width), (_1B.width, _1B.hidden, "gelu_tanh"))
    ),
    _quantize(_Rows(torch.int8, _1B.hidden), "int8", _SMALL, f"feed-forward of 1.3B, {_SMALL:,} tokens"),
    _quantize(_Rows(torch.float8_e4m3fn, _14B.hidden), "float8", _CLIP, f"feed-forward of 14B, {_CLIP:,} tokens"),
    _dequantize(_Rows(torch.int8, _1B.width), _1B.hidden, "feed-forward of 1.3B"),
    _dequantize(_Rows(torch.float8_e5m2, _5B.width), _5B.hidden, "feed-forward of 5B"),
    _dequantize(_Rows(torch.float8_e4m3fn, _14B.width), _14B.hidden, "feed-forward of 14B"),
]
