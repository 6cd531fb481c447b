"""Quantisation of rows to 8 bits with a scale each, for the input of an 8-bit matmul that no norm has quantised.

    scale = max|x| / LARGEST                                                            (over the channels of a row)
    value = round(x / scale)                                           (to nearest, ties to even; LARGEST: 448 or 127)

| tensor | shape    | dtype                          | layout                                                     |
|--------|----------|--------------------------------|------------------------------------------------------------|
| x      | [..., C] | fp32, fp16, bf16 (fp64: torch) | rows that flatten to [M, C]: any row stride, C contiguous  |
| values | [..., C] | float8_e4m3fn, int8            | as x                                                       |
| scales | [...]    | float32                        | numbers that flatten to [M]                                |

It is computed in float32 and rounded once; :mod:`swifti2v_kernels.linear.rows` says what becomes of rows of zeros and
of rows with a NaN or an infinity. It is lossy: a value is off by at most half a step, 1/16 of itself in float8 and
1/254 of its row's largest in int8.

Why a kernel: a row is read once and stays in registers between its maximum and its values, so that M * C elements of
16 bits cost 3 bytes each (2 read, 1 written, and 4 a row for the scale); eager PyTorch, with its float32 copies, 39.
The norms of ``norm/adaln.py`` do the same to their results with ``quantize=``, without reading them again; this
operator is for the inputs of a layer's other matmuls. FLOPs: about 5 an element.

Limits: the kernel takes rows of up to 16,384 channels on NVIDIA GPUs of compute capability 8.0 (int8) or 8.9 (float8)
or newer; PyTorch computes all other calls. There is no derivative. Not yet timed on hardware.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import FLOATS, check_written
from ..common.dispatch import compute, kernel_obstacle, public_operator
from ..common.registration import kernel_operator
from . import rows
from .rows import QuantizedRows

#: A row is held in registers.
MAX_CHANNELS = 16384


class QuantizeCall(NamedTuple):
    """The arguments of the registered operator, then those of the public function that become its outputs."""

    x: Tensor
    values: Tensor | None = None
    scales: Tensor | None = None
    dtype: torch.dtype = torch.float8_e4m3fn
    out: QuantizedRows | None = None

    def check(self) -> None:
        rows.check_rows("x", self.x)
        if self.x.dtype not in FLOATS:
            raise ValueError(f"x: expected float32, float16 or bfloat16 (float64: torch), got {self.x.dtype}")
        rows.check_dtype("dtype", self.dtype)
        if self.out is not None:
            rows.check_out("out", self.out, self.x, self.dtype)
            rows.check_rows("out.values", self.out.values)
            rows.check_rows("out.scales", self.out.scales, trailing=0)

    def check_written(self) -> None:
        check_written(self, ("values", "scales"), {"out.values": self.values, "out.scales": self.scales})

    def obstacle(self) -> str | None:
        if (reason := kernel_obstacle((self.x,))) is not None:
            return reason
        if self.x.shape[-1] > MAX_CHANNELS:
            return f"kernels exist for up to {MAX_CHANNELS} channels, got {self.x.shape[-1]}"
        return rows.float8_obstacle("round to", self.dtype, self.x.device)

    def by_torch(self) -> QuantizedRows:
        """Computes the formula above in PyTorch, without gradients."""
        if self.out is not None:
            check_written(self, (), self.out.parts("out"))
        return rows.written(self.out, rows.quantized_reference(self.x, self.dtype))

    def by_kernel(self) -> QuantizedRows:
        out = rows.new_rows(self.x, self.dtype) if self.out is None else self.out
        _quantize_rows_op(self.x, *out)
        return out


_quantize_rows_op = kernel_operator("quantize_rows", "(Tensor x, Tensor(a!) values, Tensor(b!) scales)", QuantizeCall)


@public_operator()
def quantize_rows(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    out: QuantizedRows | None = None,
    backend: str = "auto",
) -> QuantizedRows:
    """Rounds every row to 8 bits with a scale of its own; the result has no gradients.

    The scale is ``max|x| / LARGEST`` over the channels of a row, with LARGEST 448 for float8 and 127 for int8, and a
    value is ``round(x / scale)``.

    Args:
        x: ``[..., C]``: rows with contiguous channels that flatten to ``[M, C]`` without a copy, any stride apart.
        dtype: ``torch.float8_e4m3fn`` or ``torch.int8``.
        out: where to write: values shaped as ``x`` with its layout rules, float32 scales ``[...]`` that flatten to
            ``[M]``; overlaps nothing. With it a kernel allocates nothing.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        The pair of values ``[..., C]`` in ``dtype`` and float32 scales ``[...]``, those of ``out`` if it was given. A
        row of zeros has scale 1, one with a NaN or an infinity scale NaN.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Examples:
        >>> values, scales = quantize_rows(torch.tensor([[1.0, -2.0, 254.0], [0.0, 0.0, 0.0]]), torch.int8)
        >>> values.tolist(), scales.tolist()
        ([[0, -1, 127], [0, 0, 0]], [2.0, 1.0])

    Source: symmetric quantisation of activations by token, as for 8-bit matmuls of transformers (arXiv 2208.07339).
    """
    return compute(QuantizeCall(x, dtype=dtype, out=out), backend)
