"""Calls of norms, residuals and rotations as DiTs and VAEs make them: compiled, checked, timed and tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.case import Arguments, Case, Cost, RealSize, Work
from ..common.shapes import SIZES, WINDOWS, Window
from ..linear.quantize_rows import FLOAT8_CAPABILITY
from .adaln import gated_residual, gated_residual_norm_modulate, norm_modulate
from .qk_norm_rope import qk_norm_rope
from .rms_norm_silu import rms_norm_silu
from .rope import rope_3d, rope_from_tokens

#: By width: the window or clip that norms and rotations are timed at.
_REAL = {
    WINDOWS[name].model.width: WINDOWS[name]
    for name in ("CSG window 2560x1408, 1.3B", "CSG window 2560x1408, 5B", "Stage I 640x352, 14B")
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _adaln(
    operator: Callable[..., Any],
    channels: int,
    dtype: torch.dtype = torch.bfloat16,
    affine: bool = False,
    quantize: torch.dtype | None = None,
) -> Case:
    """Returns a call of one of the three operators, timed if a model has so many channels."""
    adds, norms = operator is not norm_modulate, operator is not gated_residual

    def inputs(blocks: int, length: int, new: Callable[..., Tensor]) -> Callable[[torch.device], Arguments]:
        def make(device: torch.device) -> Arguments:
            # The model's own layouts: rows of a larger buffer, and one of six entries of a modulation table.
            x, update = new(2, 1, length, channels, dtype=dtype, device=device)
            shift, scale, gate = new(1, 2, 6, channels, device=device).unbind(2)[:3]
            block_map = torch.zeros(blocks, dtype=torch.int32, device=device)
            options: dict[str, Any] = {"block_map": block_map, "backend": "triton"}
            options |= {"inplace": True} if adds else {}
            options |= {"quantize": quantize} if quantize else {}
            if affine:
                options["weight"], options["bias"] = new(2, channels, device=device)
            modulation = (shift, scale) if norms and not affine else ()
            return (x, *((update, gate) if adds else ()), *modulation), options

        return make

    # Of x, update, x' and y those that are read or written; a quantised row counts for half.
    rows = 1 + 2 * adds + norms - (0.5 if quantize else 0)
    real, window = None, _REAL.get(channels)
    if window is not None:
        # The modulation and the scales are negligible, as weights and tables are below.
        elements, read = window.tokens * channels, 2 * (1 + adds)
        flops = (2 * adds + 8 * norms + 5 * (quantize is not None)) * elements
        least = Cost(flops, read * elements, int(2 * rows - read) * elements)
        real = RealSize(window.name, inputs(window.blocks, window.tokens, torch.empty), least)
    return Case(
        f"{operator.__name__} {'affine ' * affine}C {channels} {'to ' + _name(quantize) if quantize else _name(dtype)}",
        operator,
        inputs(4, 64, torch.ones),
        lambda constants: Work(0, int(rows * 2 * constants["C"])),  # a token of 16 bits
        real,
        FLOAT8_CAPABILITY if quantize == torch.float8_e4m3fn else 80,
    )


_ADALN_CASES = [
    _adaln(norm_modulate, 1536, quantize=torch.float8_e4m3fn),
    _adaln(gated_residual_norm_modulate, 3072, quantize=torch.int8),
    _adaln(gated_residual_norm_modulate, 5120, quantize=torch.float8_e4m3fn),
    _adaln(norm_modulate, 1536),
    _adaln(gated_residual, 5120),
    _adaln(gated_residual_norm_modulate, 1536, affine=True),
    *(_adaln(gated_residual_norm_modulate, channels) for channels in (1536, 3072, 5120)),
    _adaln(gated_residual_norm_modulate, 96, torch.float16),
]


def _rope_inputs(
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rotate: bool = True,
    per_head: bool = False,
    per_token: bool = False,
    layout: str = "interleaved",
    batch: int = 2,
    grid: tuple[int, int, int] = (2, 3, 4),
    new: Callable[..., Tensor] = torch.ones,
) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        width = heads * head_dim
        qkv = new(batch, math.prod(grid), 3 * width, dtype=dtype, device=device)
        weight = new(head_dim if per_head else width, dtype=dtype, device=device)
        rope = rope_3d(range(grid[0]), *grid[1:], head_dim, device=device) if rotate else None
        if per_token:
            angle = new(math.prod(grid), head_dim // 2, device=device)
            rope = rope_from_tokens(angle, angle)
        options = {"inplace": True, "layout": layout, "backend": "triton"}
        return (qkv[..., :width], qkv[..., width : 2 * width], weight, weight, rope, heads), options

    return make


def _rope_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work on one token of q or k, 16 bits, read and written."""
    return Work(0, 2 * 2 * constants["HEADS"] * constants["HEAD_DIM"])


def _rope_real(window: Window) -> RealSize:
    inputs = _rope_inputs(window.model.heads, 128, batch=1, grid=(window.blocks, *window.grid), new=torch.empty)
    elements = 2 * window.tokens * window.model.width
    return RealSize(window.name, inputs, Cost(10 * elements, 2 * elements, 2 * elements))


_ROPE_TIMED = {f"{window.model.heads}x128": _rope_real(window) for window in _REAL.values()}
_ROPE_CASES = [
    Case(f"qk_norm_rope {name}", qk_norm_rope, inputs, _rope_work, _ROPE_TIMED.get(name))
    for name, inputs in {
        "12x128": _rope_inputs(12, 128),
        "24x128": _rope_inputs(24, 128),
        "40x128": _rope_inputs(40, 128),
        "12x128 no rope": _rope_inputs(12, 128, rotate=False),
        "24x128 per head, half": _rope_inputs(24, 128, per_head=True, layout="half"),
        "4x24 fp16": _rope_inputs(4, 24, torch.float16),
        "24x128 per head and token": _rope_inputs(24, 128, per_head=True, per_token=True),
        # LTX-Video turns its 32 heads of 64 channels by angles of their own: as one head.
        "1x2048 per token": _rope_inputs(1, 2048, per_token=True),
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
    elements = frames * rows * columns * channels
    return RealSize(f"{frames} x {columns}x{rows}", inputs, Cost(8 * elements, 2 * elements, 2 * elements))


def _silu_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one program: its pixels, 16 bits in and out."""
    return Work(0, 2 * 2 * constants["C"] * constants["BLOCK_M"])


_SILU_CASES = [
    Case(f"rms_norm_silu C{c} {_name(t)}", rms_norm_silu, _silu_inputs(c, t), _silu_work, real)
    for c, t, real in (
        (96, torch.bfloat16, _silu_real(96, 4, 1)),
        (384, torch.bfloat16, _silu_real(384, 2, 4)),
        (1024, torch.bfloat16, _silu_real(1024, 2, 8)),
        (320, torch.float16, None),
    )
]

CASES = [*_ADALN_CASES, *_ROPE_CASES, *_SILU_CASES]
