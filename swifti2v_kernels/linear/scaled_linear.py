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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..common.checks import check_parameter, check_targets
from ..common.cost import Cost
from ..common.dispatch import KERNEL_DTYPES, Choice, derivative_obstacle, kernel_obstacle, pick_backend, public_operator
from ..common.registration import add_op_namespace_prefix, registered
from ..common.target import capability_of, on_device
from ..common.tracing import constant_when_traced
from .rows import LARGEST, QuantizedRows, check_rows, float8_obstacle

ACTIVATIONS = (None, "gelu_tanh")
_SCALES = (torch.float32, torch.float64)
#: Channels and columns are multiples of this, and so are the strides of rows: loads of 16 bytes.
ALIGNMENT = 16
#: Up to here offsets within a tile fit into 32 bits.
MAX_STRIDE = 2**23
#: Up to here a sum over channels of int8 fits into 32 bits.
MAX_INT8_CHANNELS = 2**17 - 1


def scaled_linear_reference(
    x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None, activation: str | None, dtype: torch.dtype
) -> Tensor:
    """Computes the formula above in float32, or float64 where scales are; int8 is multiplied in float64 on the CPU."""
    wide = torch.promote_types(x.scales.dtype, torch.float32)
    exact = torch.float64 if x.values.dtype == torch.int8 and x.values.device.type == "cpu" else wide
    sums = F.linear(x.values.to(exact), weight.values.to(exact)).to(wide)
    return _end(sums, x.scales, weight.scales, bias, activation).to(dtype)


