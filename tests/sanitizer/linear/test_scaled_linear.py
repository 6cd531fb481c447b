"""Out-of-bounds accesses, races and reads of unwritten memory in the 8-bit matmul's kernel (see conftest.py).

Tensors are exactly as long as what they hold; tiles of rows, of columns and of channels are not full.
"""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels.linear.rows import QuantizedRows, quantized_reference
from swifti2v_kernels.linear.scaled_linear import ScaledCall, scaled_linear_reference
from swifti2v_kernels.linear.scaled_linear_kernel import ScaledConfig, launch_scaled_linear
from tests.support.tolerances import KERNEL, relative_error

#: Small, so that several programs meet.
TILES = ScaledConfig(16, 16, 32, 4, 2)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("tokens", "channels", "columns"), [(1, 16, 16), (19, 80, 48), (33, 64, 112), (16, 32, 32)], ids=str
)
def test_products_stay_inside(
    tokens: int, channels: int, columns: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScaledConfig, "heuristic", classmethod(lambda cls, *args: TILES))
    x, weight = (quantized_reference(torch.randn(n, channels), kind) for n in (tokens, columns))
    bias = torch.randn(columns).to(torch.bfloat16)
    expected = scaled_linear_reference(ScaledCall(*x, *weight, bias, True, None, torch.float32))
    there = [QuantizedRows(*(part.to("cuda") for part in rows)) for rows in (x, weight)]
    out = torch.empty(tokens, columns, device="cuda", dtype=torch.bfloat16)
    launch_scaled_linear(ScaledCall(*there[0], *there[1], bias.to("cuda"), True, out))
    assert relative_error(out.cpu(), expected) < KERNEL["bfloat16"]


def test_parts_of_buffers_stay_inside() -> None:
    """The last rows of a buffer with longer rows stay inside, with every other scale, no bias, and what ships."""
    whole = quantized_reference(torch.randn(7, 48), torch.int8)
    x = QuantizedRows(whole.values.to("cuda")[2:, 16:], torch.randn(5, 2).to("cuda")[:, 1])
    weight = QuantizedRows(*(part.to("cuda") for part in quantized_reference(torch.randn(16, 32), torch.int8)))
    out = torch.empty(5, 16, device="cuda")
    launch_scaled_linear(ScaledCall(*x, *weight, None, False, out))
    there = [QuantizedRows(*(part.cpu() for part in rows)) for rows in (x, weight)]
    expected = scaled_linear_reference(ScaledCall(*there[0], *there[1], None, False, None, torch.float32))
    assert relative_error(out.cpu(), expected) < KERNEL["float32"]
