"""A linear layer on rows of 8 bits (W8A8): one matmul on the tensor cores, with scales, bias and GELU in its epilogue.

    out = act((x.values @ weight.values^T) * x.scales[:, None] * weight.scales[None, :] + bias)

| tensor         | shape    | dtype                              | layout                                            |
|----------------|----------|------------------------------------|---------------------------------------------------|
| x.values       | [..., K] | float8_e4m3fn or int8              | rows that flatten to [M, K]: any row stride       |
| x.scales       | [...]    | float32                            | numbers that flatten to [M]                       |
| weight.values  | [N, K]   | as x.values                        | contiguous                                        |
| weight.scales  | [N]      | float32                            | contiguous                                        |
| bias           | [N]      | fp32, fp16, bf16                   | contiguous                                        |
| out            | [..., N] | bf16, fp16, fp32                   | contiguous                                        |

int8 is summed in int32, exactly; float8 in float32, on GPUs whose tensor cores keep fewer bits in parts of 64 or 128
channels (``scaled_linear_kernel.py`` says why). Scales, from the left to the right, bias and activation are float32,
and the result is rounded once. What 8 bits lose was lost before: ``quantize_rows`` made the operands.

FLOPs: 2 * M * N * K, at twice the rate of 16 bits or more. Least traffic: (M + N) * K bytes read and M * N elements
written. Against a matmul with a pass of its own for each of scales, bias and GELU it saves reading and writing M * N
elements as many times.

Backends: the kernel, by default, since it does all in one pass; with ``backend="torch"`` the reference below or, on a
GPU that has them, torch's own 8-bit matmuls: ``torch._scaled_mm`` (float8 to bf16 on 9.0; GELU and a bias of another
dtype then round once more) and ``torch._int_mm`` (int8; scales and the rest are passes of their own).

Limits: the kernel takes K and N that are multiples of 16, on NVIDIA GPUs of compute capability 8.0 (int8) or 8.9
(float8) or newer, and up to 131,071 channels of int8, which int32 can sum. Rows of 8 bits have no derivative. Not yet
timed on hardware.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..common.checks import Spec, check_targets, check_tensor, check_tensors
from ..common.cost import Cost
from ..common.dispatch import KERNEL_DTYPES, Choice, compute, derivative_obstacle, kernel_obstacle, public_operator
from ..common.registration import registered, registered_operator
from ..common.target import capability_of
from ..common.tracing import constant_when_traced
from .rows import LARGEST, QuantizedRows, check_rows, check_scales, float8_obstacle

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
        """Returns the shape of the result."""
        return (*self.values.shape[:-1], self.weight.shape[0])

    def check(self) -> None:
        """Checks what can be known of the call without addresses; scales of float64 are for references alone."""
        values = self.values
        check_rows("x.values", values)
        if values.ndim < 2 or values.dtype not in LARGEST:
            allowed = " or ".join(map(str, LARGEST))
            raise ValueError(f"x.values: expected [..., K] {allowed}, got {list(values.shape)} {values.dtype}")
        device = values.device
        check_tensor("weight.values", self.weight, Spec(("N", values.shape[-1]), values.dtype, whole=True), device)
        check_scales("x.scales", self.scales, "x.values", values, (torch.float32, torch.float64))
        columns = self.weight.shape[:1]
        check_tensor("weight.scales", self.weight_scales, Spec(columns, self.scales.dtype, whole=True), device)
        check_tensors(self, device, bias=Spec(columns, whole=True))
        if self.dtype not in KERNEL_DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, KERNEL_DTYPES))}, got {self.dtype}")
        check_tensors(self, device, out=Spec(self.shape(), self.dtype, whole=True))

    def check_out(self) -> None:
        """Checks what only addresses tell: programs read their rows and columns while others write."""
        x, weight = QuantizedRows(*self[:2]), QuantizedRows(*self[2:4])
        check_targets({"out": self.out}, {**x.parts("x"), **weight.parts("weight"), "bias": self.bias}, ())

    def obstacle(self) -> str | None:
        """Returns why the kernel cannot take the call, or None if it can."""
        (columns, depth), stride = self.weight.shape, _row_stride(self.values)
        if (reason := kernel_obstacle((self.scales, self.weight_scales, self.bias, self.out))) is not None:
            return reason
        if (reason := float8_obstacle("multiply", self.values.dtype, self.values.device)) is not None:
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

    def implementation(self, backend: str, reason: str) -> Choice:
        """Returns what computes the call."""
        return Choice(backend, torchs_product(self) if backend == "torch" else "fused matmul", reason)

    def by_kernel(self) -> Tensor:
        """Computes the call by the kernel."""
        out = self.values.new_empty(self.shape(), dtype=self.dtype) if self.out is None else self.out
        _scaled_linear_op(*self[:6], out)
        return out

    def by_torch(self) -> Tensor:
        """Computes the call by one of torch's matmuls in 8 bits, or by the reference."""
        if self.out is not None:
            self.check_out()
        implementation = torchs_product(self)
        if implementation == "reference":
            y = scaled_linear_reference(self)
            return y if self.out is None else self.out.copy_(y)
        out = self.values.new_empty(self.shape(), dtype=self.dtype) if self.out is None else self.out
        values, scales = self.values.view(-1, self.values.shape[-1]), self.scales.view(-1)
        rows, weight = out.view(-1, out.shape[-1]), self.weight.t()
        if implementation == "torch._int_mm":
            rows.copy_(_end(self, torch._int_mm(values, weight), scales))
            return out
        fused = self.bias is not None and self.bias.dtype == self.dtype
        torch.ops.aten._scaled_mm.out(
            values, weight, scales.unsqueeze(1), self.weight_scales.unsqueeze(0), self.bias if fused else None,
            out_dtype=self.dtype, use_fast_accum=False, out=rows,
        )  # fmt: skip
        if self.bias is not None and not fused:
            rows += self.bias
        if self.gelu:
            torch.ops.aten.gelu_(rows, approximate="tanh")
        return out


