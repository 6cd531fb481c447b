"""Calls of norms, residuals and rotations as DiTs and VAEs make them: compiled, checked, timed and tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..common.case import Arguments, Case, RealSize
from ..common.cost import Work
from ..common.shapes import SIZES, WINDOWS, Window
from ..linear.rows import FLOAT8_CAPABILITY
from .adaln import cost as adaln_cost
from .adaln import gated_residual, gated_residual_norm_modulate, norm_modulate
from .qk_norm_rope import cost as rope_cost
from .qk_norm_rope import qk_norm_rope
from .rms_norm_silu import cost as silu_cost
from .rms_norm_silu import rms_norm_silu
from .rope import rope_3d, rope_from_tokens


def _adaln_inputs(  # type: ignore[no-untyped-def]
    channels: int,
    dtype: torch.dtype,
    form: str,
    blocks: int = 4,
    length: int = 64,
    new=torch.ones,
    quantize: torch.dtype | None = None,
):
    def make(device: torch.device) -> Arguments:
        # The model's own layouts: rows of a larger buffer, and one of six entries of a modulation table.
        x, update = new(2, 1, length, channels, dtype=dtype, device=device)
        table = new(1, 2, 6, channels, device=device)
        rows = {"block_map": torch.zeros(blocks, dtype=torch.int32, device=device), "backend": "triton"}
        rows |= {} if quantize is None else {"quantize": quantize}
        shift, scale, gate = table.unbind(2)[:3]
        if form == "norm_modulate":
            return (x, shift, scale), rows
        if form == "gated_residual":
            return (x, update, gate), {**rows, "inplace": True}
        if form == "gated_residual_norm_modulate":
            return (x, update, gate, shift, scale), {**rows, "inplace": True}
        affine = new(2, channels, device=device)
        return (x, update, gate), {**rows, "weight": affine[0], "bias": affine[1], "inplace": True}

    return make


def _adaln_work(rows: float) -> Callable[[Mapping[str, Any]], Work]:
    """Returns the work on one token of 16 bits, of which ``rows`` of x, update, x' and y are read or written.

    A quantised row counts for half.
    """
    return lambda constants: Work(0, int(rows * 2 * constants["C"]))


#: By width: the window or clip that norms and rotations are timed at.
_REAL = {
    WINDOWS[name].model.width: WINDOWS[name]
    for name in ("CSG window 2560x1408, 1.3B", "CSG window 2560x1408, 5B", "Stage I 640x352, 14B")
}


def _adaln_real(channels: int, dtype: torch.dtype, form: str, quantize: torch.dtype | None = None) -> RealSize | None:
    if channels not in _REAL:
        return None
    window = _REAL[channels]
    parts = {"update": form != "norm_modulate", "norm": form != "gated_residual", "quantize": quantize is not None}
    inputs = _adaln_inputs(channels, dtype, form, window.blocks, window.tokens, torch.empty, quantize)
    return RealSize(window.name, inputs, adaln_cost(1, window.tokens, channels, **parts))


def _quantized(operator: Callable[..., Any], channels: int, quantize: torch.dtype) -> Case:
    form, rows, half = operator.__name__, 1.5 if operator is norm_modulate else 3.5, torch.bfloat16
    return Case(
        f"{form} C {channels} to {str(quantize).removeprefix('torch.')}",
        operator,
        _adaln_inputs(channels, half, form, quantize=quantize),
        _adaln_work(rows),
        _adaln_real(channels, half, form, quantize),
        80 if quantize == torch.int8 else FLOAT8_CAPABILITY,
    )


_ADALN_CASES = [
    _quantized(norm_modulate, 1536, torch.float8_e4m3fn),
    _quantized(gated_residual_norm_modulate, 3072, torch.int8),
    _quantized(gated_residual_norm_modulate, 5120, torch.float8_e4m3fn),
]
_ADALN_CASES += [
    Case(
        f"{operator.__name__} {label} {c} {str(t).removeprefix('torch.')}",
        operator,
        _adaln_inputs(c, t, form),
        _adaln_work(rows),
        _adaln_real(c, t, form),
    )
    for operator, label, form, rows, sizes in (
        (norm_modulate, "C", "norm_modulate", 2, ((1536, torch.bfloat16),)),
        (gated_residual, "C", "gated_residual", 3, ((5120, torch.bfloat16),)),
        (gated_residual_norm_modulate, "affine C", "affine", 4, ((1536, torch.bfloat16),)),
        (
            gated_residual_norm_modulate,
            "C",
            "gated_residual_norm_modulate",
            4,
            ((1536, torch.bfloat16), (3072, torch.bfloat16), (5120, torch.bfloat16), (96, torch.float16)),
        ),
    )
    for c, t in sizes
]


def _rope_inputs(heads: int, head_dim: int, dtype: torch.dtype, **options: Any) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        rotate, per_head = options.get("rotate", True), options.get("per_head", False)
        new, batch, grid = options.get("new", torch.ones), options.get("batch", 2), options.get("grid", (2, 3, 4))
        width = heads * head_dim
        qkv = new(batch, math.prod(grid), 3 * width, dtype=dtype, device=device)
        weight = new(head_dim if per_head else width, dtype=dtype, device=device)
        rope = rope_3d(range(grid[0]), *grid[1:], head_dim, device=device) if rotate else None
        if options.get("per_token", False):
            angle = new(math.prod(grid), head_dim // 2, device=device)
            rope = rope_from_tokens(angle, angle)
        keywords = {"inplace": True, "layout": options.get("layout", "interleaved"), "backend": "triton"}
        return (qkv[..., :width], qkv[..., width : 2 * width], weight, weight, rope, heads), keywords

    return make


def _rope_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work on one token of q or k, 16 bits, read and written."""
    return Work(0, 2 * 2 * constants["HEADS"] * constants["HEAD_DIM"])


