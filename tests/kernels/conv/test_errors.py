"""Errors of a video autoencoder's operators for arguments that break their contract.

What is no tensor, or on another device, is in ``tests/kernels/test_every_operator.py``.
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
BIG, BYTES = torch.zeros(1, 2, 8, 10, 8), torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8)
#: Memory that arguments share.
Y = torch.zeros(1, 2, 4, 5, 8)
KERNEL = "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got"
RESULT = "expected [1, 2, 4, 5, 8] torch.float32 on cpu, got"
STRIDES, SIDES = "stride: expected three positive numbers (time, rows, columns)", "(top, bottom, left, right)"
NOTHING = "x: (2, 4, 5) frames, rows and columns leave nothing at kernel (3, 3, 3), stride"
NORMED = "norm_weight: expected a tensor, since the normed sum is asked for"
CHANNELS_LAST = "weight: expected channels last in memory: weight.to(memory_format=torch.channels_last_3d); got strides"
#: Calls that are allowed, and the changes to them that are not.
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    causal_conv3d: {"x": X, "weight": W},
    upsample_conv2d: {"x": X, "phases": PHASES},
    frames_out: {"x": X, "weight": W[:3], "bias": None, "out": BYTES},
    rms_norm_silu: {"x": X, "weight": GAMMA},
    fold_upsample_weight: {},
}
BAD: dict[Callable[..., Any], list[tuple[dict[str, Any], str]]] = {
    causal_conv3d: [
        ({"weight": W[:, :, 0]}, f"{KERNEL} [8, 8, 3, 3] torch.float32 on cpu"),
        ({"weight": W.contiguous()}, f"{CHANNELS_LAST} (216, 27, 9, 3, 1)"),
        ({"past": torch.zeros(1, 3, 4, 5, 8)}, "past: expected at most 2 frames (taps in time - 1), got 3"),
        ({"past": X[:, :0]}, "past: expected [1, P, 4, 5, 8] torch.float32 on cpu, got [1, 0, 4, 5, 8]"),
        ({"stride": (1, 0, 1)}, f"{STRIDES}, got (1, 0, 1)"),
        ({"stride": 2}, f"{STRIDES}, got 2"),
        ({"padding": (1, 1, 0.5, 1)}, f"padding: expected {SIDES}, got (1, 1, 0.5, 1)"),
        ({"stride": (3, 1, 1)}, f"{NOTHING} (3, 1, 1), padding (1, 1, 1, 1)"),
        ({"padding": (-1, -1, 0, 0)}, f"{NOTHING} (1, 1, 1), padding (-1, -1, 0, 0)"),
        ({"residual": X[:, :, :3]}, f"residual: {RESULT} [1, 2, 3, 5, 8] torch.float32 on cpu"),
        ({"normed": Y}, NORMED),
        ({"keep_sum": False}, NORMED),
        ({"norm_weight": GAMMA, "keep_sum": False, "out": Y}, "out: expected None without keep_sum"),
        ({"out": X}, "out: expected memory of its own, but it overlaps x"),
        ({"past": Y, "out": Y}, "out: expected memory of its own, but it overlaps past"),
        ({"residual": BIG[:, :, :4, :5], "out": BIG[:, :, 1:5, :5]}, "out: expected residual itself or memory of its"),
        ({"out": Y[:, :1].expand(1, 2, 4, 5, 8)}, "out: expected distinct elements to write to, got shape"),
        ({"norm_weight": GAMMA, "out": Y, "normed": Y}, "normed: expected memory of its own, but it overlaps out"),
        ({"residual": Y, "norm_weight": GAMMA, "normed": Y}, "normed: expected memory of its own, but it overlaps res"),
        ({"backend": "cudnn"}, "backend: expected one of auto, torch, triton, got 'cudnn'"),
    ],
    upsample_conv2d: [
        ({"phases": W[:, :, 0]}, "phases: expected contiguous [4, C', 2, 2, 8] torch.float32 on cpu, got [8, 8, 3, 3]"),
        ({"padding": (1, 2, 1, 1)}, "padding: expected at most 1 on each side, got (1, 2, 1, 1)"),
        ({"padding": (-7, 1, 1, 1)}, "padding: (-7, 1, 1, 1) leaves nothing of 8 x 10 pixels"),
        ({"residual": X}, "residual: expected [1, 2, 8, 10, 8] torch.float32 on cpu, got [1, 2, 4, 5, 8]"),
    ],
    fold_upsample_weight: [({"weight": W}, "weight: expected [C', C, 3, 3], got [8, 8, 3, 3, 3]")],
    frames_out: [
        ({"patch_size": 0}, "patch_size: expected a positive integer, got 0"),
        ({"patch_size": 2}, "weight: expected [12, 8, kt, kh, kw] torch.float32 on cpu, got [3, 8, 3, 3, 3]"),
        ({"out": BYTES[:, :, 1:]}, "out: expected [1, 2, 4, 5, 3] torch.uint8 or torch.float16 or"),
        ({"out": X[..., :3]}, "out: expected memory of its own, but it overlaps x"),
    ],
    rms_norm_silu: [
        ({"out": BIG}, f"out: {RESULT} [1, 2, 8, 10, 8] torch.float32 on cpu"),
        ({"x": BIG[:, :, :4], "out": BIG[:, :, 1:5]}, "out: expected x itself or memory of its own, but it overlaps x"),
    ],
}


@pytest.mark.parametrize(
    ("operator", "changes", "message"), [(operator, *bad) for operator, some in BAD.items() for bad in some]
)
def test_bad_input_is_named_by_the_call_and_by_explain(
    operator: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    """Bad input is named; ``explain`` names it too, but for memory that overlaps, since it writes nothing."""
    asked = [operator]
    if operator is not fold_upsample_weight and not re.search("overlaps|distinct|itself", message):
        asked.append(lambda **arguments: explain(operator, **arguments))
    for call in asked:
        with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
            call(**CALLS[operator] | changes)
