"""Reasons why no kernel will run in a model, as far as they can be known before it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..attention.segment_attention import segment_attention
from ..common.dispatch import explain, pick_backend
from ..common.target import device_obstacle
from .hooks import hooks_of

_INSTEAD = "PyTorch computes, no faster than the host and slower on small inputs"


def on_device(device: torch.device) -> str | None:
    """Returns why no kernel runs on ``device``, or None if kernels do, or if this process cannot see the device."""
    if _is_hidden(device):
        return None
    backend, reason = pick_backend("auto", device_obstacle(device))
    return reason if backend == "torch" else None


def in_model(root: nn.Module, attentions: Iterable[tuple[nn.Module, bool]]) -> Iterator[str]:
    """Yields why no kernel runs where ``root`` computes, with the place; if some may, why none takes its attention.

    It computes where offloading hooks bring it, and may compute where its weights are now.

    Args:
        root: a model of a host.
        attentions: attention modules, and whether their queries are cast to 16 bits whatever the weights are.
    """
    brought = set(_brought_to(root))
    devices = sorted(brought | {p.device for p in root.parameters() if p.device.type != "meta"}, key=str)
    reasons = [on_device(device) for device in devices]
    if devices and all(reasons):
        place = "hooks bring the weights to" if brought else "weights are on"
        yield f"{place} {', '.join(map(str, devices))}: {reasons[0]}; {_INSTEAD}"
        return
    able = [device for device, reason in zip(devices, reasons, strict=True) if not reason and not _is_hidden(device)]
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
    dtype = kinds.pop() if wide else torch.bfloat16
    with torch.no_grad():
        q = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype)
        choice = explain(segment_attention, q, [(q, q)])
    if choice.backend != "torch":
        return None
    return choice.reason + (", unless autocast is on" if str(torch.float32) in choice.reason else "")


def _brought_to(root: nn.Module) -> Iterator[torch.device]:
    for module in root.modules():
        for hook in hooks_of(module):
            device = getattr(hook, "execution_device", getattr(getattr(hook, "group", None), "onload_device", None))
            if device is not None:
                # An integer is a GPU, also where there is none.
                yield torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _is_hidden(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_available()
