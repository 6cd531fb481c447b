"""The merging kernel, run by the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels import explain, merge_attention
from swifti2v_kernels.attention.merge_attention import merge_attention_reference
from tests.support.tolerances import LSE, OPERATOR, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("parts", "head_dim", "length"), [(1, 64, 1), (2, 96, 33), (5, 128, 16), (3, 40, 17)])
def test_against_float64(parts: int, head_dim: int, length: int, dtype: torch.dtype) -> None:
    """Strided parts merge to the float64 result; one row has no keys in one part, and one has none in any."""
    outputs = [torch.randn(2, 3, length, head_dim).transpose(1, 2).to(dtype) for _ in range(parts)]
    lses = [100 * torch.randn(2, length, 3).transpose(1, 2) for _ in range(parts)]
    lses[0][0, 0, 0] = float("-inf")
    for lse in lses:
        lse[1, 2, -1] = float("-inf")
    out, lse = merge_attention(outputs, lses)
    assert explain(merge_attention, outputs, lses).implementation == "fused kernel"
    expected, expected_lse = merge_attention_reference([x.double() for x in outputs], [x.double() for x in lses])
    name = str(dtype).removeprefix("torch.")
    assert out.dtype == dtype
    assert (out[1, -1, 2] == 0).all()
    assert lse[1, 2, -1].isneginf()
    # exp(lse - top) of logits near 100 carries their float32 rounding, 100 * 2**-24.
    assert relative_error(out, expected) < max(OPERATOR[name], 2e-5)
    finite = expected_lse.isfinite()
    assert (lse[finite] - expected_lse[finite]).abs().max() < 2 * LSE["float32"]
