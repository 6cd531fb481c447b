"""Checks and shapes that the convolutions of video autoencoders share; messages name the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import Spec, check_tensor

#: A norm after a convolution, in its kernel, needs one program to own all channels of its pixels.
MAX_OWNED_CHANNELS = 192
#: The input of a convolution, and what its padding is.
FRAMES, PADDING = Spec(("B", "T", "h", "w", "C")), "(top, bottom, left, right)"


def check_kernel(weight: Tensor, x: Tensor, columns: int | str = "C'") -> None:
    """Checks that ``weight`` is ``[C', C, kt, kh, kw]``, channels last in memory, in the dtype and on the device of x.

    Raises:
        TypeError: not a tensor.
        ValueError: shape, dtype, device or layout do not fit.
    """
    check_tensor("weight", weight, Spec((columns, x.shape[4], "kt", "kh", "kw"), x.dtype, last=""), x.device)
    if not weight.permute(0, 2, 3, 4, 1).is_contiguous():
        raise ValueError(
            "weight: expected channels last in memory: weight.to(memory_format=torch.channels_last_3d);"
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
    check_tensor("past", past, Spec((x.shape[0], "P", *x.shape[2:]), x.dtype), x.device)
    if past.shape[1] > taps - 1:
        raise ValueError(f"past: expected at most {taps - 1} frames (taps in time - 1), got {past.shape[1]}")


def same_padding(weight: Tensor) -> tuple[int, ...]:
    """Returns the zeros (top, bottom, left, right) that leave the size of a frame as it is, for odd kernels.

    They are empty where the weight is no kernel, which its own check says.
    """
    if not isinstance(weight, Tensor) or weight.ndim != 5:
        return ()
    top, left = weight.shape[3] // 2, weight.shape[4] // 2
    return top, top, left, left


def check_integers(name: str, values: Sequence[int], expected: str, count: int) -> None:
    """Checks that an argument is so many integers; ``expected`` says so in the message.

    Raises:
        TypeError: not a sequence.
        ValueError: anything else.
    """
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
