"""The adaptive norms and gated residuals as DiTs call them: what is compiled, checked, timed and tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from swifti2v_kernels.adaln import cost, gated_residual, gated_residual_norm_modulate, norm_modulate
from swifti2v_kernels.common.case import Arguments, Case, RealSize
from swifti2v_kernels.common.cost import Work
from swifti2v_kernels.common.quantized import FLOAT8_CAPABILITY


def _inputs(  # type: ignore[no-untyped-def]
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


def _work(rows: float) -> Callable[[Mapping[str, Any]], Work]:
    """One token of 16 bits; ``rows`` of x, update, x' and y are read or written, a quantised one for half."""
    return lambda constants: Work(0, int(rows * 2 * constants["C"]))


#: By width: the window or clip that it is timed at, its blocks, and its tokens.
_REAL = {
    1536: ("CSG window 2560x1408, 1.3B", 5, 70_400),
    3072: ("CSG window 2560x1408, 5B", 5, 17_600),
    5120: ("Stage I 640x352, 14B", 21, 18_480),
}


def _real(channels: int, dtype: torch.dtype, form: str, quantize: torch.dtype | None = None) -> RealSize | None:
    if channels not in _REAL:
        return None
    shape, blocks, length = _REAL[channels]
    parts = {"update": form != "norm_modulate", "norm": form != "gated_residual", "quantize": quantize is not None}
    inputs = _inputs(channels, dtype, form, blocks, length, torch.empty, quantize)
    return RealSize(shape, inputs, cost(1, length, channels, **parts))


def _quantized(operator: Callable[..., Any], channels: int, quantize: torch.dtype) -> Case:
    form, rows, half = operator.__name__, 1.5 if operator is norm_modulate else 3.5, torch.bfloat16
    return Case(
        f"{form} C {channels} to {str(quantize).removeprefix('torch.')}",
        operator,
        _inputs(channels, half, form, quantize=quantize),
        _work(rows),
        _real(channels, half, form, quantize),
        80 if quantize == torch.int8 else FLOAT8_CAPABILITY,
    )


CASES = [
    _quantized(norm_modulate, 1536, torch.float8_e4m3fn),
    _quantized(gated_residual_norm_modulate, 3072, torch.int8),
    _quantized(gated_residual_norm_modulate, 5120, torch.float8_e4m3fn),
]
CASES += [
    Case(
        f"{operator.__name__} {label} {c} {str(t).removeprefix('torch.')}",
        operator,
        _inputs(c, t, form),
        _work(rows),
        _real(c, t, form),
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
