"""A Wan VAE in ComfyUI on our operators, as object patches of its ``ModelPatcher``.

Several ``VAE`` objects of a graph may share one module and its weights. Object patches are ComfyUI's own way to let
them differ: it puts a patcher's patches in place when it loads that patcher, and takes them away for another one.
"""

from __future__ import annotations

import copy
import logging
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..patching import Line, Report, plan_patches
from .host import need

_log = logging.getLogger(__name__)

#: The object patches and the report of each module. They are kept, because a module may show our forwards when it is
#: looked at again: the patcher that has them is loaded then.
_PLANS: WeakKeyDictionary[nn.Module, tuple[dict[str, MethodType], Report]] = WeakKeyDictionary()


def accelerate_vae(vae: Any) -> tuple[Any, Report]:
    """Copies a ComfyUI ``VAE`` so that the copy decodes and encodes on our operators; it shares module and weights.

    Args:
        vae: a ``VAE``; it is not changed. One that is not Wan's is returned itself.

    Returns:
        The copy, and a report of what was replaced and what was not.

    Raises:
        HostChanged: this version of ComfyUI has another interface.
    """
    need(vae, "VAE", "first_stage_model")
    module = vae.first_stage_model
    patches, report = _plan(module) if isinstance(module, nn.Module) else ({}, _unknown(module))
    if not patches:
        _log.info("%s", report)
        return vae, report
    need(vae, "VAE", "patcher")
    need(vae.patcher, "VAE.patcher", "clone", "add_object_patch")
    patched = copy.copy(vae)
    patched.patcher = vae.patcher.clone()
    for name, forward in patches.items():
        patched.patcher.add_object_patch(name, forward)
    _log.info("%s", report)
    return patched, report


def _plan(module: nn.Module) -> tuple[dict[str, MethodType], Report]:
    if module not in _PLANS:
        from ..wan_vae.recipes import ORIGINAL_RECIPES

        name = type(module).__name__
        patches, replaced, left = plan_patches(name, module, ORIGINAL_RECIPES, {"vae": True}, "ComfyUI")
        report = Report(f"SwiftI2V VAE: {name}", replaced=replaced, left=left) if patches else _unknown(module)
        _PLANS[module] = {f"{patch.name[len(name) + 1 :]}.forward": patch.replacement for patch in patches}, report
    return _PLANS[module]


def _unknown(module: Any) -> Report:
    name = type(module).__name__
    return Report(f"SwiftI2V VAE: {name}", left=[Line("first_stage_model", name, 0, "not a Wan VAE; left as it is")])
