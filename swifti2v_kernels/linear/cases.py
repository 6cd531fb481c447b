"""Calls of 8-bit linear layers as DiTs make them, with which their kernels are compiled, checked, timed and tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.case import Arguments, Case, RealSize
from ..common.cost import Work
from .dequantize_rows import cost as dequantize_cost
from .dequantize_rows import dequantize_rows
from .quantize_rows import cost as quantize_cost
from .quantize_rows import quantize_rows
from .rows import FLOAT8_CAPABILITY, QuantizedRows
from .scaled_linear import cost as scaled_cost
from .scaled_linear import scaled_linear


class _ScaledInputs(NamedTuple):
    """The tensors of one case. Real calls have more columns, by which only the number of programs grows."""

    kind: torch.dtype
    depth: int
    activation: str | None = None
    columns: int = 256
    rows: int = 24
    new: Callable[..., Tensor] = torch.ones

    def __call__(self, device: torch.device) -> Arguments:
        def quantized(rows: int) -> QuantizedRows:
            # Not every fill is known for float8, and as bytes a 1 is no NaN.
            values = self.new(rows, self.depth, dtype=torch.int8, device=device).view(self.kind)
            return QuantizedRows(values, self.new(rows, device=device))

        bias = self.new(self.columns, dtype=torch.bfloat16, device=device)
        options = {"activation": self.activation, "dtype": torch.bfloat16, "backend": "triton"}
        return (quantized(self.rows), quantized(self.columns), bias), options


def _scaled_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one step: one tile of rows times two of columns."""
    rows, columns, depth = constants["BLOCK_M"], 2 * constants["BLOCK_N"], constants["BLOCK_K"]
    return Work(rows * columns * depth, (rows + columns) * depth)


def _scaled_real(inputs: _ScaledInputs, columns: int) -> RealSize:
    """Returns a call for a fifth of a block's tokens at 2560x1408, the part that the DiT computes at a time."""
    whole = inputs._replace(columns=columns, rows=2816, new=torch.empty)
    least = scaled_cost(2816, inputs.depth, columns, gelu=inputs.activation is not None)
    return RealSize(f"2816 x {inputs.depth} to {columns}", whole, least)


_SCALED_CASES = [
    Case(
        f"scaled_linear K{inputs.depth}{' gelu' if inputs.activation else ''} {str(kind).removeprefix('torch.')}",
        scaled_linear,
        inputs,
        _scaled_work,
        _scaled_real(inputs, columns),
        FLOAT8_CAPABILITY if kind == torch.float8_e4m3fn else 80,
    )
    for kind in (torch.float8_e4m3fn, torch.int8)
    for inputs, columns in (
        (_ScaledInputs(kind, 13824), 5120),
        (_ScaledInputs(kind, 5120), 5120),
        (_ScaledInputs(kind, 1536, "gelu_tanh"), 8960),
    )
]


def _quantize_inputs(channels: int, dtype: torch.dtype, rows: int = 64, new=torch.ones):  # type: ignore[no-untyped-def]
    def make(device: torch.device) -> Arguments:
        return (new(1, rows, channels, dtype=torch.bfloat16, device=device), dtype), {"backend": "triton"}

    return make


def _quantize_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one program: its rows, 16 bits in and 8 out."""
    return Work(0, 3 * constants["C"] * constants["BLOCK_M"])


def _quantize_case(name: str, channels: int, dtype: torch.dtype, shape: str, rows: int) -> Case:
    real = RealSize(shape, _quantize_inputs(channels, dtype, rows, torch.empty), quantize_cost(rows, channels))
    least = 80 if dtype == torch.int8 else FLOAT8_CAPABILITY
    return Case(f"quantize_rows {name}", quantize_rows, _quantize_inputs(channels, dtype), _quantize_work, real, least)


_QUANTIZE_CASES = [
    _quantize_case("C8960 int8", 8960, torch.int8, "feed-forward of 1.3B, 17,600 tokens", 17_600),
    _quantize_case("C13824 float8", 13824, torch.float8_e4m3fn, "feed-forward of 14B, 18,480 tokens", 18_480),
]


def _dequantize_inputs(channels: int, kind: torch.dtype, rows: int = 64, new=torch.ones):  # type: ignore[no-untyped-def]
    def make(device: torch.device) -> Arguments:
        values, scales = new(rows, channels, dtype=kind, device=device), new(rows, device=device)
        return (values, scales), {"dtype": torch.bfloat16, "backend": "triton"}

    return make


def _dequantize_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one program: its tile, 8 bits in and 16 out."""
    return Work(0, 3 * constants["BLOCK_C"] * constants["BLOCK_M"])


_DEQUANTIZE_CASES = [
    Case(
        f"dequantize_rows C{c} {str(kind).removeprefix('torch.')}",
        dequantize_rows,
        _dequantize_inputs(c, kind),
        _dequantize_work,
        RealSize(f"{rows} x {c}, {layer}", _dequantize_inputs(c, kind, rows, torch.empty), dequantize_cost(rows, c)),
    )
    for c, kind, rows, layer in (
        (1536, torch.int8, 8960, "feed-forward of 1.3B"),
        (3072, torch.float8_e5m2, 14336, "feed-forward of 5B"),
        (5120, torch.float8_e4m3fn, 13824, "feed-forward of 14B"),
    )
]

CASES = [*_SCALED_CASES, *_QUANTIZE_CASES, *_DEQUANTIZE_CASES]
