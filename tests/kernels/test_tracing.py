"""Tracing by ``torch.compile``: functions that are constant in it, and autocast around operators."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._pytree import tree_flatten

from bench.operators.check import randomised
from swifti2v_kernels import norm_modulate
from swifti2v_kernels.common.case import Case
from swifti2v_kernels.common.tracing import constant_when_traced
from tests.kernels.test_global_state import LEAST
from tests.support.tolerances import OPERATOR, relative_error


def test_the_mark_is_torch_s_own() -> None:
    """The mark is private to torch: should a release change it, this fails before a graph breaks."""

    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert constant_when_traced(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


@pytest.mark.parametrize("around", [True, False], ids=["around the graph", "inside it"])
def test_autocast_breaks_no_graph_and_changes_no_dtype(around: bool) -> None:
    x = torch.randn(1, 6, 32)

    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with nullcontext() if around else torch.autocast("cpu", torch.bfloat16):
            y = norm_modulate(x)
            return y, y @ y.transpose(1, 2)

    with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
        y, product = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, norm_modulate(x))
    assert product.dtype == torch.bfloat16  # the caller's own code goes on under autocast


@pytest.mark.parametrize("case", LEAST, ids=lambda case: case.name)
def test_every_operator_is_part_of_one_graph_on_the_pytorch_path(case: Case) -> None:
    """The layouts are those of models; tests/interpreter does the same on the kernels."""
    results = []
    torch.compiler.reset()
    for operator in (torch.compile(case.operator, fullgraph=True, backend="aot_eager"), case.operator):
        args, kwargs = randomised(case, torch.device("cpu"))
        # Views of inputs that a graph overwrites are more than torch's own functionalisation takes.
        changes = {"backend": "torch"} | ({"inplace": False} if "inplace" in kwargs else {})
        results.append(tree_flatten(operator(*args, **kwargs | changes))[0])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a.double(), b.double()) < OPERATOR["bfloat16"]
