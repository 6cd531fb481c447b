"""The first half of a feed-forward: a linear layer with GELU (tanh) in the epilogue of its matmul.

    out = gelu_tanh(x @ weight^T + bias)

Why fused: for M tokens of C channels and N = F * C hidden ones, the matmul writes M * N elements; GELU as a pass of its
own reads and writes them once more, 2 * F * C elements a token. For Wan 1.3B (F = 5.83) that is 11.7 times a row of the
residual stream, as much as everything else in a layer that is not a matmul; at 70,400 tokens in 16 bits 2.5 GB a layer.
In place of a second buffer it also saves M * N elements of memory.

torch already has the epilogue: on CUDA ``aten::_addmm_activation`` is one cuBLASLt call with ``EPILOGUE_GELU_BIAS``,
which saves all of it. A kernel of ours could only lose by being a slower matmul, so there is none. On the CPU, where
that operator means the exact GELU, in graphs that ``torch.compile`` fuses itself, and where an input needs gradients,
it is a linear layer and a GELU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import Spec, check_targets, check_tensor
from ..common.dispatch import derivative_obstacle, public_operator
from .quantize_rows import check_rows


@public_operator
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Computes ``gelu_tanh(x @ weight.T + bias)`` without a pass of its own for the GELU.

    Args:
        x: ``[..., K]`` of any floating dtype: rows that flatten to ``[M, K]`` without a copy.
        weight: ``[N, K]`` contiguous, as in ``torch.nn.Linear``, in the dtype of ``x``.
        bias: ``[N]`` in the dtype of ``x``.
        out: where to write, ``[..., N]`` contiguous; overlaps no input.

    Returns:
        ``[..., N]`` in the dtype of ``x`` (``out`` if given).

    Raises:
        TypeError, ValueError: a type, shape, dtype or layout does not fit; the message names the argument.

    Examples:
        >>> linear_gelu(torch.randn(1, 30, 96), torch.randn(256, 96), torch.randn(256)).shape
        torch.Size([1, 30, 256])

    Source: feed-forward of Wan (diffusers ``FeedForward`` with ``gelu-approximate``).
    """
    check_rows("x", x)
    check_tensor("weight", weight, Spec(("N*", x.shape[-1]), x.dtype, whole=True), x.device)
    check_tensor("bias", bias, Spec(weight.shape[:1], x.dtype, whole=True), x.device)
    if out is not None:
        check_tensor("out", out, Spec((*x.shape[:-1], len(weight)), x.dtype, whole=True), x.device)
        check_targets({"out": out}, {"x": x, "weight": weight, "bias": bias}, ())
    if torch.compiler.is_compiling() or derivative_obstacle((x, weight, bias)) is not None:
        y = F.gelu(F.linear(x, weight, bias), approximate="tanh")
        return y if out is None else out.copy_(y)
    if out is None:
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    rows, result = x.view(-1, x.shape[-1]), out.view(-1, weight.shape[0])
    if x.device.type == "cuda" and torch.version.hip is None:
        torch.ops.aten._addmm_activation.out(bias, rows, weight.t(), use_gelu=True, out=result)
    else:
        torch.addmm(bias, rows, weight.t(), out=result)
        torch.ops.aten.gelu_(result, approximate="tanh")
    return out
