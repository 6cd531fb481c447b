"""Dequantisation of rows of 8 bits with a scale each: from weights as they are stored to weights that a matmul takes.

    out = values * scales[..., None]

It is computed in float32 and rounded once: bit for bit ``(values.float() * scales[..., None]).to(dtype)``.

Why a kernel: a DiT that keeps its weights in 8 bits does this once a layer and step, to every weight. An element costs
1 byte read and 2 written; eager PyTorch writes float32 twice and reads it twice, 19 bytes. float8 is decoded with
integer instructions, so that GPUs without it have the kernel too. FLOPs: 2 an element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import Spec, check_tensors, check_written
from ..common.dispatch import KERNEL_DTYPES, compute, kernel_obstacle, public_operator
from ..common.registration import kernel_operator
from .quantize_rows import EIGHT_BITS, check_dtype, check_rows, check_scales


class DequantizeCall(NamedTuple):
    """The arguments of the registered operator, of which ``out`` may be made, and the dtype of that."""

    values: Tensor
    scales: Tensor
    out: Tensor | None
    dtype: torch.dtype = torch.bfloat16

    def check(self) -> None:
        check_rows("values", self.values)
        check_dtype("values", self.values.dtype, EIGHT_BITS)
        check_scales("scales", self.scales, "values", self.values, (torch.float32,))
        check_dtype("dtype", self.dtype, KERNEL_DTYPES)
        if self.out is not None:
            check_rows("out", self.out)
            check_tensors(self, self.values.device, out=Spec(self.values.shape, self.dtype))

    def check_written(self) -> None:
        check_written(self, ("out",))

    def obstacle(self) -> str | None:
        return kernel_obstacle((self.scales, self.out))

    def by_torch(self) -> Tensor:
        """Computes the formula above in PyTorch, differentiable by the scales."""
        self.check_written()
        y = (self.values.float() * self.scales.unsqueeze(-1)).to(self.dtype)
        return y if self.out is None else self.out.copy_(y)

    def by_kernel(self) -> Tensor:
        out = self.values.new_empty(self.values.shape, dtype=self.dtype) if self.out is None else self.out
        _dequantize_rows_op(self.values, self.scales, out)
        return out


_dequantize_rows_op = kernel_operator(
    "dequantize_rows", "(Tensor values, Tensor scales, Tensor(a!) out)", DequantizeCall
)


@public_operator
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
        scales: float32 ``[...]``, one a row, that flatten to ``[M]``; one for all is
            ``scale.expand(values.shape[:-1])``.
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
    return compute(DequantizeCall(values, scales, out, dtype), backend)
