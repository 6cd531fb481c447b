"""Dequantisation of rows of 8 bits with a scale each: from weights as they are stored to weights that a matmul takes.

    out = values * scales[..., None]

| tensor | shape    | dtype                            | layout                                                    |
|--------|----------|----------------------------------|-----------------------------------------------------------|
| values | [..., C] | float8_e4m3fn, float8_e5m2, int8 | rows that flatten to [M, C]: any row stride, C contiguous |
| scales | [...]    | float32                          | numbers that flatten to [M], such as one number expanded  |
| out    | [..., C] | bf16, fp16, fp32                 | as values                                                 |

It is computed in float32 and rounded once: bit for bit ``(values.float() * scales[..., None]).to(dtype)``.

Why a kernel: a DiT that keeps its weights in 8 bits does this once a layer and step, to every weight. An element costs
1 byte read and 2 written; eager PyTorch writes float32 twice and reads it twice, 19 bytes. float8 is decoded with
integer instructions, so that GPUs without it have the kernel too. FLOPs: 2 an element.

Limits: the kernel runs on NVIDIA GPUs of compute capability 8.0 or newer and has no derivative; PyTorch computes all
other calls, and its path is differentiable by the scales. Not yet timed on hardware.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import check_targets
from ..common.cost import Cost
from ..common.dispatch import KERNEL_DTYPES, Choice, kernel_obstacle, pick_backend, public_operator
from ..common.registration import add_op_namespace_prefix
from ..common.target import on_device
from .rows import EIGHT_BITS, check_rows


def dequantize_rows_reference(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the formula above in PyTorch, differentiable by the scales."""
    return (values.float() * scales.unsqueeze(-1)).to(dtype)


@torch.library.custom_op(
    add_op_namespace_prefix("dequantize_rows"),
    mutates_args=("out",),
    schema="(Tensor values, Tensor scales, Tensor(a!) out) -> ()",
)
def _dequantize_rows_op(values: Tensor, scales: Tensor, out: Tensor) -> None:
    check_targets({"out": out}, {"values": values, "scales": scales}, ())
    if out.numel():
        from .dequantize_rows_kernel import launch_dequantize_rows

        with on_device(out.device):
            launch_dequantize_rows(values, scales, out)


@_dequantize_rows_op.register_fake
def _(values, scales, out):  # type: ignore[no-untyped-def]
    return None


def _choose(values: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None, backend: str) -> Choice:
    _check(values, scales, dtype, out)
    chosen, reason = pick_backend(backend, kernel_obstacle((scales, out)))
    return Choice(chosen, "reference" if chosen == "torch" else "fused kernel", reason)


@public_operator(_choose)
def dequantize_rows(
    values: Tensor,
    scales: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dequantises rows of 8 bits: returns ``values * scales[..., None]`` in ``dtype``.

    Args:
        values: ``[..., C]`` in float8_e4m3fn, float8_e5m2 or int8: rows with contiguous channels that flatten to
            ``[M, C]`` without a copy.
        scales: float32 ``[...]``, one a row; one for all is ``scale.expand(values.shape[:-1])``.
        dtype: dtype of the result: float32, float16 or bfloat16.
        out: where to write, shaped and laid out as ``values``, in ``dtype``; overlaps no input. With it a kernel
            allocates nothing.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        ``[..., C]`` in ``dtype`` (``out`` if it was given).

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Examples:
        >>> dequantize_rows(torch.tensor([[2, -3], [4, 5]], dtype=torch.int8), torch.tensor([1.0, 0.5])).tolist()
        [[2.0, -3.0], [2.0, 2.5]]

    Source: 8-bit checkpoints of Wan, ``weight = float8 * scale``.
    """
    _check(values, scales, dtype, out)
    chosen, _ = pick_backend(backend, kernel_obstacle((scales, out)))
    if chosen == "torch":
        if out is not None:
            check_targets({"out": out}, {"values": values, "scales": scales}, ())
        y = dequantize_rows_reference(values, scales, dtype)
        return y if out is None else out.copy_(y)
    out = values.new_empty(values.shape, dtype=dtype) if out is None else out
    _dequantize_rows_op(values, scales, out)
    return out


def _check(values: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None) -> None:
    check_rows("values", values)
    if values.dtype not in EIGHT_BITS:
        raise ValueError(f"values: expected one of {', '.join(map(str, EIGHT_BITS))}, got {values.dtype}")
    check_rows("scales", scales, trailing=0)
    if scales.shape != values.shape[:-1] or scales.dtype != torch.float32 or scales.device != values.device:
        raise ValueError(
            f"scales: expected {list(values.shape[:-1])} torch.float32 on {values.device}, one a row of values,"
            f" got {list(scales.shape)} {scales.dtype} on {scales.device}"
        )
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, KERNEL_DTYPES))}, got {dtype}")
    if out is not None:
        check_rows("out", out)
        if out.shape != values.shape or out.dtype != dtype or out.device != values.device:
            raise ValueError(
                f"out: expected {list(values.shape)} {dtype} on {values.device}, got {list(out.shape)} {out.dtype}"
                f" on {out.device}"
            )


def cost(rows: int, channels: int, itemsize: int = 2) -> Cost:
    """Returns the least cost of one call."""
    return Cost(2 * rows * channels, rows * (channels + 4), rows * channels * itemsize)
