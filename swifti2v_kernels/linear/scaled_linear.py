"""A linear layer on rows of 8 bits (W8A8): one matmul on the tensor cores, with scales, bias and GELU in its epilogue.

    out = act((x.values @ weight.values^T) * x.scales[:, None] * weight.scales[None, :] + bias)

int8 is summed in int32, exactly; float8 in float32, on GPUs whose tensor cores keep fewer bits in parts of 64 or 128
channels (``scaled_linear_kernel.py`` says why). Scales, from the left to the right, bias and activation are float32,
and the result is rounded once. What 8 bits lose was lost before: ``quantize_rows`` made the operands.

FLOPs: 2 * M * N * K, at twice the rate of 16 bits or more. Least traffic: (M + N) * K bytes read and M * N elements
written. Against a matmul with a pass of its own for each of scales, bias and GELU it saves reading and writing M * N
elements as many times.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import Spec, check_targets, check_tensor, check_tensors
from ..common.dispatch import KERNEL_DTYPES, compute, kernel_obstacle, public_operator
from ..common.registration import kernel_operator
from .quantize_rows import QuantizedRows, check_dtype, check_rows, check_scales, float8_obstacle

ACTIVATIONS = (None, "gelu_tanh")
#: Channels and columns are multiples of this, and so are the strides of rows: loads of 16 bytes.
ALIGNMENT = 16
#: Up to here offsets within a tile fit into 32 bits.
MAX_STRIDE = 2**23
#: Up to here a sum over channels of int8 fits into 32 bits.
MAX_INT8_CHANNELS = 2**17 - 1


class ScaledCall(NamedTuple):
    """The arguments of the registered operator, of which ``out`` may be made, and the dtype of that."""

    values: Tensor
    scales: Tensor
    weight: Tensor
    weight_scales: Tensor
    bias: Tensor | None
    gelu: bool
    out: Tensor | None
    dtype: torch.dtype = torch.bfloat16

    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.weight.shape[0])

    def check(self) -> None:
        """Checks what can be known of the call without addresses; scales of float64 are for references alone."""
        values = self.values
        check_rows("x.values", values)
        check_dtype("x.values", values.dtype)
        if values.ndim < 2:
            raise ValueError(f"x.values: expected [..., K] of two axes or more, got {list(values.shape)}")
        device = values.device
        check_tensor("weight.values", self.weight, Spec(("N", values.shape[-1]), values.dtype, whole=True), device)
        check_scales("x.scales", self.scales, "x.values", values, (torch.float32, torch.float64))
        columns = self.weight.shape[:1]
        check_tensor("weight.scales", self.weight_scales, Spec(columns, self.scales.dtype, whole=True), device)
        check_tensors(self, device, bias=Spec(columns, whole=True))
        check_dtype("dtype", self.dtype, KERNEL_DTYPES)
        check_tensors(self, device, out=Spec(self.shape(), self.dtype, whole=True))

    def flops(self) -> int:
        return 2 * math.prod(self.values) * self.weight[0]

    def check_written(self) -> None:
        """Checks what only addresses tell: programs read their rows and columns while others write."""
        x, weight = QuantizedRows(*self[:2]), QuantizedRows(*self[2:4])
        check_targets({"out": self.out}, {**x.parts("x"), **weight.parts("weight"), "bias": self.bias}, ())

    def obstacle(self) -> str | None:
        (columns, depth), stride = self.weight.shape, _row_stride(self.values)
        reason = kernel_obstacle((self.scales, self.weight_scales, self.bias, self.out))
        if (reason := reason or float8_obstacle("multiply", self.values.dtype, self.values.device)) is not None:
            return reason
        if columns % ALIGNMENT or depth % ALIGNMENT or stride % ALIGNMENT:
            return (
                f"the kernel takes multiples of {ALIGNMENT} channels, columns and elements from row to row,"
                f" got {depth}, {columns} and {stride}"
            )
        if max(columns, depth, stride) > MAX_STRIDE:
            return f"the kernel takes up to {MAX_STRIDE} columns and elements from row to row, got {columns}, {stride}"
        if self.values.dtype == torch.int8 and depth > MAX_INT8_CHANNELS:
            return f"sums of int32 hold up to {MAX_INT8_CHANNELS} channels of int8, got {depth}"
        return None

    def by_kernel(self) -> Tensor:
        out = self.values.new_empty(self.shape(), dtype=self.dtype) if self.out is None else self.out
        _scaled_linear_op(*self[:6], out)
        return out

    def by_torch(self) -> Tensor:
        """Computes the formula in float32, or float64 where scales are; int8 is multiplied in float64 on the CPU."""
        self.check_written()
        wide = torch.promote_types(self.scales.dtype, torch.float32)
        exact = torch.float64 if self.values.dtype == torch.int8 and self.values.device.type == "cpu" else wide
        y = F.linear(self.values.to(exact), self.weight.to(exact)).to(wide)
        y = y * self.scales.unsqueeze(-1) * self.weight_scales
        y = y if self.bias is None else y + self.bias
        y = (F.gelu(y, approximate="tanh") if self.gelu else y).to(self.dtype)
        return y if self.out is None else self.out.copy_(y)


def _row_stride(values: Tensor) -> int:
    """Returns the number of elements from one row to the next."""
    strides = [s for n, s in zip(values.shape[:-1], values.stride()[:-1], strict=True) if n != 1]
    return strides[-1] if strides else values.shape[-1]


_scaled_linear_op = kernel_operator(
    "scaled_linear",
    "(Tensor values, Tensor scales, Tensor weight, Tensor weight_scales, Tensor? bias, bool gelu, Tensor(a!) out)",
    ScaledCall,
)


@public_operator
def scaled_linear(
    x: QuantizedRows,
    weight: QuantizedRows,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes ``act(x @ weight.T + bias)`` from activations and weights in 8 bits with a scale a row.

    The result is ``act((x.values @ weight.values.T) * x.scales[..., None] * weight.scales + bias)``, in one pass.

    Args:
        x: activations: values ``[..., K]`` float8_e4m3fn or int8, rows that flatten without a copy, channels
            contiguous; scales ``[...]`` float32, one a row, that flatten without a copy too.
        weight: values ``[N, K]`` contiguous, in the dtype of those of ``x``; scales ``[N]`` float32, one an output.
        bias: ``[N]`` float32, float16 or bfloat16, or None.
        activation: None or ``gelu_tanh``.
        dtype: dtype of the result: bfloat16, float16 or float32.
        out: where to write, ``[..., N]`` in ``dtype``, contiguous; overlaps no input.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`). The kernel takes K and
            N that are multiples of 16, float8 on GPUs of compute capability 8.9 and newer. There are no gradients.

    Returns:
        ``[..., N]`` in ``dtype`` (``out`` if given).

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it, with what was given and allowed.

    Examples:
        >>> x, weight = torch.randn(2, 5, 32), torch.randn(48, 32)
        >>> y = scaled_linear(quantize_rows(x), quantize_rows(weight), torch.randn(48), activation="gelu_tanh")
        >>> y.shape, y.dtype
        (torch.Size([2, 5, 48]), torch.bfloat16)

    Source: dynamic quantisation by token of activations and by output of weights (arXiv 2208.07339, 2209.05433).
    """
    for name, rows in (("x", x), ("weight", weight)):
        if not isinstance(rows, QuantizedRows):
            raise TypeError(f"{name}: expected QuantizedRows, got {type(rows).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None or 'gelu_tanh', got {activation!r}")
    call = ScaledCall(*x, *weight, bias, activation is not None, out, dtype)
    return compute(call, backend)
