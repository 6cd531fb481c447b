"""Rows in 8 bits, each with a scale: their type and the checks that operators share, and the operator that makes them.

    scale = max|x| / LARGEST                                                            (over the channels of a row)
    value = round(x / scale)                                           (to nearest, ties to even; LARGEST: 448 or 127)

It is computed in float32 and rounded once. The quotient is taken as ``x * (1 / scale)``: dividing every element would
cost kernels more than memory does, and the two differ by 2e-7 of the value, which counts only for what lies that close
to the middle between two values. It is lossy: a value is off by at most half a step, 1/16 of itself in float8 and
1/254 of its row's largest in int8.

* A row whose scale would be below float32's normal numbers (zeros, or nothing above 5e-36) has scale 1 and values 0.
* A row with a NaN or an infinity has scale NaN, so that all that is computed from it is NaN, and values of no meaning.

Why a kernel: a row is read once and stays in registers between its maximum and its values, so that M * C elements of
16 bits cost 3 bytes each (2 read, 1 written, and 4 a row for the scale); eager PyTorch, with its float32 copies, 39.
The norms of ``norm/adaln.py`` do the same to their results with ``quantize=``, without reading them again; this
operator is for the inputs of a layer's other matmuls, and for weights. FLOPs: about 5 an element.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import FLOATS, Spec, check_tensor, check_written
from ..common.dispatch import compute, kernel_obstacle, public_operator
from ..common.registration import kernel_operator
from ..common.target import capability_of, constant_when_traced

#: The largest magnitude of the 8-bit dtypes that rows are quantised to.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
#: The 8-bit dtypes that rows are stored in.
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
#: The least scale: the smallest normal number of float32, of which the reciprocal is finite.
LEAST_SCALE = 2.0**-126
#: GPUs older than this have no instruction that rounds to float8.
FLOAT8_CAPABILITY = 89
#: A row is held in registers by the kernel.
MAX_CHANNELS = 16384


class QuantizedRows(NamedTuple):
    """Rows in 8 bits, which stand for ``values * scales[..., None]``.

    They are activations ``[..., C]`` with a scale a token, or weights ``[N, K]`` with a scale an output.
    :func:`swifti2v_kernels.quantize_rows` makes them, and so do the adaptive norms with ``quantize``;
    :func:`swifti2v_kernels.scaled_linear` multiplies them.

    Attributes:
        values: ``[..., C]`` in float8_e4m3fn or int8 (weights from files also float8_e5m2).
        scales: float32 ``[...]``, one a row.

    Examples:
        >>> rows = quantize_rows(torch.randn(2, 5, 32), torch.int8)
        >>> rows.values.dtype, rows.scales.shape
        (torch.int8, torch.Size([2, 5]))
    """

    values: Tensor
    scales: Tensor

    def parts(self, name: str) -> dict[str, Tensor]:
        """Returns the two tensors by the names that messages give them."""
        return {f"{name}.values": self.values, f"{name}.scales": self.scales}

    def copy_(self, rows: QuantizedRows) -> QuantizedRows:
        """Overwrites both tensors with those of ``rows``, and returns itself."""
        self.values.copy_(rows.values)
        self.scales.copy_(rows.scales)
        return self


def quantized_reference(rows: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Rounds ``rows`` [..., C] to 8 bits by the formula above, without gradients."""
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    scales = rows.abs().amax(dim=-1).float() / LARGEST[dtype]
    finite = scales.isfinite()
    scales = scales.masked_fill(scales < LEAST_SCALE, 1.0).masked_fill(~finite, float("nan"))
    values = (rows * (1.0 / scales).unsqueeze(-1)).masked_fill(~finite.unsqueeze(-1), 0.0)
    if dtype == torch.int8:
        values = values.round()
    return QuantizedRows(values.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scales)


