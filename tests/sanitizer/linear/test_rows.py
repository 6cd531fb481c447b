"""Out-of-bounds accesses, races and reads of unwritten memory in the kernels of 8-bit rows (see conftest.py).

Tensors are exactly as long as what they hold: one row or channel more would be out of bounds.
"""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels import QuantizedRows, gated_residual, norm_modulate
from swifti2v_kernels.linear.dequantize_rows import DequantizeCall
from swifti2v_kernels.linear.dequantize_rows_kernel import launch_dequantize_rows
from swifti2v_kernels.linear.quantize_rows import QuantizeCall
from swifti2v_kernels.linear.quantize_rows_kernel import launch_quantize_rows
from swifti2v_kernels.linear.rows import quantized_reference
from swifti2v_kernels.norm.adaln import AdalnCall
from swifti2v_kernels.norm.adaln_kernel import launch_adaln
from tests.support.tolerances import relative_error

KINDS = [torch.float8_e4m3fn, torch.int8]


def rows(*shape: int, kind: torch.dtype) -> QuantizedRows:
    return QuantizedRows(torch.empty(shape, dtype=kind, device="cuda"), torch.empty(shape[:-1], device="cuda"))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("length", "channels"), [(1, 96), (45, 96), (3, 5000), (5, 1)])
def test_quantising_stays_inside(length: int, channels: int, kind: torch.dtype) -> None:
    """Programs of many rows, of which the last has fewer, and of one row stay inside."""
    x = torch.randn(length, channels).to("cuda", torch.bfloat16)
    out = rows(length, channels, kind=kind)
    launch_quantize_rows(QuantizeCall(x, *out))
    expected = quantized_reference(x, kind)
    assert torch.equal(out.scales, expected.scales)
    assert torch.equal(out.values.float(), expected.values.float())


@pytest.mark.parametrize("kind", [*KINDS, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(("length", "channels"), [(1, 1), (9, 512), (17, 700)])
def test_dequantising_stays_inside(length: int, channels: int, kind: torch.dtype) -> None:
    """Tiles that are full, and tiles that lack rows, channels or both, stay inside; a scale of one number too."""
    values = torch.randint(-100, 100, (length, channels)).to("cuda", torch.int8).view(kind)
    out = torch.empty(length, channels, dtype=torch.bfloat16, device="cuda")
    for scales in (torch.rand(length).to("cuda"), torch.rand(1).to("cuda").expand(length)):
        launch_dequantize_rows(DequantizeCall(values, scales, out))
        expected = (values.float() * scales[:, None]).bfloat16()
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("kind", KINDS, ids=str)
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
