"""Arguments of the adaptive norms and gated residuals: the checks of a whole call, and which backend takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_index, check_targets, same_view
from ..common.dispatch import kernel_obstacle, pick_backend
from ..linear.rows import QuantizedRows, check_dtype, check_out, float8_obstacle

NORMS = ("layer", "rms")
#: A row is held in registers.
MAX_CHANNELS = 8192


def check_outputs(
    x_out: Tensor | None,
    y_out: Tensor | QuantizedRows | None,
    x: Tensor,
    update: Tensor | None,
    parameters: Mapping[str, Any],
) -> None:
    """Checks that outputs overlap nothing that is still to be read.

    A program reads all of its row of x and update before it writes, but others read the parameters meanwhile.
    """
    parameters = {name: p for name, p in parameters.items() if isinstance(p, Tensor)}
    if isinstance(y_out, QuantizedRows):
        # Of another dtype than x and update, so they are never the whole of one.
        check_targets(y_out.parts("out"), {"x": x, "update": update, **parameters}, ())
        y_out = None
    targets = {"x": x_out, "out": y_out}
    if x_out is None and y_out is not None and same_view(y_out, x):
        targets = {"x": y_out}
    check_targets(targets, {"x": x, "update": update, **parameters}, ("x", "update"))


def prepare(
    *,
    x: Tensor,
    backend: str,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    block_map: Tensor | None = None,
    norm: str = "layer",
    eps: float = 0.0,
    out: Tensor | QuantizedRows | None = None,
    quantize: torch.dtype | None = None,
) -> tuple[str, str]:
    """Checks a call and returns which backend takes it, and why."""
    _check_tokens("x", x, None)
    if update is not None:
        _check_tokens("update", update, x)
    if quantize is not None:
        check_dtype("quantize", quantize)
        if x.shape[2] == 0:
            raise ValueError(f"x: expected at least one channel to quantize, got {list(x.shape)}")
    if out is not None and quantize is not None:
        check_out("out", out, x, quantize)
    elif out is not None:
        _check_tokens("out", out, x)
    if norm not in NORMS:
        raise ValueError(f"norm: expected {' or '.join(NORMS)}, got {norm!r}")
    if (shift is None) != (scale is None):
        raise ValueError("shift, scale: expected both or neither")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and not isinstance(parameter, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(parameter).__name__}")
        if parameter is not None and (parameter.shape != x.shape[2:] or not parameter.is_contiguous()):
            raise ValueError(f"{name}: expected [{x.shape[2]}], contiguous, got {list(parameter.shape)}")
    modulations = {name: m for name, m in (("gate", gate), ("shift", shift), ("scale", scale)) if m is not None}
    _check_modulations(modulations, block_map, x)
    tensors = [t for t in (x, update, gate, shift, scale, weight, bias, out) if isinstance(t, Tensor)]
    return pick_backend(backend, _obstacle(tensors, quantize))


def _check_tokens(name: str, x: Tensor, like: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if like is None and x.ndim != 3:
        raise ValueError(f"{name}: expected [B, L, C], got shape {tuple(x.shape)}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name}: expected {tuple(like.shape)} as x, got {tuple(x.shape)}")
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise ValueError(f"{name}: expected {like.dtype} on {like.device} as x, got {x.dtype} on {x.device}")
    if x.shape[2] > 1 and x.stride(2) != 1:
        raise ValueError(f"{name}: expected the channels to be contiguous (stride 1), got stride {x.stride(2)}")


def _check_modulations(modulations: Mapping[str, Tensor], block_map: Tensor | None, x: Tensor) -> None:
    batch, length, width = x.shape
    wanted: tuple[int | str, ...] = (batch, "R", width)
    for name, m in modulations.items():
        if not isinstance(m, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(m).__name__}")
        fits = m.ndim == 3 and m.shape[1] > 0 and all(w in (n, "R") for w, n in zip(wanted, m.shape, strict=True))
        if not fits or m.device != x.device:
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"{name}: expected [{shape}] on {x.device}, got {list(m.shape)} on {m.device}")
        wanted = tuple(m.shape)
        if width > 1 and m.stride(2) != 1:
            raise ValueError(f"{name}: expected the channels to be contiguous (stride 1), got stride {m.stride(2)}")
    name, rows = next(((name, m.shape[1]) for name, m in modulations.items()), ("", 1))
    if block_map is not None:
        if not modulations:
            raise ValueError("block_map: expected None, since there is no gate, shift or scale to choose from")
        check_index("block_map", block_map, None, 0, rows - 1, x.device)
        name, rows = "block_map", block_map.shape[0]
    if length % rows:
        raise ValueError(f"{name}: {rows} blocks do not divide {length} tokens")


def _obstacle(tensors: list[Tensor], quantize: torch.dtype | None) -> str | None:
    if (reason := kernel_obstacle(tensors)) is not None:
        return reason
    if tensors[0].shape[2] > MAX_CHANNELS:
        return f"kernels exist for up to {MAX_CHANNELS} channels, got {tensors[0].shape[2]}"
    return None if quantize is None else float8_obstacle("round to", quantize, tensors[0].device)
