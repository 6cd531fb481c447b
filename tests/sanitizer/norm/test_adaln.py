"""Out-of-bounds accesses and races of the adaptive norms' kernel (see conftest.py).

Tensors are exactly as long as what they hold: one token or channel more would be out of bounds.
"""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels import gated_residual, norm_modulate
from swifti2v_kernels.norm.adaln import AdalnCall
from swifti2v_kernels.norm.adaln_kernel import launch_adaln
from tests.support.tolerances import OPERATOR, relative_error


@pytest.mark.parametrize(("block_len", "channels"), [(5, 96), (1, 10)])
def test_adaln_stays_inside(block_len: int, channels: int) -> None:
    x, update = torch.randn(2, 2, 3 * block_len, channels).to("cuda", torch.bfloat16)
    table = torch.randn(2, 2, 3, channels).to("cuda")
    gate, shift, scale = table.unbind(2)
    weight, bias = torch.randn(2, channels).to("cuda")
    block_map = torch.tensor([1, 0, 1], dtype=torch.int32).to("cuda")
    x_out, y_out = torch.empty_like(x), torch.empty_like(x)
    launch_adaln(AdalnCall(x, update, gate, shift, scale, weight, bias, block_map, "layer", 1e-6, x_out, y_out))
    rows = {"block_map": block_map, "backend": "torch"}
    expected = gated_residual(x, update, gate, **rows)
    assert relative_error(x_out, expected) < OPERATOR["bfloat16"]
    expected = norm_modulate(expected, shift, scale, weight=weight, bias=bias, **rows)
    assert relative_error(y_out, expected) < OPERATOR["bfloat16"]
    in_place = x.clone()
    launch_adaln(AdalnCall(in_place, None, None, shift, scale, None, None, block_map, "rms", 1e-6, None, in_place))
    expected = norm_modulate(x, shift, scale, norm="rms", **rows)
    assert relative_error(in_place, expected) < OPERATOR["bfloat16"]


def test_rows_that_are_not_there_are_not_read() -> None:
    x, y = torch.randn(1, 6, 96).to("cuda"), torch.empty(1, 6, 96, device="cuda")
    shift, scale = torch.randn(2, 1, 2, 96).to("cuda")
    block_map = torch.tensor([1, 2**30, -1], dtype=torch.int32).to("cuda")
    launch_adaln(AdalnCall(x, None, None, shift, scale, None, None, block_map, "layer", 1e-6, None, y))
    assert y[:, 2:].isnan().all()
    assert not y[:, :2].isnan().any()
