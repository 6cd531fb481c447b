"""Calls whose sums a residual and a norm follow, ``causal_conv3d`` and ``upsample_conv2d``, share this.

A call has the fields ``x``, ``residual``, ``norm_weight``, ``out``, ``normed``, ``keep_sum`` and ``backend``, and the
methods ``shape()``, of its results, and ``summed()``, which returns them in PyTorch, differentiable, without a norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..common.checks import Spec, check_tensors, check_written
from ..common.dispatch import Choice
from ..common.target import for_gpu
from ..norm.rms_norm_silu import rms_norm_silu
from .checks import MAX_OWNED_CHANNELS


def check_results(call: Any) -> None:
    """Checks the residual, and what is written, for what can be known without addresses."""
    if call.norm_weight is None and (call.normed is not None or not call.keep_sum):
        raise ValueError("norm_weight: expected a tensor, since the normed sum is asked for")
    if not call.keep_sum and call.out is not None:
        raise ValueError("out: expected None without keep_sum, since the sum is not stored")
    like = Spec(call.shape(), call.x.dtype)
    check_tensors(call, call.x.device, residual=like, out=like, normed=like)


def check_outputs(call: Any) -> None:
    """Checks that outputs overlap nothing that is still to be read.

    A program reads its residual before it writes its sum; others read x and the parameters meanwhile.
    """
    check_written(call, ("out", "normed"), {"out": call.out}, ("residual",))
    check_written(call, ("normed",))


def implementation(call: Any, backend: str, reason: str) -> Choice:
    """Returns the choice in words: who makes the sums, and whether the norm is a kernel of its own."""
    kind = "implicit GEMM" if backend == "triton" else "cudnn" if for_gpu(call.x.device) else "reference"
    fused = backend == "triton" and call.shape()[4] <= MAX_OWNED_CHANNELS
    return Choice(backend, kind if fused or call.norm_weight is None else f"{kind}, then rms_norm_silu", reason)


def by_torch(call: Any) -> Any:
    """Returns what the call gives; whoever computes the sum, the norm has its own kernel."""
    check_outputs(call)
    y = call.summed()
    y = y if call.out is None else call.out.copy_(y)
    if call.norm_weight is None:
        return y
    return _results(call, y, rms_norm_silu(y, call.norm_weight, out=call.normed, backend=call.backend))


def by_kernel(call: Any, operator: Callable[[Tensor | None, Tensor | None, Tensor | None], None]) -> Any:
    """Returns what the call gives by an operator of (norm weight, sum, normed sum); each of them may be None."""
    shape, out, normed = call.shape(), call.out, call.normed
    fused = call.norm_weight is not None and shape[4] <= MAX_OWNED_CHANNELS
    if call.norm_weight is not None and normed is None:
        normed = call.x.new_empty(shape)
    if not call.keep_sum:
        out = None if fused else normed  # the norm then overwrites the sum
    elif out is None:
        out = call.x.new_empty(shape)
    operator(*((call.norm_weight, out, normed) if fused else (None, out, None)))
    if call.norm_weight is None:
        return out
    if not fused:
        rms_norm_silu(out, call.norm_weight, out=normed, backend="triton")
    return _results(call, out, normed)


def _results(call: Any, y: Tensor | None, z: Tensor) -> Any:
    return (y, z) if call.keep_sum else z