def scaled_linear_reference(call: ScaledCall) -> Tensor:
    """Computes the formula above in float32, or float64 where scales are; int8 is multiplied in float64 on the CPU."""
    wide = torch.promote_types(call.scales.dtype, torch.float32)
    exact = torch.float64 if call.values.dtype == torch.int8 and call.values.device.type == "cpu" else wide
    sums = F.linear(call.values.to(exact), call.weight.to(exact)).to(wide)
    return _end(call, sums, call.scales).to(call.dtype)


def _end(call: ScaledCall, sums: Tensor, scales: Tensor) -> Tensor:
    y = sums * scales.unsqueeze(-1) * call.weight_scales
    y = y if call.bias is None else y + call.bias
    return F.gelu(y, approximate="tanh") if call.gelu else y


def _row_stride(values: Tensor) -> int:
    """Returns the number of elements from one row to the next."""
    strides = [s for n, s in zip(values.shape[:-1], values.stride()[:-1], strict=True) if n != 1]
    return strides[-1] if strides else values.shape[-1]


# Constant for a device: under torch.compile it is read once, at trace time.
@constant_when_traced
def _scales_by_rows(device: torch.device) -> bool:
    """Returns whether ``torch._scaled_mm`` takes a scale a row here, in all versions of torch from 2.6 on."""
    return device.type == "cuda" and torch.version.hip is None and capability_of(device) == 90


def torchs_product(call: ScaledCall) -> str:
    """Returns which of torch's matmuls computes the call, or ``reference``."""
    values, scales, (columns, depth) = call.values, call.scales, call.weight.shape
    if derivative_obstacle((scales, call.weight_scales, call.bias)) is not None:
        return "reference"
    # Both want rows of 16 bytes without gaps, and torch._int_mm more than 16 of them.
    dense = values.is_contiguous() and scales.is_contiguous() and columns % 16 == 0 and depth % 16 == 0
    if values.device.type != "cuda" or torch.version.hip is not None or not dense or scales.dtype == torch.float64:
        return "reference"
    if values.dtype == torch.int8:
        return "torch._int_mm" if scales.numel() > 16 else "reference"
    if call.dtype == torch.bfloat16 and scales.numel() and _scales_by_rows(values.device):
        return "torch._scaled_mm"
    return "reference"


@registered_operator(
    "scaled_linear",
    "(Tensor values, Tensor scales, Tensor weight, Tensor weight_scales, Tensor? bias, bool gelu, Tensor(a!) out)",
    ScaledCall,
)
def _scaled_linear_op(call: ScaledCall) -> None:
    call.check_out()
    if call.out.numel():
        from .scaled_linear_kernel import launch_scaled_linear

        launch_scaled_linear(call)


@register_flop_formula(registered("scaled_linear"))
def _flops(*shapes: Any, **kwargs: Any) -> int:
    of = ScaledCall(*shapes[:7])
    return 2 * math.prod(of.values) * of.weight[0]


@public_operator()
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
            contiguous; scales ``[...]`` float32, one a row.
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
    return compute(call, backend, told=ScaledCall.implementation)


def cost(rows: int, depth: int, columns: int, itemsize: int = 2, *, gelu: bool = False) -> Cost:
    """Returns the least cost of one call.

    Args:
        rows: M, rows of ``x``.
        depth: K, channels of a row.
        columns: N, outputs.
        itemsize: bytes of an element of ``out`` and ``bias``.
        gelu: whether the result is activated, which counts as eight operations.
    """
    flops = 2 * rows * depth * columns + (8 * rows * columns if gelu else 0)
    read = (rows + columns) * (depth + 4) + columns * itemsize
    return Cost(flops, read, rows * columns * itemsize)
