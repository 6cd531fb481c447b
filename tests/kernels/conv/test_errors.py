"""Errors of a video autoencoder's operators for arguments that break their contract.

What is no tensor, or on another device, is in ``tests/kernels/test_messages.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swifti2v_kernels import causal_conv3d, explain, fold_upsample_weight, frames_out, rms_norm_silu, upsample_conv2d

X, W = torch.zeros(1, 2, 4, 5, 8), torch.zeros(8, 3, 3, 3, 8).permute(0, 4, 1, 2, 3)
PHASES, GAMMA = torch.zeros(4, 8, 2, 2, 8), torch.zeros(8)
ONE = torch.zeros(8, 1, 3, 3, 8).permute(0, 4, 1, 2, 3)
BIG, BYTES = torch.zeros(1, 2, 8, 10, 8), torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8)
#: Memory that arguments share.
Y = torch.zeros(1, 2, 4, 5, 8)
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    causal_conv3d: {"x": X, "weight": W},
    upsample_conv2d: {"x": X, "phases": PHASES},
    frames_out: {"x": X, "weight": W[:3], "bias": None, "out": BYTES},
    rms_norm_silu: {"x": X, "weight": GAMMA},
    fold_upsample_weight: {},
}
FRAMES = "x: expected [B, T, h, w, C] float32, float16 or bfloat16, got"
KERNEL, VECTOR = "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got", "contiguous [8] torch.float32 on cpu"
RESULT, HISTORY = (
    "expected [1, 2, 4, 5, 8] torch.float32 on cpu, got",
    "past: expected [1, P, 4, 5, 8] torch.float32 on cpu",
)
NORMED = "norm_weight: expected a tensor, since the normed sum is asked for"
BAD: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (causal_conv3d, {"x": X[0]}, f"{FRAMES} [2, 4, 5, 8] torch.float32"),
    (causal_conv3d, {"x": X[:, :0]}, f"{FRAMES} [1, 0, 4, 5, 8] torch.float32"),
    (causal_conv3d, {"x": X.int()}, f"{FRAMES} [1, 2, 4, 5, 8] torch.int32"),
    (
        causal_conv3d,
        {"x": torch.zeros(1, 8, 2, 4, 5).permute(0, 2, 3, 4, 1)},
        "x: expected the channels to be contiguous (stride 1), got stride 40",
    ),
    (causal_conv3d, {"weight": W[:, :, 0]}, f"{KERNEL} [8, 8, 3, 3] torch.float32 on cpu"),
    (causal_conv3d, {"weight": W.half()}, f"{KERNEL} [8, 8, 3, 3, 3] torch.float16 on cpu"),
    (
        causal_conv3d,
        {"weight": W.contiguous()},
        "weight: expected channels last in memory: weight.to(memory_format=torch.channels_last_3d); got strides"
        " (216, 27, 9, 3, 1)",
    ),
    (causal_conv3d, {"bias": GAMMA[:7]}, f"bias: expected {VECTOR}, got [7] torch.float32 on cpu"),
    (
        causal_conv3d,
        {"past": torch.zeros(1, 3, 4, 5, 8)},
        "past: expected at most 2 frames (taps in time - 1), got 3",
    ),
    (causal_conv3d, {"weight": ONE, "past": X}, "past: expected at most 0 frames (taps in time - 1), got 2"),
    (causal_conv3d, {"past": X[:, :0]}, f"{HISTORY}, got [1, 0, 4, 5, 8] torch.float32 on cpu"),
    (causal_conv3d, {"stride": (1, 1)}, "stride: expected three positive numbers (time, rows, columns), got (1, 1)"),
    (
        causal_conv3d,
        {"stride": (1, 0, 1)},
        "stride: expected three positive numbers (time, rows, columns), got (1, 0, 1)",
    ),
    (causal_conv3d, {"stride": 2}, "stride: expected three positive numbers (time, rows, columns), got 2"),
    (causal_conv3d, {"padding": (1, 1)}, "padding: expected (top, bottom, left, right), got (1, 1)"),
    (causal_conv3d, {"padding": (1, 1, 0.5, 1)}, "padding: expected (top, bottom, left, right), got (1, 1, 0.5, 1)"),
    (
        causal_conv3d,
        {"stride": (3, 1, 1)},
        "x: (2, 4, 5) frames, rows and columns leave nothing at kernel (3, 3, 3), stride (3, 1, 1),"
        " padding (1, 1, 1, 1)",
    ),
    (
        causal_conv3d,
        {"padding": (-1, -1, 0, 0)},
        "x: (2, 4, 5) frames, rows and columns leave nothing at kernel (3, 3, 3), stride (1, 1, 1),"
        " padding (-1, -1, 0, 0)",
    ),
    (causal_conv3d, {"residual": X[:, :, :3]}, f"residual: {RESULT} [1, 2, 3, 5, 8] torch.float32 on cpu"),
    (causal_conv3d, {"norm_weight": GAMMA[:4]}, f"norm_weight: expected {VECTOR}"),
    (causal_conv3d, {"normed": Y}, NORMED),
    (causal_conv3d, {"keep_sum": False}, NORMED),
    (
        causal_conv3d,
        {"norm_weight": GAMMA, "keep_sum": False, "out": Y},
        "out: expected None without keep_sum, since the sum is not stored",
    ),
    (causal_conv3d, {"out": BIG}, f"out: {RESULT} [1, 2, 8, 10, 8] torch.float32 on cpu"),
    (causal_conv3d, {"out": X}, "out: expected memory of its own, but it overlaps x"),
    (causal_conv3d, {"past": Y, "out": Y}, "out: expected memory of its own, but it overlaps past"),
    (
        causal_conv3d,
        {"residual": BIG[:, :, :4, :5], "out": BIG[:, :, 1:5, :5]},
        "out: expected residual itself or memory of its own, but it overlaps residual",
    ),
    (
        causal_conv3d,
        {"out": torch.zeros(1, 1, 4, 5, 8).expand(1, 2, 4, 5, 8)},
        "out: expected distinct elements to write to, got shape (1, 2, 4, 5, 8), strides (160, 0, 40, 8, 1)",
    ),
    (
        causal_conv3d,
        {"norm_weight": GAMMA, "out": Y, "normed": Y},
        "normed: expected memory of its own, but it overlaps out",
    ),
    (
        causal_conv3d,
        {"residual": Y, "norm_weight": GAMMA, "normed": Y},
        "normed: expected memory of its own, but it overlaps residual",
    ),
    (causal_conv3d, {"backend": "cudnn"}, "backend: expected one of auto, torch, triton, got 'cudnn'"),
    (
        upsample_conv2d,
        {"phases": W[:, :, 0]},
        "phases: expected contiguous [4, C', 2, 2, 8] torch.float32 on cpu, got [8, 8, 3, 3] torch.float32 on cpu",
    ),
    (upsample_conv2d, {"padding": (1, 2, 1, 1)}, "padding: expected at most 1 on each side, got (1, 2, 1, 1)"),
    (upsample_conv2d, {"padding": (-7, 1, 1, 1)}, "padding: (-7, 1, 1, 1) leaves nothing of 8 x 10 pixels"),
    (upsample_conv2d, {"residual": X}, "residual: expected [1, 2, 8, 10, 8] torch.float32 on cpu, got [1, 2, 4, 5, 8]"),
    (upsample_conv2d, {"normed": BIG}, NORMED),
    (
        upsample_conv2d,
        {"x": BIG[:, :, :4, :5], "out": BIG},
        "out: expected memory of its own, but it overlaps x",
    ),
    (
        upsample_conv2d,
        {"norm_weight": GAMMA, "out": BIG, "normed": BIG},
        "normed: expected memory of its own, but it overlaps out",
    ),
    (fold_upsample_weight, {"weight": W}, "weight: expected [C', C, 3, 3], got [8, 8, 3, 3, 3]"),
    (frames_out, {"patch_size": 0}, "patch_size: expected a positive integer, got 0"),
    (frames_out, {"patch_size": 2}, "weight: expected [12, 8, kt, kh, kw] torch.float32 on cpu, got [3, 8, 3, 3, 3]"),
    (frames_out, {"bias": GAMMA}, "bias: expected contiguous [3] torch.float32 on cpu, got [8] torch.float32 on cpu"),
    (frames_out, {"out": BYTES[:, :, 1:]}, "out: expected [1, 2, 4, 5, 3] torch.uint8 or torch.float16 or"),
    (
        frames_out,
        {"out": torch.zeros(1, 2, 3, 4, 5).permute(0, 1, 3, 4, 2)},
        "out: expected the channels to be contiguous (stride 1), got stride 20",
    ),
    (frames_out, {"out": X[..., :3]}, "out: expected memory of its own, but it overlaps x"),
    (rms_norm_silu, {"weight": GAMMA.bfloat16()}, f"weight: expected {VECTOR}, got [8] torch.bfloat16 on cpu"),
    (rms_norm_silu, {"out": BIG}, f"out: {RESULT} [1, 2, 8, 10, 8] torch.float32 on cpu"),
    (
        rms_norm_silu,
        {"x": BIG[:, :, :4], "out": BIG[:, :, 1:5]},
        "out: expected x itself or memory of its own, but it overlaps x",
    ),
]


@pytest.mark.parametrize(("operator", "changes", "message"), BAD)
def test_bad_input_is_named_by_the_call_and_by_explain(
    operator: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    """Bad input is named; ``explain`` names it too, but for memory that overlaps, since it writes nothing."""
    asked = [operator]
    if operator is not fold_upsample_weight and not re.search("overlaps|distinct", message):
        asked.append(lambda **arguments: explain(operator, **arguments))
    for call in asked:
        with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
            call(**CALLS[operator] | changes)
