"""Checks and shapes that the convolutions of video autoencoders share; messages name the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import check_frames

#: A norm after a convolution, in its kernel, needs one program to own all channels of its pixels.
MAX_OWNED_CHANNELS = 192


def check_kernel(name: str, weight: Tensor, x: Tensor, columns: int | str = "C'") -> None:
    """Checks that a kernel is ``[C', C, kt, kh, kw]`` in the dtype and on the device of ``x``, channels last in memory.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or layout do not fit.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(weight).__name__}")
    channels = x.shape[4]
    fits = weight.ndim == 5 and weight.numel() > 0 and weight.shape[1] == channels
    fits = fits and (isinstance(columns, str) or weight.shape[0] == columns)
    if not fits or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"{name}: expected [{columns}, {channels}, kt, kh, kw] {x.dtype} on {x.device},"
            f" got {list(weight.shape)} {weight.dtype} on {weight.device}"
        )
    if not weight.permute(0, 2, 3, 4, 1).is_contiguous():
        raise ValueError(
            f"{name}: expected channels last in memory: weight.to(memory_format=torch.channels_last_3d);"
            f" got strides {weight.stride()}"
        )


def check_past(past: Tensor | None, x: Tensor, taps: int) -> None:
    """Checks that ``past`` is None, or up to ``taps - 1`` frames shaped as those of ``x``.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or layout do not fit.
    """
    if past is None:
        return
    batch, _, height, width, channels = x.shape
    check_frames("past", past, (batch, "P", height, width, channels), (x.dtype,), x.device)
    if past.shape[1] > taps - 1:
        raise ValueError(f"past: expected at most {taps - 1} frames (taps in time - 1), got {past.shape[1]}")


def same_padding(weight: Tensor) -> tuple[int, int, int, int]:
    """Returns the zeros (top, bottom, left, right) that leave the size of a frame as it is, for odd kernels."""
    top, left = weight.shape[3] // 2, weight.shape[4] // 2
    return top, top, left, left


def check_padding(padding: Sequence[int]) -> None:
    """Checks that the padding is four integers: top, bottom, left, right.

    Raises:
        TypeError: not a sequence.
        ValueError: anything else.
    """
    _check_integers("padding", padding, "(top, bottom, left, right)", 4)


def check_stride(stride: Sequence[int]) -> None:
    """Checks that the stride is three positive integers: time, rows, columns.

    Raises:
        TypeError: not a sequence.
        ValueError: anything else.
    """
    expected = "three positive numbers (time, rows, columns)"
    _check_integers("stride", stride, expected, 3)
    if min(stride) < 1:
        raise ValueError(f"stride: expected {expected}, got {tuple(stride)}")


def _check_integers(name: str, values: Sequence[int], expected: str, count: int) -> None:
    if not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected {expected}, got {values!r}")
    if len(values) != count or not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise ValueError(f"{name}: expected {expected}, got {tuple(values)}")


def stride_obstacle(*frames: Tensor | None) -> str | None:
    """Returns why a kernel cannot address these inputs, or None if it can: shifts by two rows are 32-bit numbers."""
    for x in frames:
        if x is not None and max(x.stride()[2:4]) >= 2**30:
            return f"kernels take row and column strides below 2**30 elements, got {tuple(x.stride()[2:4])}"
    return None


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