def _end(sums: Tensor, scales: Tensor, weight_scales: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = sums * scales.unsqueeze(-1) * weight_scales
    y = y if bias is None else y + bias
    return y if activation is None else F.gelu(y, approximate="tanh")


@torch.library.custom_op(
    add_op_namespace_prefix("scaled_linear"),
    mutates_args=("out",),
    schema="(Tensor values, Tensor scales, Tensor weight, Tensor weight_scales, Tensor? bias, bool gelu,"
    " Tensor(a!) out) -> ()",
)
def _scaled_linear_op(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    gelu: bool,
    out: Tensor,
) -> None:
    x, rows = QuantizedRows(values, scales), QuantizedRows(weight, weight_scales)
    _check_out(x, rows, bias, out)
    if out.numel():
        from .scaled_linear_kernel import launch_scaled_linear

        with on_device(out.device):
            launch_scaled_linear(*_flat(x), *rows, bias, gelu, out.view(-1, out.shape[-1]))


@_scaled_linear_op.register_fake
def _(values, scales, weight, weight_scales, bias, gelu, out):  # type: ignore[no-untyped-def]
    return None


@register_flop_formula(registered("scaled_linear"))
def _flops(values, scales, weight, weight_scales, bias, gelu, out, *args, **kwargs):  # type: ignore[no-untyped-def]
    *leading, depth = values
    rows = 1
    for n in leading:
        rows *= n
    return 2 * rows * weight[0] * depth


def _choose(*, backend: str, **arguments: Any) -> Choice:
    _check(**arguments)
    x, weight, bias, dtype = (arguments[name] for name in ("x", "weight", "bias", "dtype"))
    chosen, reason = pick_backend(backend, _obstacle(x, weight, bias, arguments["out"]))
    return Choice(chosen, _by_torch(x, weight, bias, dtype) if chosen == "torch" else "fused matmul", reason)


@public_operator(_choose)
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
    _check(x, weight, bias, activation, dtype, out)
    chosen, _ = pick_backend(backend, _obstacle(x, weight, bias, out))
    if chosen == "triton":
        out = x.values.new_empty((*x.values.shape[:-1], weight.values.shape[0]), dtype=dtype) if out is None else out
        _scaled_linear_op(*x, *weight, bias, activation is not None, out)
        return out
    if out is not None:
        _check_out(x, weight, bias, out)
    implementation = _by_torch(x, weight, bias, dtype)
    if implementation == "reference":
        y = scaled_linear_reference(x, weight, bias, activation, dtype)
        return y if out is None else out.copy_(y)
    out = x.values.new_empty((*x.values.shape[:-1], weight.values.shape[0]), dtype=dtype) if out is None else out
    (values, scales), rows = _flat(x), out.view(-1, out.shape[-1])
    if implementation == "torch._int_mm":
        rows.copy_(_end(torch._int_mm(values, weight.values.t()), scales, weight.scales, bias, activation))
        return out
    fused = bias is not None and bias.dtype == dtype
    torch.ops.aten._scaled_mm.out(
        values, weight.values.t(), scales.unsqueeze(1), weight.scales.unsqueeze(0), bias if fused else None,
        out_dtype=dtype, use_fast_accum=False, out=rows,
    )  # fmt: skip
    if bias is not None and not fused:
        rows += bias
    if activation is not None:
        torch.ops.aten.gelu_(rows, approximate="tanh")
    return out


def _flat(x: QuantizedRows) -> QuantizedRows:
    """Returns the rows as views of shape [M, K] and [M]."""
    return QuantizedRows(x.values.view(-1, x.values.shape[-1]), x.scales.view(-1))


def _obstacle(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None, out: Tensor | None) -> str | None:
    columns, depth = weight.values.shape
    stride = _row_stride(x.values)
    if (reason := kernel_obstacle((x.scales, weight.scales, bias, out))) is not None:
        return reason
    if (reason := float8_obstacle("multiply", x.values.dtype, x.values.device)) is not None:
        return reason
    if columns % ALIGNMENT or depth % ALIGNMENT or stride % ALIGNMENT:
        return (
            f"the kernel takes multiples of {ALIGNMENT} channels, columns and elements from row to row,"
            f" got {depth}, {columns} and {stride}"
        )
    if max(columns, depth, stride) > MAX_STRIDE:
        return f"the kernel takes up to {MAX_STRIDE} columns and elements from row to row, got {columns}, {stride}"
    if x.values.dtype == torch.int8 and depth > MAX_INT8_CHANNELS:
        return f"sums of int32 hold up to {MAX_INT8_CHANNELS} channels of int8, got {depth}"
    return None


def _row_stride(values: Tensor) -> int:
    """Returns the number of elements from one row to the next."""
    strides = [s for n, s in zip(values.shape[:-1], values.stride()[:-1], strict=True) if n != 1]
    return strides[-1] if strides else values.shape[-1]


# Constant for a device: under torch.compile it is read once, at trace time.
@constant_when_traced
def _scales_by_rows(device: torch.device) -> bool:
    """Returns whether ``torch._scaled_mm`` takes a scale a row here, in all versions of torch from 2.6 on."""
    return device.type == "cuda" and torch.version.hip is None and capability_of(device) == 90


def _by_torch(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None, dtype: torch.dtype) -> str:
    """Returns which of torch's matmuls computes the call, or ``reference``."""
    columns, depth = weight.values.shape
    if derivative_obstacle((x.scales, weight.scales, bias)) is not None:
        return "reference"
    # Both want rows of 16 bytes without gaps, and torch._int_mm more than 16 of them.
    dense = x.values.is_contiguous() and x.scales.is_contiguous() and columns % 16 == 0 and depth % 16 == 0
    if x.values.device.type != "cuda" or torch.version.hip is not None or not dense or x.scales.dtype == torch.float64:
        return "reference"
    if x.values.dtype == torch.int8:
        return "torch._int_mm" if x.scales.numel() > 16 else "reference"
    if dtype == torch.bfloat16 and x.scales.numel() and _scales_by_rows(x.values.device):
        return "torch._scaled_mm"
    return "reference"


def _check(
    x: QuantizedRows,
    weight: QuantizedRows,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> None:
    """Checks what can be known of a call without addresses; scales of float64 are for references alone."""
    for name, rows in (("x", x), ("weight", weight)):
        if not isinstance(rows, QuantizedRows):
            raise TypeError(f"{name}: expected QuantizedRows, got {type(rows).__name__}")
    check_rows("x.values", x.values)
    device = x.values.device
    if x.values.ndim < 2 or x.values.dtype not in LARGEST:
        allowed = " or ".join(map(str, LARGEST))
        raise ValueError(f"x.values: expected [..., K] {allowed}, got {list(x.values.shape)} {x.values.dtype}")
    check_parameter("weight.values", weight.values, ("N", x.values.shape[-1]), x.values.dtype, device)
    columns = weight.values.shape[0]
    check_rows("x.scales", x.scales, trailing=0)
    check_rows("weight.scales", weight.scales, trailing=0)
    if x.scales.shape != x.values.shape[:-1] or x.scales.dtype not in _SCALES or x.scales.device != device:
        raise ValueError(
            f"x.scales: expected {list(x.values.shape[:-1])} torch.float32 on {device}, one a row of x.values,"
            f" got {list(x.scales.shape)} {x.scales.dtype} on {x.scales.device}"
        )
    check_parameter("weight.scales", weight.scales, (columns,), x.scales.dtype, device)
    if bias is not None:
        check_parameter("bias", bias, (columns,), None, device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None or 'gelu_tanh', got {activation!r}")
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, KERNEL_DTYPES))}, got {dtype}")
    if out is not None:
        wanted = (*x.values.shape[:-1], columns)
        if not isinstance(out, Tensor):
            raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
        if out.shape != wanted or out.dtype != dtype or out.device != device or not out.is_contiguous():
            raise ValueError(
                f"out: expected {list(wanted)} {dtype} on {device}, contiguous,"
                f" got {list(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
            )


def _check_out(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None, out: Tensor) -> None:
    """Checks what only addresses tell: programs read their rows and columns while others write."""
    check_targets({"out": out}, {**x.parts("x"), **weight.parts("weight"), "bias": bias}, ())


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
