"""8-bit rows without the library: every code's value, the nearest one by comparing with all of them, and products.

The checks are for kernels on a GPU or in the interpreter, and for PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from swifti2v_kernels import dequantize_rows, quantize_rows

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


def check_ties(dtype: torch.dtype, device: str, backend: str) -> None:
    """Checks that the middle between two codes goes to the even one, subnormal codes included."""
    x, expected = ties(dtype)
    values, scales = quantize_rows(x.to(device), dtype, backend=backend)
    assert scales.tolist() == [1.0]
    assert torch.equal(values.double().cpu(), expected)


def check_odd_rows(dtype: torch.dtype, device: str, backend: str) -> None:
    """Checks zeros, tiny rows, one huge element, the largest floats, NaN and infinities against PyTorch on the CPU."""
    x = torch.randn(9, 50)
    x[0], x[1] = 0.0, 1e-38
    x[2, 7], x[3] = 1e30, 3.4e38
    x[4, 3], x[5, 0], x[6, 49] = float("nan"), float("inf"), -float("inf")
    x[7] = 1e-45
    found = quantize_rows(x.to(device), dtype, backend=backend)
    read = dequantize_rows(*found, backend=backend)
    values, scales = (part.float().cpu() for part in found)
    assert scales[[0, 1, 7]].tolist() == [1.0, 1.0, 1.0]
    assert (values[[0, 1, 7]] == 0).all()
    assert values[2].count_nonzero() == 1
    assert values[2, 7] == values[3, 0] == LARGEST[dtype]
    assert scales[4:7].isnan().all()
    assert read[4:7].isnan().all()
    known, expected = [0, 1, 2, 3, 7, 8], quantize_rows(x, dtype, backend="torch")
    assert torch.equal(scales[known], expected.scales[known])
    assert torch.equal(values[known], expected.values.float()[known])


def check_codes(stored: torch.dtype, dtype: torch.dtype, device: str, backend: str) -> None:
    """Checks every code against torch's own, under scales that make subnormals, overflow, and no number at all."""
    values = torch.arange(256, dtype=torch.uint8).view(stored).expand(8, 256).contiguous()
    scales = torch.tensor([1.0, 0.37, -3e-5, 2e-39, 1e36, 0.0, float("inf"), float("nan")])
    expected = (values.float() * scales[:, None]).to(dtype)
    actual = dequantize_rows(values.to(device), scales.to(device), dtype=dtype, backend=backend).cpu()
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.view(bits)[~actual.isnan()], expected.view(bits)[~expected.isnan()])
