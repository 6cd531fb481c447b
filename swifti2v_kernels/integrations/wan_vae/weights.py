"""The weights of a host's convolutions, read where they are at the moment of a call.

Nothing is kept between calls: offloading moves weights, casting hooks change their dtype, and an adapter may replace
the whole module. Whether a module's weights may be read past its own ``forward`` is therefore asked at every call
(:func:`obstacle`); if not, the caller goes the host's way, through the module.

ComfyUI keeps weights elsewhere too, but has a function that lends them (``comfy.ops.cast_bias_weight``), which
:func:`lent` uses.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...common.registration import PACKAGE
from ..hooks import hooked
from ..probing import LENDING
from ..recipe import PATCH


def obstacle(layer: nn.Module, x: Tensor, *parts: nn.Module | None) -> str | None:
    """Returns why ``layer`` is to be computed by its modules, not by us with the weights of ``parts``, or None.

    Hooks of the layer itself are around our forward and have done their work.
    """
    inside = tuple(layer.modules())
    if any(_is_wrapped(module) for module in inside[1:]):
        return "a hook on a layer inside"
    # An adapter in the place of a convolution shows its weight and computes more.
    if (patch := getattr(layer, PATCH, None)) is not None and (
        patch.parts != tuple(map(type, inside)) or any("_conv_forward" in vars(part) for part in inside)
    ):
        return "a part of it was replaced"
    return next(filter(None, (_apart(x, part) for part in parts if part is not None)), None)


def _is_wrapped(module: nn.Module) -> bool:
    """Returns whether something happens when ``module`` is called that reading its weights would miss."""
    forward = module.__dict__.get("forward")
    ours = isinstance(forward, MethodType) and forward.__func__.__module__.startswith(f"{PACKAGE}.integrations.")
    return hooked(module) or (forward is not None and not ours)


def _apart(x: Tensor, module: nn.Module) -> str | None:
    """Returns why the module's own parameters cannot be used with ``x`` as they are, or after its host's cast.

    None if they can: they are on the device of ``x`` in its dtype, or in another that autocast casts.
    """
    casts = torch.is_autocast_enabled(x.device.type)
    if _is_lent(module):
        if _lender() is None:
            return "this version of ComfyUI does not lend its weights"
        return "autocast, and ComfyUI casts too" if casts else None
    for p in module._parameters.values():
        if p is None:
            continue
        if type(p) not in (Tensor, nn.Parameter):
            return f"quantised weights, {type(p).__name__}"
        if p.device != x.device or (p.dtype != x.dtype and not casts):
            return f"weights in {p.dtype} on {p.device} for frames in {x.dtype} on {x.device}"
    return None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns a context without autocast, since the operators take all their tensors in one dtype."""
    return torch.autocast(x.device.type, enabled=False)


@contextlib.contextmanager
def lent(conv: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Lends the weight and bias of a convolution, in the dtype of ``x``, while the block runs."""
    lender = _lender() if _is_lent(conv) else None
    loan = (conv.weight, conv.bias) if lender is None else lender.cast_bias_weight(conv, x, offloadable=True)
    weight, bias = loan[:2]
    try:
        yield weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    finally:
        if lender is not None:
            lender.uncast_bias_weight(conv, *loan)


def channels_last(weight: Tensor) -> Tensor:
    """Returns ``[C', C, kt, kh, kw]`` as the operators read it; a ``[C', C, kh, kw]`` one gets one tap in time.

    It is copied unless it lies so already; that is small beside the convolution, which reads every weight once a pixel.
    """
    weight = weight if weight.ndim == 5 else weight.unsqueeze(2)
    return weight.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def _is_lent(module: nn.Module) -> bool:
    """Returns whether ComfyUI casts, moves or patches this module's weights at every call."""
    return any(getattr(module, name, None) for name in LENDING)


def _lender() -> ModuleType | None:
    """Returns ComfyUI's module of operators if it lends weights, else None: with older versions the host computes."""
    ops = sys.modules.get("comfy.ops")
    lend = getattr(ops, "cast_bias_weight", None)
    if lend is None or not hasattr(ops, "uncast_bias_weight"):
        return None
    return ops if "offloadable" in inspect.signature(lend).parameters else None