def new_rows(like: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Returns unwritten rows, shaped as ``like`` [..., C]."""
    return QuantizedRows(like.new_empty(like.shape, dtype=dtype), like.new_empty(like.shape[:-1], dtype=torch.float32))


def check_dtype(name: str, dtype: torch.dtype, allowed: Iterable[torch.dtype] = LARGEST) -> None:
    """Checks that ``dtype`` is one of those allowed, by default those that rows are quantised to."""
    if dtype not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(str, allowed))}, got {dtype}")


def check_out(name: str, out: QuantizedRows, like: Tensor, dtype: torch.dtype) -> None:
    """Checks that ``out`` can hold the rows of ``like`` [..., C] in ``dtype``."""
    if not isinstance(out, QuantizedRows):
        raise TypeError(f"{name}: expected QuantizedRows, got {type(out).__name__}")
    check_tensor(f"{name}.values", out.values, Spec(like.shape, dtype), like.device)
    check_tensor(f"{name}.scales", out.scales, Spec(like.shape[:-1], torch.float32, last=""), like.device)


def check_rows(name: str, x: Tensor, trailing: int = 1) -> None:
    """Checks that the leading axes of ``x`` flatten to one axis of rows without a copy.

    The ``trailing`` axes of channels (1, or 0 for none) stay; they are contiguous and not empty.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.numel() and x.ndim >= trailing and x.is_contiguous():
        return
    if trailing and (x.ndim < 1 or x.shape[-1] == 0):
        raise ValueError(f"{name}: expected [..., C] with at least one channel, got {list(x.shape)}")
    if trailing and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected the channels to be contiguous (stride 1), got stride {x.stride(-1)}")
    axes = list(zip(x.shape, x.stride(), strict=True))[: x.ndim - trailing]
    leading = [(n, stride) for n, stride in axes if n != 1]
    if x.numel() and any(a[1] != b[0] * b[1] for a, b in itertools.pairwise(leading)):
        kind = "rows that flatten to [M, C]" if trailing else "numbers that flatten to [M]"
        raise ValueError(f"{name}: expected {kind} without a copy, got shape {list(x.shape)} with strides {x.stride()}")


def check_scales(name: str, scales: Tensor, of: str, values: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks that ``scales`` are numbers of a row of ``values`` each, which the argument ``of`` is, and flatten to [M].

    The first of the dtypes is the one that the message names: float64 is for references alone.
    """
    check_rows(name, scales, trailing=0)
    if scales.shape != values.shape[:-1] or scales.dtype not in dtypes or scales.device != values.device:
        raise ValueError(
            f"{name}: expected {list(values.shape[:-1])} {dtypes[0]} on {values.device}, one a row of {of},"
            f" got {list(scales.shape)} {scales.dtype} on {scales.device}"
        )


# Constant for a device: under torch.compile it is read once, at trace time.
@constant_when_traced
def float8_obstacle(does: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns why there is no kernel for rows of ``dtype`` on ``device``, which has other kernels, or None if there is.

    ``does`` is what that kernel does with them, for the message: ``multiply`` or ``round to``.
    """
    capability = capability_of(device)
    if dtype == torch.int8 or capability is None or capability >= FLOAT8_CAPABILITY:
        return None
    return f"kernels that {does} float8 exist for compute capability 8.9 and newer, this device has {capability / 10}"


class QuantizeCall(NamedTuple):
    """The arguments of the registered operator, then those of the public function that become its outputs."""

    x: Tensor
    values: Tensor | None = None
    scales: Tensor | None = None
    dtype: torch.dtype = torch.float8_e4m3fn
    out: QuantizedRows | None = None

    def check(self) -> None:
        check_rows("x", self.x)
        if self.x.dtype not in FLOATS:
            raise ValueError(f"x: expected float32, float16 or bfloat16 (float64: torch), got {self.x.dtype}")
        check_dtype("dtype", self.dtype)
        if self.out is not None:
            check_out("out", self.out, self.x, self.dtype)
            check_rows("out.values", self.out.values)
            check_rows("out.scales", self.out.scales, trailing=0)

    def check_written(self) -> None:
        check_written(self, ("values", "scales"), {"out.values": self.values, "out.scales": self.scales})

    def obstacle(self) -> str | None:
        reason, channels = kernel_obstacle((self.x,)), self.x.shape[-1]
        if reason is None and channels > MAX_CHANNELS:
            reason = f"kernels exist for up to {MAX_CHANNELS} channels, got {channels}"
        return reason or float8_obstacle("round to", self.dtype, self.x.device)

    def by_torch(self) -> QuantizedRows:
        """Computes the formula above in PyTorch, without gradients."""
        rows = quantized_reference(self.x, self.dtype)
        if self.out is None:
            return rows
        check_written(self, (), self.out.parts("out"))
        return self.out.copy_(rows)

    def by_kernel(self) -> QuantizedRows:
        out = new_rows(self.x, self.dtype) if self.out is None else self.out
        _quantize_rows_op(self.x, *out)
        return out


_quantize_rows_op = kernel_operator("quantize_rows", "(Tensor x, Tensor(a!) values, Tensor(b!) scales)", QuantizeCall)


@public_operator
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
        x: ``[..., C]`` float32, float16 or bfloat16 (float64: PyTorch): rows with contiguous channels that flatten to
            ``[M, C]`` without a copy, any stride apart.
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
