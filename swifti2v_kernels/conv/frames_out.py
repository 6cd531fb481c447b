"""Last convolution of a video decoder, whose store writes finished pixels where they belong.

    v = unpatchify(bias + causal convolution of x by weight)                         (as in ``causal_conv3d``)
    out = floor(127.5 * clamp(v, -1, 1) + 128), at most 255                          (uint8)
    out = clamp(v, -1, 1)                                                            (float)

``out`` is a view of the frames to be filled, so a tile is written in its place. x, past, weight and bias are of one
dtype: float16, bfloat16 or float32. Sums are float32 and rounded once.

Why fused: separately, the features are written and read, permuted to pixels, clamped, scaled, cast, permuted to
channels last and copied into the frame: 60 bytes a pixel of 3 bytes. FLOPs: 2 * B * T * h' * w' * 3 * p * p * C * taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import FLOATS, Spec, check_tensor, check_written
from ..common.dispatch import public_operator
from ..common.registration import kernel_operator
from . import calls
from .by_torch import conv_sums

#: Features that one program owns.
MAX_FEATURES = 128


class FramesCall(NamedTuple):
    """The arguments of a call, as the registered operator takes them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    past: Tensor | None
    padding: Sequence[int]
    patch_size: int
    out: Tensor

    def check(self) -> None:
        x, p = self.x, self.patch_size
        if not isinstance(p, int) or p < 1:
            raise ValueError(f"patch_size: expected a positive integer, got {p!r}")
        calls.check_convolution(self, 3 * p * p)
        frames, rows, columns = calls.output_size(x, self.weight, (1, 1, 1), self.padding)
        result = Spec((x.shape[0], frames, p * rows, p * columns, 3), (torch.uint8, *FLOATS))
        check_tensor("out", self.out, result, x.device)

    def flops(self) -> int:
        return 2 * math.prod(self.out) * math.prod(self.weight[1:])

    def check_written(self) -> None:
        check_written(self, ("out",))

    def obstacle(self) -> str | None:
        reason, features = calls.obstacle(self), self.weight.shape[0]
        if reason is None and features > MAX_FEATURES:
            reason = f"kernels exist for up to {MAX_FEATURES} features, got {features}"
        return reason

    def by_torch(self) -> Tensor:
        """Computes the formula above in PyTorch, on a GPU by cuDNN."""
        self.check_written()
        v, p = conv_sums(self), self.patch_size
        if p > 1:
            v = v.unflatten(4, (3, p, p)).permute(0, 1, 2, 6, 3, 5, 4).flatten(2, 3).flatten(3, 4)
        whole = self.out.dtype == torch.uint8
        return self.out.copy_((v.float() * 127.5 + 128).floor_().clamp_(0, 255) if whole else v.clamp(-1, 1))

    def by_kernel(self) -> Tensor:
        _frames_out_op(*self)
        return self.out


_frames_out_op = kernel_operator(
    "frames_out",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? past, SymInt[] padding, int patch_size, Tensor(a!) out)",
    FramesCall,
)


@public_operator
def frames_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    past: Tensor | None = None,
    padding: Sequence[int] | None = None,
    patch_size: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolves the last features of a decoder to colours and stores them as finished frames.

    With ``v`` the convolution plus ``bias``, patches unfolded to pixels, a uint8 frame is
    ``min(floor(127.5 * clamp(v, -1, 1) + 128), 255)`` and a floating one ``clamp(v, -1, 1)``.

    Args:
        x: normed and activated features ``[B, T, h, w, C]``: any strides but channels contiguous.
        weight: ``[3 * p * p, C, kt, kh, kw]`` in ``torch.channels_last_3d`` memory; features by colour, pixel column
            and pixel row, the row fastest (the order of Wan2.2).
        bias: ``[3 * p * p]`` or None.
        out: frames ``[B, T, p * h', p * w', 3]``, uint8 or floating, written in place: any strides
            but colours contiguous; usually a slice of larger frames.
        past: the frames before ``x``, at most ``kt - 1`` and the newest last.
        padding: zeros beyond the top, bottom, left and right of ``x``; negative ones leave out pixels. Default: half of
            the kernel on all sides.
        patch_size: p, pixels in each direction that a feature pixel holds.
        backend: ``auto``, ``torch`` (on a GPU: cuDNN) or ``triton``, as for :func:`swifti2v_kernels.causal_conv3d`.

    Returns:
        ``out`` itself. What becomes of a NaN in uint8, which has none, is undefined.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it, with what was given and allowed.

    Examples:
        >>> features, weight = torch.randn(1, 2, 8, 12, 96), torch.randn(3, 96, 3, 3, 3) / 51
        >>> clip = torch.zeros(1, 9, 16, 12, 3, dtype=torch.uint8)
        >>> weight = weight.to(memory_format=torch.channels_last_3d)
        >>> frames_out(features, weight, None, clip[:, 3:5, 8:]).shape
        torch.Size([1, 2, 8, 12, 3])

    Source: head of the Wan VAE's decoder (diffusers ``AutoencoderKLWan``), whose video processor maps -1..1 to 0..255.
    """
    padding = calls.same_padding(weight) if padding is None else padding
    call = FramesCall(x, weight, bias, past, padding, patch_size, out)
    return calls.computed(call, backend, "frames")
