"""Out-of-bounds accesses, races and reads of unwritten memory in the kernels of 8-bit rows (see conftest.py).

Tensors are exactly as long as what they hold: one row or channel more would be out of bounds. Tiles are not full.
"""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels import QuantizedRows, gated_residual, norm_modulate
from swifti2v_kernels.linear.dequantize_rows import DequantizeCall
from swifti2v_kernels.linear.dequantize_rows_kernel import launch as launch_dequantize_rows
from swifti2v_kernels.linear.quantize_rows import QuantizeCall, quantized_reference
from swifti2v_kernels.linear.quantize_rows_kernel import launch as launch_quantize_rows
from swifti2v_kernels.linear.scaled_linear import ScaledCall
from swifti2v_kernels.linear.scaled_linear_kernel import ScaledConfig
from swifti2v_kernels.linear.scaled_linear_kernel import launch as launch_scaled_linear
from swifti2v_kernels.norm.adaln import AdalnCall
from swifti2v_kernels.norm.adaln_kernel import launch as launch_adaln
from tests.support.quantized_oracle import multiplied
from tests.support.tolerances import KERNEL, relative_error

kinds = pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)


def rows(*shape: int, kind: torch.dtype) -> QuantizedRows:
    """Returns memory that a kernel has to write."""
    return QuantizedRows(torch.empty(shape, dtype=kind, device="cuda"), torch.empty(shape[:-1], device="cuda"))


def made(count: int, channels: int, kind: torch.dtype) -> QuantizedRows:
    return QuantizedRows(*(part.to("cuda") for part in quantized_reference(torch.randn(count, channels), kind)))


@kinds
@pytest.mark.parametrize(("length", "channels"), [(45, 96), (3, 5000), (5, 1)])
def test_quantising_stays_inside(length: int, channels: int, kind: torch.dtype) -> None:
    """Programs of many rows, of which the last has fewer, and of one row stay inside."""
    x, out = torch.randn(length, channels).to("cuda", torch.bfloat16), rows(length, channels, kind=kind)
    launch_quantize_rows(QuantizeCall(x, *out))
    for a, b in zip(out, quantized_reference(x, kind), strict=True):
        assert torch.equal(a.float(), b.float())


@kinds
@pytest.mark.parametrize(("length", "channels"), [(1, 1), (9, 512), (17, 700)])
def test_dequantising_stays_inside(length: int, channels: int, kind: torch.dtype) -> None:
    """Tiles that are full, and tiles that lack rows, channels or both, stay inside; a scale of one number too."""
    values = torch.randint(-100, 100, (length, channels)).to("cuda", torch.int8).view(kind)
    out = torch.empty(length, channels, dtype=torch.bfloat16, device="cuda")
    for scales in (torch.rand(length).to("cuda"), torch.rand(1).to("cuda").expand(length)):
        launch_dequantize_rows(DequantizeCall(values, scales, out))
        expected = (values.float() * scales[:, None]).bfloat16()
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@kinds
@pytest.mark.parametrize(("block_len", "channels"), [(5, 96), (1, 10)])
def test_quantised_norms_stay_inside(block_len: int, channels: int, kind: torch.dtype) -> None:
    x, update = torch.randn(2, 2, 3 * block_len, channels).to("cuda", torch.bfloat16)
    gate, shift, scale = torch.randn(2, 2, 3, channels).to("cuda").unbind(2)
    block_map = torch.tensor([1, 0, 1], dtype=torch.int32).to("cuda")
    x_out, out = torch.empty_like(x), rows(*x.shape, kind=kind)
    launch_adaln(AdalnCall(x, update, gate, shift, scale, None, None, block_map, "layer", 1e-6, x_out, *out))
    by_torch = {"block_map": block_map, "backend": "torch"}
    x_new = gated_residual(x, update, gate, **by_torch)
    expected = norm_modulate(x_new, shift, scale, quantize=kind, **by_torch)
    assert relative_error(out.scales, expected.scales) < 1e-6
    # A few numbers in the middle between two codes may go to the other, a step of at most 1/8 of the number away.
    assert relative_error(out.values, expected.values) < 1e-2


@kinds
@pytest.mark.parametrize(("tokens", "channels", "columns"), [(1, 16, 16), (19, 80, 48), (33, 64, 112)], ids=str)
def test_products_stay_inside(
    tokens: int, channels: int, columns: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are small, so that several programs meet."""
    monkeypatch.setattr(ScaledConfig, "heuristic", classmethod(lambda cls, *args: ScaledConfig(16, 16, 32, 4, 2)))
    x, weight, bias = made(tokens, channels, kind), made(columns, channels, kind), torch.randn(columns).to("cuda")
    out = torch.empty(tokens, columns, device="cuda", dtype=torch.bfloat16)
    launch_scaled_linear(ScaledCall(*x, *weight, bias, True, out))
    assert relative_error(out, multiplied(x, weight, bias, "gelu_tanh")) < KERNEL["bfloat16"]


def test_parts_of_buffers_stay_inside() -> None:
    """The last rows of a buffer with longer rows stay inside, with every other scale, no bias, and what ships."""
    x = QuantizedRows(made(7, 48, torch.int8).values[2:, 16:], torch.randn(5, 2).to("cuda")[:, 1])
    weight, out = made(16, 32, torch.int8), torch.empty(5, 16, device="cuda")
    launch_scaled_linear(ScaledCall(*x, *weight, None, False, out))
    assert relative_error(out, multiplied(x, weight)) < KERNEL["float32"]
