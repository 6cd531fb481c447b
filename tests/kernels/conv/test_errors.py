"""Errors of a video autoencoder's operators for arguments that break their contract."""

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
BIG, HEAD, BYTES = torch.zeros(1, 2, 8, 10, 8), W[:3], torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8)
COLOURS = torch.zeros(1, 2, 4, 5, 3)
ALL = "float16 or bfloat16 or float32 or float64"
CONV: dict[str, tuple[Callable[[], Any], str]] = {
    "x: a list": (lambda: causal_conv3d([0.0], W), "x: expected a tensor, got list"),
    "x: four axes": (
        lambda: causal_conv3d(X[0], W), f"x: expected [B, T, h, w, C] {ALL}, got [2, 4, 5, 8] torch.float32 on cpu"
    ),
    "x: empty": (
        lambda: causal_conv3d(X[:, :0], W), f"x: expected [B, T, h, w, C] {ALL}, got [1, 0, 4, 5, 8] torch.float32 on"
    ),
    "x: integers": (
        lambda: causal_conv3d(X.int(), W),
        f"x: expected [B, T, h, w, C] {ALL}, got [1, 2, 4, 5, 8] torch.int32 on cpu",
    ),
    "x: channels first": (
        lambda: causal_conv3d(torch.zeros(1, 8, 2, 4, 5).permute(0, 2, 3, 4, 1), W),
        "x: expected the channels to be contiguous (stride 1), got stride 40",
    ),
    "weight: None": (lambda: causal_conv3d(X, None), "weight: expected a tensor, got NoneType"),
    "weight: four axes": (
        lambda: causal_conv3d(X, W[:, :, 0]),
        "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got [8, 8, 3, 3] torch.float32 on cpu",
    ),
    "weight: channels": (
        lambda: causal_conv3d(X, torch.zeros(8, 4, 1, 1, 1)),
        "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got [8, 4, 1, 1, 1] torch.float32 on cpu",
    ),
    "weight: dtype": (
        lambda: causal_conv3d(X, W.half()),
        "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got [8, 8, 3, 3, 3] torch.float16 on cpu",
    ),
    "weight: device": (
        lambda: causal_conv3d(X, W.to("meta")),
        "weight: expected [C', 8, kt, kh, kw] torch.float32 on cpu, got [8, 8, 3, 3, 3] torch.float32 on meta",
    ),
    "weight: channels first": (
        lambda: causal_conv3d(X, W.contiguous()),
        "weight: expected channels last in memory: weight.to(memory_format=torch.channels_last_3d); got strides"
        " (216, 27, 9, 3, 1)",
    ),
    "bias: length": (
        lambda: causal_conv3d(X, W, GAMMA[:7]),
        "bias: expected contiguous [8] torch.float32 on cpu, got [7] torch.float32 on cpu",
    ),
    "bias: dtype": (
        lambda: causal_conv3d(X, W, GAMMA.half()),
        "bias: expected contiguous [8] torch.float32 on cpu, got [8] torch.float16 on cpu",
    ),
    "bias: a list": (lambda: causal_conv3d(X, W, [0.0]), "bias: expected a tensor or None, got list"),
    "past: too long": (
        lambda: causal_conv3d(X, W, past=torch.zeros(1, 3, 4, 5, 8)),
        "past: expected at most 2 frames (taps in time - 1), got 3",
    ),
    "past: of one tap": (
        lambda: causal_conv3d(X, ONE, past=X), "past: expected at most 0 frames (taps in time - 1), got 2"
    ),
    "past: size": (
        lambda: causal_conv3d(X, W, past=X[:, :, :3]),
        "past: expected [1, P, 4, 5, 8] float32 on cpu, got [1, 2, 3, 5, 8] torch.float32 on cpu",
    ),
    "past: no frame": (
        lambda: causal_conv3d(X, W, past=X[:, :0]),
        "past: expected [1, P, 4, 5, 8] float32 on cpu, got [1, 0, 4, 5, 8] torch.float32 on cpu",
    ),
    "past: dtype": (lambda: causal_conv3d(X, W, past=X.half()), "past: expected [1, P, 4, 5, 8] float32 on cpu, got"),
    "stride: two": (
        lambda: causal_conv3d(X, W, stride=(1, 1)),
        "stride: expected three positive numbers (time, rows, columns), got (1, 1)",
    ),
    "stride: zero": (
        lambda: causal_conv3d(X, W, stride=(1, 0, 1)),
        "stride: expected three positive numbers (time, rows, columns), got (1, 0, 1)",
    ),
    "padding: two": (
        lambda: causal_conv3d(X, W, padding=(1, 1)), "padding: expected (top, bottom, left, right), got (1, 1)"
    ),
    "padding: a fraction": (
        lambda: causal_conv3d(X, W, padding=(1, 1, 0.5, 1)),
        "padding: expected (top, bottom, left, right), got (1, 1, 0.5, 1)",
    ),
    "no frame left": (
        lambda: causal_conv3d(X, W, stride=(3, 1, 1)),
        "x: (2, 4, 5) frames, rows and columns leave nothing at kernel (3, 3, 3), stride (3, 1, 1),"
        " padding (1, 1, 1, 1)",
    ),
    "no row left": (
        lambda: causal_conv3d(X, W, padding=(-1, -1, 0, 0)),
        "x: (2, 4, 5) frames, rows and columns leave nothing at kernel (3, 3, 3), stride (1, 1, 1),"
        " padding (-1, -1, 0, 0)",
    ),
    "residual: shape": (
        lambda: causal_conv3d(X, W, residual=X[:, :, :3]),
        "residual: expected [1, 2, 4, 5, 8] float32 on cpu, got [1, 2, 3, 5, 8] torch.float32 on cpu",
    ),
    "norm_weight: length": (
        lambda: causal_conv3d(X, W, norm_weight=GAMMA[:4]), "norm_weight: expected contiguous [8] torch.float32 on cpu"
    ),
    "norm_weight: missing for normed": (
        lambda: causal_conv3d(X, W, normed=X.clone()),
        "norm_weight: expected a tensor, since the normed sum is asked for",
    ),
    "norm_weight: missing without the sum": (
        lambda: causal_conv3d(X, W, keep_sum=False), "norm_weight: expected a tensor, since the normed sum is asked for"
    ),
    "out: of a sum that is not kept": (
        lambda: causal_conv3d(X, W, norm_weight=GAMMA, keep_sum=False, out=X.clone()),
        "out: expected None without keep_sum, since the sum is not stored",
    ),
    "out: shape": (
        lambda: causal_conv3d(X, W, out=BIG),
        "out: expected [1, 2, 4, 5, 8] float32 on cpu, got [1, 2, 8, 10, 8] torch.float32 on cpu",
    ),
    "out: dtype": (lambda: causal_conv3d(X, W, out=X.half()), "out: expected [1, 2, 4, 5, 8] float32 on cpu, got"),
    "out: is x": (lambda: causal_conv3d(X, W, out=X), "out: expected memory of its own, but it overlaps x"),
    "out: overlaps past": (
        lambda: causal_conv3d(X.clone(), W, past=X, out=X), "out: expected memory of its own, but it overlaps past"
    ),
    "out: overlaps residual": (
        lambda: causal_conv3d(X, W, residual=BIG[:, :, :4, :5], out=BIG[:, :, 1:5, :5]),
        "out: expected residual itself or memory of its own, but it overlaps residual",
    ),
    "out: expanded": (
        lambda: causal_conv3d(X, W, out=torch.zeros(1, 1, 4, 5, 8).expand(1, 2, 4, 5, 8)),
        "out: expected distinct elements to write to, got shape (1, 2, 4, 5, 8), strides (160, 0, 40, 8, 1)",
    ),
    "normed: is out": (
        lambda: causal_conv3d(X, W, norm_weight=GAMMA, out=(y := X.clone()), normed=y),
        "normed: expected memory of its own, but it overlaps out",
    ),
    "normed: is residual": (
        lambda: causal_conv3d(X, W, residual=(y := X.clone()), norm_weight=GAMMA, normed=y),
        "normed: expected memory of its own, but it overlaps residual",
    ),
    "backend": (
        lambda: causal_conv3d(X, W, backend="cudnn"), "backend: expected one of auto, torch, triton, got 'cudnn'"
    ),
}  # fmt: skip
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "upsample, x: four axes": (
        lambda: upsample_conv2d(X[0], PHASES),
        f"x: expected [B, T, h, w, C] {ALL}, got [2, 4, 5, 8] torch.float32 on cpu",
    ),
    "upsample, phases: not folded": (
        lambda: upsample_conv2d(X, W[:, :, 0]),
        "phases: expected contiguous [4, C', 2, 2, 8] torch.float32 on cpu, got [8, 8, 3, 3] torch.float32 on cpu",
    ),
    "upsample, phases: layout": (
        lambda: upsample_conv2d(X, PHASES.mT), "phases: expected contiguous [4, C', 2, 2, 8] torch.float32 on cpu, got"
    ),
    "upsample, bias": (
        lambda: upsample_conv2d(X, PHASES, GAMMA[:4]),
        "bias: expected contiguous [8] torch.float32 on cpu, got [4] torch.float32 on cpu",
    ),
    "upsample, padding: two": (
        lambda: upsample_conv2d(X, PHASES, padding=(1, 1)),
        "padding: expected (top, bottom, left, right), got (1, 1)",
    ),
    "upsample, padding: above 1": (
        lambda: upsample_conv2d(X, PHASES, padding=(1, 2, 1, 1)),
        "padding: expected at most 1 on each side, got (1, 2, 1, 1)",
    ),
    "upsample, nothing left": (
        lambda: upsample_conv2d(X, PHASES, padding=(-7, 1, 1, 1)),
        "padding: (-7, 1, 1, 1) leaves nothing of 8 x 10 pixels",
    ),
    "upsample, residual": (
        lambda: upsample_conv2d(X, PHASES, residual=X),
        "residual: expected [1, 2, 8, 10, 8] float32 on cpu, got [1, 2, 4, 5, 8] torch.float32 on cpu",
    ),
    "upsample, normed without norm_weight": (
        lambda: upsample_conv2d(X, PHASES, normed=BIG),
        "norm_weight: expected a tensor, since the normed sum is asked for",
    ),
    "upsample, out: overlaps x": (
        lambda: upsample_conv2d(BIG[:, :, :4, :5], PHASES, out=BIG),
        "out: expected memory of its own, but it overlaps x",
    ),
    "upsample, normed: is out": (
        lambda: upsample_conv2d(X, PHASES, norm_weight=GAMMA, out=BIG, normed=BIG),
        "normed: expected memory of its own, but it overlaps out",
    ),
    "fold: kernel": (lambda: fold_upsample_weight(W), "weight: expected [C', C, 3, 3], got [8, 8, 3, 3, 3]"),
    "frames, patch_size: 0": (
        lambda: frames_out(X, HEAD, None, BYTES, patch_size=0), "patch_size: expected a positive integer, got 0"
    ),
    "frames, patch_size: a fraction": (
        lambda: frames_out(X, HEAD, None, BYTES, patch_size=2.0), "patch_size: expected a positive integer, got 2.0"
    ),
    "frames, weight: features": (
        lambda: frames_out(X, HEAD, None, BYTES, patch_size=2),
        "weight: expected [12, 8, kt, kh, kw] torch.float32 on cpu, got [3, 8, 3, 3, 3] torch.float32 on cpu",
    ),
    "frames, bias": (
        lambda: frames_out(X, HEAD, GAMMA, BYTES),
        "bias: expected contiguous [3] torch.float32 on cpu, got [8] torch.float32 on cpu",
    ),
    "frames, past": (lambda: frames_out(X, ONE[:3], None, BYTES, past=X), "past: expected at most 0 frames"),
    "frames, out: a list": (lambda: frames_out(X, HEAD, None, []), "out: expected a tensor, got list"),
    "frames, out: shape": (
        lambda: frames_out(X, HEAD, None, BYTES[:, :, 1:]),
        f"out: expected [1, 2, 4, 5, 3] uint8 or {ALL} on cpu, got [1, 2, 3, 5, 3] torch.uint8 on cpu",
    ),
    "frames, out: colours first": (
        lambda: frames_out(X, HEAD, None, torch.zeros(1, 2, 3, 4, 5).permute(0, 1, 3, 4, 2)),
        "out: expected the channels to be contiguous (stride 1), got stride 20",
    ),
    "frames, out: dtype": (
        lambda: frames_out(X, HEAD, None, BYTES.int()), f"out: expected [1, 2, 4, 5, 3] uint8 or {ALL} on cpu, got"
    ),
    "frames, out: overlaps x": (
        lambda: frames_out(X, HEAD, None, X[..., :3]), "out: expected memory of its own, but it overlaps x"
    ),
    "norm, x: four axes": (
        lambda: rms_norm_silu(X[0], GAMMA),
        f"x: expected [B, T, h, w, C] {ALL}, got [2, 4, 5, 8] torch.float32 on cpu",
    ),
    "norm, weight: None": (lambda: rms_norm_silu(X, None), "weight: expected a tensor, got None"),
    "norm, weight: dtype": (
        lambda: rms_norm_silu(X, GAMMA.bfloat16()),
        "weight: expected contiguous [8] torch.float32 on cpu, got [8] torch.bfloat16 on cpu",
    ),
    "norm, weight: strided": (
        lambda: rms_norm_silu(X, torch.zeros(16)[::2]), "weight: expected contiguous [8] torch.float32 on cpu, got [8]"
    ),
    "norm, out: shape": (
        lambda: rms_norm_silu(X, GAMMA, out=BIG),
        "out: expected [1, 2, 4, 5, 8] float32 on cpu, got [1, 2, 8, 10, 8] torch.float32 on cpu",
    ),
    "norm, out: shifted": (
        lambda: rms_norm_silu(BIG[:, :, :4], GAMMA, out=BIG[:, :, 1:5]),
        "out: expected x itself or memory of its own, but it overlaps x",
    ),
}  # fmt: skip
BAD = CONV | OTHERS


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        call()


def test_explain_checks_as_the_call_does() -> None:
    with pytest.raises(ValueError, match="past: expected at most 2 frames"):
        explain(causal_conv3d, X, W, past=torch.zeros(1, 3, 4, 5, 8))
    with pytest.raises(ValueError, match="padding: expected at most 1 on each side"):
        explain(upsample_conv2d, X, PHASES, padding=(2, 1, 1, 1))
    with pytest.raises(TypeError, match="weight: expected a tensor, got None"):
        explain(rms_norm_silu, X, None)
