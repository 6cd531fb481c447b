"""The parts that the calls of the convolutions share: checks, the choice of what computes them, and what follows a sum.

Calls whose sums a residual and a norm follow, those of ``causal_conv3d`` and ``upsample_conv2d``, have the fields
``x``, ``residual``, ``norm_weight``, ``out``, ``normed``, ``keep_sum`` and ``backend``, and the methods ``shape()``, of
their results, and ``summed()``, which returns them in PyTorch, differentiable, without a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.checks import Spec, check_tensor, check_tensors
from ..common.configs import fastest
from ..common.dispatch import Choice, compute, default_backend, kernel_obstacle
from ..common.target import capability_of, for_gpu
from ..norm.rms_norm_silu import rms_norm_silu
from .by_torch import HALVES

#: A norm after a convolution, in its kernel, needs one program to own all channels of its pixels.
MAX_OWNED_CHANNELS = 192
#: Frames under the taps in time that the kernels can address.
MAX_TAPS = 3
#: The input of a convolution, and what its padding is.
FRAMES, PADDING = Spec(("B", "T", "h", "w", "C")), "(top, bottom, left, right)"


def check_convolution(call: Any, columns: int | str = "C'") -> None:
    """Checks the arguments that ``causal_conv3d`` and ``frames_out`` share; the weight has so many output channels."""
    x, weight, past = call.x, call.weight, call.past
    check_tensor("x", x, FRAMES)
    check_tensor("weight", weight, Spec((columns, x.shape[4], "kt", "kh", "kw"), x.dtype, last=""), x.device)
    if not weight.permute(0, 2, 3, 4, 1).is_contiguous():
        raise ValueError(
            "weight: expected channels last in memory: weight.to(memory_format=torch.channels_last_3d);"
            f" got strides {weight.stride()}"
        )
    vector, before = Spec(weight.shape[:1], x.dtype, whole=True), Spec((x.shape[0], "P", *x.shape[2:]), x.dtype)
    check_tensors(call, x.device, bias=vector, past=before)
    taps = weight.shape[2]
    if past is not None and past.shape[1] > taps - 1:
        raise ValueError(f"past: expected at most {taps - 1} frames (taps in time - 1), got {past.shape[1]}")
    check_integers("padding", call.padding, PADDING, 4)


def check_integers(name: str, values: Sequence[int], expected: str, count: int) -> None:
    """Checks that an argument is so many integers; ``expected`` says so in the message."""
    if not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected {expected}, got {values!r}")
    if len(values) != count or not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise ValueError(f"{name}: expected {expected}, got {tuple(values)}")


def check_results(call: Any) -> None:
    """Checks the residual, and what is written, for what can be known without addresses."""
    if call.norm_weight is None and (call.normed is not None or not call.keep_sum):
        raise ValueError("norm_weight: expected a tensor, since the normed sum is asked for")
    if not call.keep_sum and call.out is not None:
        raise ValueError("out: expected None without keep_sum, since the sum is not stored")
    like = Spec(call.shape(), call.x.dtype)
    check_tensors(call, call.x.device, residual=like, out=like, normed=like)


def check_written(call: Any) -> None:
    """Checks that outputs overlap nothing that is still to be read.

    A program reads its residual before it writes its sum; others read x and the parameters meanwhile.
    """
    checks.check_written(call, ("out", "normed"), {"out": call.out}, ("residual",))
    checks.check_written(call, ("normed",))


def same_padding(weight: Tensor) -> tuple[int, ...]:
    """Returns the zeros (top, bottom, left, right) that leave the size of a frame as it is, for odd kernels.

    They are empty where the weight is no kernel, which its own check says.
    """
    if not isinstance(weight, Tensor) or weight.ndim != 5:
        return ()
    top, left = weight.shape[3] // 2, weight.shape[4] // 2
    return top, top, left, left


def output_size(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[int, int, int]:
    """Returns the numbers of frames, rows and columns of the result.

    Raises:
        ValueError: there would be none.
    """
    frames = x.shape[1] // stride[0]
    rows = (x.shape[2] + padding[0] + padding[1] - weight.shape[3]) // stride[1] + 1
    columns = (x.shape[3] + padding[2] + padding[3] - weight.shape[4]) // stride[2] + 1
    if min(frames, rows, columns) < 1:
        raise ValueError(
            f"x: {tuple(x.shape[1:4])} frames, rows and columns leave nothing at kernel {tuple(weight.shape[2:])},"
            f" stride {tuple(stride)}, padding {tuple(padding)}"
        )
    return frames, rows, columns


def obstacle(call: Any) -> str | None:
    """Returns why a kernel cannot take the call, or None if it can: shifts by two rows are 32-bit numbers."""
    if (reason := kernel_obstacle(x for x in call if isinstance(x, Tensor))) is not None:
        return reason
    for x in (call.x, getattr(call, "past", None)):
        if x is not None and max(x.stride()[2:4]) >= 2**30:
            return f"kernels take row and column strides below 2**30 elements, got {tuple(x.stride()[2:4])}"
    taps = call.weight.shape[2] if hasattr(call, "weight") else 1
    return f"kernels exist for up to {MAX_TAPS} taps in time, got {taps}" if taps > MAX_TAPS else None


def computed(call: Any, backend: str, kernel: str | None = None) -> Any:
    """Returns what a call gives, on a GPU by cuDNN where it was measured as faster.

    ``kernel`` is what the operator is called in ``configs/conv3d.json``, None where it is called by its taps.
    """
    return compute(call, backend, preference=lambda call: cudnn_preference(call, kernel), told=_implementation)


def cudnn_preference(call: Any, kernel: str | None) -> str | None:
    """Returns why cuDNN takes a call that a kernel could take; None on a CPU, and where a backend is asked for."""
    x = call.x
    if not for_gpu(x.device) or default_backend() != "auto":
        return None
    if x.dtype not in HALVES:
        return "cuDNN has tensor cores for float32, the kernel has not"
    columns = call.phases.shape[1] if kernel == "upsample" else call.weight.shape[0]
    match = {"capability": capability_of(x.device), "dtype": str(x.dtype).removeprefix("torch.")}
    match |= {"kernel": kernel or list(call.weight.shape[2:]), "channels": [x.shape[4], columns]}
    best, reason = fastest("conv3d", match, "pixels", x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3])
    return reason if best == "cudnn" else None


def _implementation(call: Any, backend: str, reason: str) -> Choice:
    """Returns the choice in words: who makes the sums, and whether a norm is a kernel of its own."""
    kind = "implicit GEMM" if backend == "triton" else "cudnn" if for_gpu(call.x.device) else "reference"
    norm_weight = getattr(call, "norm_weight", None)
    if norm_weight is not None and (backend == "torch" or norm_weight.shape[0] > MAX_OWNED_CHANNELS):
        kind = f"{kind}, then rms_norm_silu"
    return Choice(backend, kind, reason)


def by_torch(call: Any) -> Any:
    """Returns what the call gives; whoever computes the sum, the norm has its own kernel."""
    call.check_written()
    y = call.summed()
    y = y if call.out is None else call.out.copy_(y)
    if call.norm_weight is None:
        return y
    z = rms_norm_silu(y, call.norm_weight, out=call.normed, backend=call.backend)
    return (y, z) if call.keep_sum else z


def by_kernel(call: Any, operator: Callable[[Tensor | None, Tensor | None, Tensor | None], None]) -> Any:
    """Returns what the call gives by an operator of (norm weight, sum, normed sum); each of them may be None."""
    x, gamma, out, normed = call.x, call.norm_weight, call.out, call.normed
    fused = gamma is not None and gamma.shape[0] <= MAX_OWNED_CHANNELS
    if gamma is not None and normed is None:
        normed = x.new_empty(call.shape())
    if not call.keep_sum:
        out = None if fused else normed  # the norm then overwrites the sum
    elif out is None:
        out = x.new_empty(call.shape())
    operator(*((gamma, out, normed) if fused else (None, out, None)))
    if gamma is None:
        return out
    if not fused:
        rms_norm_silu(out, gamma, out=normed, backend="triton")
    return (out, normed) if call.keep_sum else normed
