"""Reasons why no kernel will run in a model, as far as they can be known before it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..attention.segment_attention import segment_attention
from ..common.dispatch import explain, pick_backend
from ..common.target import device_obstacle
from .hooks import hook_kinds

_INSTEAD = "PyTorch computes, no faster than the host and slower on small inputs"


def on_device(device: torch.device) -> str | None:
    """Returns why no kernel runs on ``device``, or None if kernels do."""
    backend, reason = pick_backend("auto", device_obstacle(device))
    return reason if backend == "torch" else None


def in_model(root: nn.Module, attentions: Iterable[tuple[nn.Module, bool]]) -> Iterator[str]:
    """Yields why no kernel runs where the weights of ``root`` are; if some may, why none takes its attention.

    Of a model with offloading hooks nothing is known: they bring its weights elsewhere. ``attentions`` are attention
    modules, and whether their queries are cast to 16 bits whatever the weights are.
    """
    if any(hook_kinds(module) for module in root.modules()):
        return
    devices = sorted({p.device for p in root.parameters() if p.device.type != "meta"}, key=str)
    able = [device for device in devices if on_device(device) is None]
    if devices and not able:
        yield f"weights are on {', '.join(map(str, devices))}: {on_device(devices[0])}; {_INSTEAD}"
    found = {_in_attention(module, able[0], casts) for module, casts in attentions} if able else set()
    yield from sorted(f"attention: {reason}; {_INSTEAD}" for reason in found if reason is not None)


def _in_attention(module: Any, device: torch.device, casts: bool) -> str | None:
    width, heads = getattr(module, "inner_dim", None), getattr(module, "heads", None)
    head_dim = getattr(module, "head_dim", width // heads if width and heads else None)
    if head_dim is None:
        return None
    # Weights of other types, such as 8 bits, or of several say nothing of what is computed with them.
    kinds = {p.dtype for p in module.parameters() if p.ndim > 1}
    wide = not casts and kinds in ({torch.float32}, {torch.float64})
    with torch.no_grad():
        q = torch.empty(1, 1, 1, head_dim, device=device, dtype=kinds.pop() if wide else torch.bfloat16)
        choice = explain(segment_attention, q, [(q, q)])
    if choice.backend != "torch":
        return None
    return choice.reason + (", unless autocast is on" if str(torch.float32) in choice.reason else "")
