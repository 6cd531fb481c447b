"""``linear_gelu``: the plain formula, one graph, and its cost; its derivatives are in test_transforms.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swifti2v_kernels import explain, linear_gelu
from swifti2v_kernels.linear.linear_gelu import cost as linear_gelu_cost
from tests.support.tolerances import OPERATOR, relative_error


def test_linear_gelu_is_a_linear_layer_and_the_tanh_gelu():
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(8, 6), torch.randn(8)
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert relative_error(linear_gelu(x, weight, bias), expected) < OPERATOR["float32"]
    out = torch.full((2, 5, 8), float("nan"))
    assert linear_gelu(x, weight, bias, out=out) is out
    assert relative_error(out, expected) < OPERATOR["float32"]
    assert explain(linear_gelu, x, weight, bias).implementation == "linear, GELU in place"
    weight.requires_grad_()
    assert explain(linear_gelu, x, weight, bias).reason == "an input needs gradients, which no kernel computes"
    assert linear_gelu(x, weight, bias).requires_grad
    rows = x.detach()[:, :4]  # batch entries apart: rows that do not flatten
    with pytest.raises(ValueError, match=r"x: expected rows that flatten to \[M, C\] without a copy"):
        linear_gelu(rows, weight, bias)
    with pytest.raises(ValueError, match=r"weight: expected contiguous \[N, 6\] torch.float32 on cpu, got \[8, 5\]"):
        linear_gelu(x, torch.randn(8, 5), bias)
    with pytest.raises(ValueError, match=r"bias: expected contiguous \[8\] torch.float32 on cpu, got \[7\]"):
        linear_gelu(x, weight, bias[:7])
    with pytest.raises(ValueError, match=r"out: expected contiguous \[2, 5, 8\]"):
        linear_gelu(x, weight, bias, out=out[:, :4])


@pytest.mark.parametrize("written", ["x", "weight"])
def test_writing_over_what_is_read_is_refused(written):
    given = {"x": torch.rand(12, 12), "weight": torch.rand(12, 12)}
    with pytest.raises(ValueError, match=f"out: expected memory of its own, but it overlaps {written}$"):
        linear_gelu(**given, bias=torch.rand(12), out=given[written])


def test_the_least_cost_by_hand():
    least = linear_gelu_cost(70400, 1536, 8960)
    assert least.flops == (2 * 1536 + 8) * 70400 * 8960
    assert least.bytes == 2 * (70400 * 1536 + 1536 * 8960 + 8960 + 70400 * 8960)


def test_it_compiles_alone_in_a_foreign_module():
    class Foreign(torch.nn.Module):
        def forward(self, x, *rest):
            return linear_gelu(x * 2, *rest)

    arguments = torch.randn(2, 3, 96), torch.randn(64, 96), torch.randn(64)
    expected = Foreign()(*arguments)
    torch.compiler.reset()
    actual = torch.compile(Foreign(), fullgraph=True, backend="aot_eager")(*arguments)
    assert relative_error(actual, expected) < OPERATOR["float32"]
