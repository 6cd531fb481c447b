"""Last convolution of a video decoder, whose store writes finished pixels where they belong.

    v = unpatchify(bias + causal convolution of x by weight)                         (as in ``causal_conv3d``)
    out = floor(127.5 * clamp(v, -1, 1) + 128), at most 255                          (uint8)
    out = clamp(v, -1, 1)                                                            (float)

| tensor | shape                      | dtype            | layout                                                      |
|--------|----------------------------|------------------|-------------------------------------------------------------|
| x      | [B, T, h, w, C]            | fp32, fp16, bf16 | any strides but channels contiguous                         |
| past   | [B, P, h, w, C]            | as x             | the same, P < kt; None for the beginning of the clip        |
| weight | [3 * p * p, C, kt, kh, kw] | as x             | channels last in memory; features (colour, column, row)     |
| bias   | [3 * p * p]                | as x             | contiguous                                                  |
| out    | [B, T, p * h', p * w', 3]  | uint8, any float | any strides but colours contiguous: a tile of larger frames |

``out`` is a view of the frames to be filled, so a tile is written in its place. Sums are float32 and rounded once.

Why fused: separately, the features are written and read, permuted to pixels, clamped, scaled, cast, permuted to
channels last and copied into the frame: 60 bytes a pixel of 3 bytes. FLOPs: 2 * B * T * h' * w' * 3 * p * p * C * taps.

Limits: the kernel takes up to 3 taps in time and 128 features on NVIDIA GPUs of compute capability 8.0 or newer and has
no derivative: PyTorch (on a GPU: cuDNN) computes all other calls. Three colours; uint8 has no NaN. Timed on an NVIDIA
H200 only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..common.checks import FLOATS, check_frames, check_targets, check_vector
from ..common.cost import Cost
from ..common.dispatch import Choice, derivative_obstacle, kernel_obstacle, pick_backend, public_operator
from ..common.registration import add_op_namespace_prefix, registered
from ..common.target import for_gpu, on_device
from .by_torch import conv_sums, cudnn_preference
from .checks import (
    check_kernel,
    check_padding,
    check_past,
    output_size,
    same_padding,
    stride_obstacle,
)

#: Frames under the taps in time, and features, that the kernel can address.
MAX_TAPS, MAX_FEATURES = 3, 128


def frames_out_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    past: Tensor | None,
    padding: Sequence[int],
    patch_size: int,
) -> Tensor:
    """Computes the formula above into ``out`` and returns it; arguments as in :func:`frames_out`."""
    v = conv_sums(x, past, weight, bias, (1, 1, 1), padding)
    if patch_size > 1:
        v = v.unflatten(4, (3, patch_size, patch_size)).permute(0, 1, 2, 6, 3, 5, 4).flatten(2, 3).flatten(3, 4)
    v = (v.float() * 127.5 + 128).floor_().clamp_(0, 255) if out.dtype == torch.uint8 else v.clamp(-1, 1)
    return out.copy_(v)


@torch.library.custom_op(
    add_op_namespace_prefix("frames_out"),
    mutates_args=("out",),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? past, SymInt[] padding, int patch_size,"
    " Tensor(a!) out) -> ()",
)
def _frames_out_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    padding: Sequence[int],
    patch_size: int,
    out: Tensor,
) -> None:
    _check_output(x, weight, bias, past, out)
    from .frames_out_kernel import launch_frames_out

    with on_device(x.device):
        launch_frames_out(x, past, weight, bias, out, padding, patch_size)


@_frames_out_op.register_fake
def _(x, weight, bias, past, padding, patch_size, out):  # type: ignore[no-untyped-def]
    return None


@register_flop_formula(registered("frames_out"))
def _flops(x, weight, bias, past, padding, patch_size, out, *args, **kwargs):  # type: ignore[no-untyped-def]
    pixels = out[0] * out[1] * out[2] * out[3] // patch_size**2
    return cost(pixels, weight[1], weight[2] * weight[3] * weight[4], patch_size).flops


def _choose(*, backend: str, **arguments: Any) -> Choice:
    _check(**arguments)
    chosen, reason = _backend(backend, arguments)
    in_torch = "cudnn" if for_gpu(arguments["x"].device) else "reference"
    return Choice(chosen, in_torch if chosen == "torch" else "implicit GEMM", reason)


@public_operator(_choose)
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
        x: normed and activated features ``[B, T, h, w, C]``, channels contiguous.
        weight: ``[3 * p * p, C, kt, kh, kw]`` in ``torch.channels_last_3d`` memory; features by colour, pixel column
            and pixel row, the row fastest (the order of Wan2.2).
        bias: ``[3 * p * p]`` or None.
        out: frames ``[B, T, p * h', p * w', 3]``, uint8 or floating, written in place; usually a slice of larger ones.
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
    padding = same_padding(weight) if padding is None and isinstance(weight, Tensor) and weight.ndim == 5 else padding
    arguments: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "out": out, "past": past}
    arguments |= {"padding": padding, "patch_size": patch_size}
    _check(**arguments)
    chosen, _ = _backend(backend, arguments)
    if chosen == "torch":
        _check_output(x, weight, bias, past, out)
        return frames_out_reference(**arguments)
    assert padding is not None
    _frames_out_op(x, weight, bias, past, padding, patch_size, out)
    return out


def _backend(requested: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    x, weight = arguments["x"], arguments["weight"]
    tensors = [t for name, t in arguments.items() if isinstance(t, Tensor) and name != "out"]
    obstacle = kernel_obstacle(tensors) or derivative_obstacle((arguments["out"],))
    obstacle = obstacle or stride_obstacle(x, arguments["past"])
    if obstacle is None and weight.shape[2] > MAX_TAPS:
        obstacle = f"kernels exist for up to {MAX_TAPS} taps in time, got {weight.shape[2]}"
    if obstacle is None and weight.shape[0] > MAX_FEATURES:
        obstacle = f"kernels exist for up to {MAX_FEATURES} features, got {weight.shape[0]}"
    if obstacle is None and requested == "auto" and (reason := cudnn_preference(x, weight.shape[0], "frames")):
        return "torch", reason
    return pick_backend(requested, obstacle)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    past: Tensor | None,
    padding: Sequence[int] | None,
    patch_size: int,
) -> None:
    """Checks what can be known of a call without addresses."""
    check_frames("x", x)
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size: expected a positive integer, got {patch_size!r}")
    features = 3 * patch_size**2
    check_kernel("weight", weight, x, features)
    check_vector("bias", bias, features, x)
    check_past(past, x, weight.shape[2])
    padding = same_padding(weight) if padding is None else padding
    check_padding(padding)
    frames, rows, columns = output_size(x, weight, (1, 1, 1), padding)
    shape = (x.shape[0], frames, patch_size * rows, patch_size * columns, 3)
    check_frames("out", out, shape, (torch.uint8, *FLOATS), x.device)


def _check_output(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, out: Tensor) -> None:
    check_targets({"out": out}, {"x": x, "weight": weight, "bias": bias, "past": past}, ())


def cost(pixels: int, channels: int, taps: int, patch_size: int = 1, itemsize: int = 2, out_itemsize: int = 1) -> Cost:
    """Returns the least cost of one call.

    Args:
        pixels: feature pixels of all frames.
        channels: C.
        taps: kt * kh * kw.
        patch_size: p.
        itemsize: bytes of an element of ``x``.
        out_itemsize: bytes of an element of ``out``.
    """
    features = 3 * patch_size**2
    read = (pixels * channels + features * channels * taps) * itemsize
    return Cost(2 * pixels * channels * features * taps, read, pixels * features * out_itemsize)
