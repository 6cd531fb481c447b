"""``linear_gelu``: the plain formula, its errors, and one graph; its derivatives are in test_transforms.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swifti2v_kernels import linear_gelu
from tests.support.tolerances import OPERATOR, relative_error

MEMORY = torch.rand(12, 12)


def test_linear_gelu_is_a_linear_layer_and_the_tanh_gelu() -> None:
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(8, 6), torch.randn(8)
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    compiled = torch.compile(linear_gelu, fullgraph=True, backend="aot_eager")
    out = torch.full((2, 5, 8), float("nan"))
    assert linear_gelu(x, weight, bias, out=out) is out
    for y in (out, linear_gelu(x, weight, bias), compiled(x, weight, bias)):
        assert relative_error(y, expected) < OPERATOR["float32"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.rand(2, 5, 12)[:, :4]}, r"x: expected rows that flatten to \[M, C\] without a copy"),
        ({"weight": torch.rand(12, 5)}, r"weight: expected contiguous \[N, 12\] torch.float32 on cpu, got \[12, 5\]"),
        ({"bias": torch.rand(7)}, r"bias: expected contiguous \[12\] torch.float32 on cpu, got \[7\]"),
        ({"out": torch.rand(11, 12)}, r"out: expected contiguous \[12, 12\]"),
        ({"out": MEMORY, "x": MEMORY}, "out: expected memory of its own, but it overlaps x$"),
        ({"out": MEMORY, "weight": MEMORY}, "out: expected memory of its own, but it overlaps weight$"),
    ],
)
def test_the_argument_that_does_not_fit_is_named(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x": torch.rand(12, 12), "weight": torch.rand(12, 12), "bias": torch.rand(12)}
    with pytest.raises(ValueError, match=message):
        linear_gelu(**arguments | changes)
