"""Checks of arguments that operators share; messages name the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_views(name: str, views: Sequence[Tensor], like: Tensor) -> None:
    """``[B, L, H, D]`` views with contiguous D that fit ``like`` in all but L.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or layout do not fit.
    """
    batch, _, heads, head_dim = like.shape
    for i, x in enumerate(views):
        label = name if len(views) == 1 else f"{name}[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(x).__name__}")
        if x.ndim != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (batch, heads, head_dim):
            raise ValueError(f"{label}: expected [{batch}, L, {heads}, {head_dim}], got {tuple(x.shape)}")
        if x.dtype != like.dtype or x.device != like.device:
            raise ValueError(f"{label}: expected {like.dtype} on {like.device}, got {x.dtype} on {x.device}")
        if x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(f"{label}: expected head_dim to be contiguous (stride 1), got stride {x.stride(3)}")


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Every value lies in ``low .. high``.

    On the CPU the values are read and named. On a GPU, reading them would stop the stream, so the check runs there: a
    violation ends the process's CUDA work with the message. Under ``torch.compile`` likewise.

    Raises:
        ValueError: a value on the CPU is out of range.
    """
    inside = ((values >= low) & (values <= high)).all()
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        if not inside:
            raise ValueError(f"{name}: expected values in {low}..{high}, got {values.tolist()}")
        return
    torch._assert_async(inside, f"{name}: a value lies outside {low}..{high}")


def overlapping(a: Tensor, b: Tensor) -> bool:
    """Whether two strided views share an element, or may: True where that cannot be decided cheaply.

    Exact for slices of one buffer: along some axis these are disjoint intervals, or they share an element.
    """
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if a.storage_offset() > b.storage_offset():
        a, b = b, a
    if b.storage_offset() - a.storage_offset() > _extent(a):
        return False
    if a.dtype != b.dtype or a.stride() != b.stride():
        return True
    # Where the buffer starts in its storage is not known: the storage's start and the first view's are likely.
    return not any(_disjoint_along_an_axis(a, b, origin) for origin in (0, a.storage_offset()))


def _disjoint_along_an_axis(a: Tensor, b: Tensor, origin: int) -> bool:
    """Reads both offsets as indices of a buffer with the views' strides; False where a view would leave that buffer."""
    offset_a, offset_b = a.storage_offset() - origin, b.storage_offset() - origin
    disjoint = False
    larger = None
    for axis in sorted(range(a.ndim), key=lambda axis: -a.stride(axis)):
        stride, n, m = a.stride(axis), a.shape[axis], b.shape[axis]
        if stride == 0:
            continue
        start_a, offset_a = divmod(offset_a, stride)
        start_b, offset_b = divmod(offset_b, stride)
        # An index beyond the next larger stride would be another row.
        if larger is not None and (larger % stride or max(start_a + n, start_b + m) * stride > larger):
            return False
        disjoint |= start_a + n <= start_b or start_b + m <= start_a
        larger = stride
    return disjoint and offset_a == offset_b


def self_overlapping(x: Tensor) -> bool:
    """Whether two indices of ``x`` name the same element, or may."""
    needed = 1
    for stride, n in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride < needed:
            return True
        needed = stride * n
    return False


def _extent(x: Tensor) -> int:
    return sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
