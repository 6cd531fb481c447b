"""Every operator by its kernel, at toy sizes: its schema and its fake hold, and its call is one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from swifti2v_kernels import gated_residual_norm_modulate
from swifti2v_kernels.common.registration import NAMESPACE
from tests.support.differentiable_calls import CALLS, Differentiable


def _quantized(x: Tensor, update: Tensor) -> Any:
    return gated_residual_norm_modulate(x, update, quantize=torch.int8)


#: Those that have an operator of their own, and a norm that ends in 8 bits.
REGISTERED = [
    *(call for call in CALLS if call.name != "linear_gelu"),
    Differentiable("gated_residual_norm_modulate int8", gated_residual_norm_modulate, _quantized, ((1, 6, 32),) * 2),
]


class Noted(TorchDispatchMode):
    """Notes the calls of this library's registered operators, with copies of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.calls.append((func, tree_map_only(Tensor, torch.clone, args)))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("call", REGISTERED, ids=lambda call: call.name)
def test_a_call_is_one_graph_and_its_operators_keep_their_word(call: Differentiable) -> None:
    """Operators write what their schemas say and nothing else, and fakes have the shapes of results of any size."""
    inputs = call.tensors(torch.float32)
    with Noted() as noted:
        expected = call.results(*inputs)
    assert noted.calls
    for operator, arguments in noted.calls:
        torch.library.opcheck(operator, arguments)
    torch.compiler.reset()
    compiled = torch.compile(call.results, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs), expected, strict=True):
        assert torch.equal(a, b)