def _rope_real(window: Window) -> RealSize:
    heads, grid = window.model.heads, (window.blocks, *window.grid)
    inputs = _rope_inputs(heads, 128, torch.bfloat16, new=torch.empty, batch=1, grid=grid)
    return RealSize(window.name, inputs, rope_cost(1, window.tokens, window.model.width))


_ROPE_TIMED = {f"{window.model.heads}x128": _rope_real(window) for window in _REAL.values()}


_ROPE_CASES = [
    Case(f"qk_norm_rope {name}", qk_norm_rope, inputs, _rope_work, _ROPE_TIMED.get(name))
    for name, inputs in {
        "12x128": _rope_inputs(12, 128, torch.bfloat16),
        "24x128": _rope_inputs(24, 128, torch.bfloat16),
        "40x128": _rope_inputs(40, 128, torch.bfloat16),
        "12x128 no rope": _rope_inputs(12, 128, torch.bfloat16, rotate=False),
        "24x128 per head, half": _rope_inputs(24, 128, torch.bfloat16, per_head=True, layout="half"),
        "4x24 fp16": _rope_inputs(4, 24, torch.float16),
        "24x128 per head and token": _rope_inputs(24, 128, torch.bfloat16, per_head=True, per_token=True),
        # LTX-Video turns its 32 heads of 64 channels by angles of their own: as one head.
        "1x2048 per token": _rope_inputs(1, 2048, torch.bfloat16, per_token=True),
    }.items()
]


def _silu_inputs(channels: int, dtype: torch.dtype, frames: int = 2, rows: int = 16, columns: int = 32, new=torch.ones):  # type: ignore[no-untyped-def]
    def make(device: torch.device) -> Arguments:
        x = new(1, frames, rows + 4, columns + 4, channels, dtype=dtype, device=device)[:, :, 2:-2, 2:-2]
        return (x, new(channels, dtype=dtype, device=device)), {"backend": "triton"}

    return make


def _silu_real(channels: int, frames: int, shrunk: int) -> RealSize:
    """Returns a call as a decoder for 2560x1408 makes it, one latent frame of so much smaller sides."""
    columns, rows = (n // shrunk for n in SIZES["2K"])
    inputs = _silu_inputs(channels, torch.bfloat16, frames, rows, columns, torch.empty)
    return RealSize(f"{frames} x {columns}x{rows}", inputs, silu_cost(frames * rows * columns, channels))


def _silu_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one program: its pixels, 16 bits in and out."""
    return Work(0, 2 * 2 * constants["C"] * constants["BLOCK_M"])


_SILU_CASES = [
    Case(f"rms_norm_silu C{c} {str(t).removeprefix('torch.')}", rms_norm_silu, _silu_inputs(c, t), _silu_work, real)
    for c, t, real in (
        (96, torch.bfloat16, _silu_real(96, 4, 1)),
        (384, torch.bfloat16, _silu_real(384, 2, 4)),
        (1024, torch.bfloat16, _silu_real(1024, 2, 8)),
        (320, torch.float16, None),
    )
]

CASES = [*_ADALN_CASES, *_ROPE_CASES, *_SILU_CASES]
