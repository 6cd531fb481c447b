"""8-bit rows without the library: every code's value, the nearest one by comparing with all of them, and products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def codes(dtype: torch.dtype) -> Tensor:
    """Returns all finite values that rows are rounded to, ascending, in float64, without -0 and int8's -128."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    values = values[values.isfinite() & (values.abs() <= LARGEST[dtype])]
    return values.unique()


def true_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the scales of rows [..., C], in float64."""
    return x.double().abs().amax(-1) / LARGEST[dtype]


def excess(values: Tensor, scales: Tensor, x: Tensor) -> float:
    """Returns how much farther the values are from ``x / scales`` than the nearest codes, at most, relative to them.

    It is 0 for perfect rounding; float32's last bit is 1e-7.
    """
    quotient = x.double() / scales.double().unsqueeze(-1)
    table = codes(values.dtype).to(x.device)
    after = torch.searchsorted(table, quotient.contiguous()).clamp(1, len(table) - 1)
    nearest = torch.minimum((table[after] - quotient).abs(), (table[after - 1] - quotient).abs())
    distance = (values.double() - quotient).abs()
    return ((distance - nearest) / quotient.abs().clamp_min(1.0)).max().item()


def ties(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns a row of scale 1 with every middle between two codes, and what they round to: the even codes."""
    table = codes(dtype)
    low, high = table[:-1], table[1:]
    # int8: even numbers; float8: those whose pattern ends in 0.
    even = low % 2 == 0 if dtype == torch.int8 else low.to(dtype).view(torch.uint8) % 2 == 0
    middle = torch.cat([(low + high) / 2, table[-1:]])
    return middle.float().unsqueeze(0), torch.cat([torch.where(even, low, high), table[-1:]]).unsqueeze(0)


def multiplied(
    x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Returns the 8-bit linear layer in float64, with the scales in the operands."""
    wide = [values.double() * scales.double().unsqueeze(-1) for values, scales in (x, weight)]
    y = F.linear(*wide, None if bias is None else bias.double())
    return y if activation is None else F.gelu(y, approximate="tanh")
