"""Hooks that a host puts around its modules, and the place of a module's own ``forward`` beneath them.

accelerate keeps the wrapped ``forward`` in an attribute of the module, diffusers in the references of a registry, torch
beside it. All of them may be put on and taken off at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

#: Hooks of diffusers and accelerate that change where and in which dtype weights are, and nothing else.
_MOVING_HOOKS = {
    *("GroupOffloadingHook", "LazyPrefetchGroupOffloadingHook", "LayerExecutionTrackerHook"),
    *("LayerwiseCastingHook", "PeftInputAutocastDisableHook", "AlignDevicesHook", "CpuOffload"),
}


def hooked(module: nn.Module) -> bool:
    """Returns whether something happens when ``module`` is called that reading its parameters would miss."""
    return bool(hook_kinds(module) or module._forward_hooks or module._forward_pre_hooks)


def hooked_inside(*modules: nn.Module | None) -> bool:
    """Returns whether one of the modules or of those within them has hooks, which may keep its input or output."""
    return any(hooked(part) for root in modules if root is not None for part in root.modules())


def only_moves(module: nn.Module) -> bool:
    """Returns whether the hooks on ``module``, if any, only bring its weights and take them away (or cast them)."""
    return hook_kinds(module) <= _MOVING_HOOKS and not (module._forward_hooks or module._forward_pre_hooks)


def watched(module: nn.Module, *apart: nn.Module) -> bool:
    """Returns whether modules within ``module``, but not within ``apart``, have hooks that may change their data."""
    children = (child for child in module.children() if not any(child is other for other in apart))
    return any(not only_moves(part) for child in children for part in child.modules())


def hook_kinds(module: nn.Module) -> set[str]:
    """Returns the class names of the hooks that accelerate and diffusers have on ``module``."""
    registry = getattr(module, "_diffusers_hook", None)
    found = list(registry.hooks.values()) if registry is not None else []
    outer = getattr(module, "_hf_hook", None)
    if outer is not None:
        found += getattr(outer, "hooks", [outer])
    return {type(hook).__name__ for hook in found}


def forward_slots(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yields holder and attribute of every callable in the chain around ``forward``, from the outside in."""
    if "forward" in module.__dict__:
        yield module, "forward"
    if "_old_forward" in module.__dict__:  # accelerate's hooks
        yield module, "_old_forward"
    registry = getattr(module, "_diffusers_hook", None)
    for reference in reversed(registry._fn_refs if registry is not None else []):
        if reference.original_forward is not None:
            yield reference, "original_forward"
        yield reference, "forward"


def own_forward(module: nn.Module) -> tuple[Any, str] | None:
    """Returns the slot with the class's own forward, the innermost of the chain, or None if there is no such slot."""
    for holder, attribute in forward_slots(module):
        value = getattr(holder, attribute)
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward:
            return holder, attribute
    return None
