"""Attention of hosts on the kernels themselves: which kernel served what, and that the results are the hosts'."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from swifti2v_kernels.integrations.sdpa import replace_sdpa
from swifti2v_kernels.integrations.wan import accelerate, restore
from tests.support.operators_called import Operators
from tests.support.tolerances import KERNEL, OPERATOR, relative_error
from tests.support.wan_standin import attention, model


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_attention_is_served_by_the_kernel(dtype):
    q, k, v = (torch.randn(2, 3, n, 64).to(dtype) for n in (40, 33, 33))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.2)
    with Operators() as operators, replace_sdpa() as calls:
        actual = F.scaled_dot_product_attention(q, k, v, scale=0.2)
        F.scaled_dot_product_attention(*(x[..., :40].contiguous() for x in (q, k, v)))
    assert relative_error(actual, expected) < KERNEL[str(dtype).removeprefix("torch.")]
    assert dict(operators.counts) == {"segment_attention": 1}
    assert dict(calls.implementations) == {"portable": 1}
    assert dict(calls.not_served) == {"kernels exist for head_dim 64, 96, 128, got 40": 1}


def test_the_original_wan_code_is_served_by_the_kernels():
    torch.manual_seed(0)
    host = model.WanModel(model.WanI2VCrossAttention, dim=128, num_layers=1)
    tokens, grids = [torch.randn(24, 128), torch.randn(24, 128)], [(2, 3, 4)] * 2
    given = tokens, grids, 0.3 * torch.randn(2, 6, 128), torch.randn(2, 9, 128), 24
    expected = host(*given)
    report = accelerate(host)
    attention.SEEN.clear()
    with Operators() as operators:
        actual = host(*given)
    assert not attention.SEEN
    assert dict(report.calls.implementations) == {"portable": 3}
    assert dict(operators.counts) == {"segment_attention": 3, "norm_rope": 1, "adaln": 4}
    assert relative_error(actual, expected) < OPERATOR["bfloat16"]
    restore(host)
    assert torch.equal(host(*given), expected)
