"""A Wan VAE in ComfyUI on our operators, as object patches of its ``ModelPatcher``.

Several ``VAE`` objects of a graph may share one module and its weights. Object patches are ComfyUI's own way to let
them differ: it puts a patcher's patches in place when it loads that patcher, and takes them away for another one.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..patching import Line, Report, no_kernel_on, plan_patches, table
from ..recipe import PATCH, check
from .attention import CHANGED

_log = logging.getLogger(__name__)

#: Methods of a ``VAE`` that run it.
_RUNS = ("decode", "decode_tiled", "encode", "encode_tiled")
#: The object patches and the report of each module. They are kept, because a module may show our forwards when it is
#: looked at again: the patcher that has them is loaded then.
_PLANS: WeakKeyDictionary[nn.Module, tuple[dict[str, MethodType], Report]] = WeakKeyDictionary()


def accelerate_vae(vae: Any) -> tuple[Any, Report]:
    """Copies a ComfyUI ``VAE`` so that the copy decodes and encodes on our operators; it shares module and weights.

    Args:
        vae: a ``VAE``; it is not changed. One that is not Wan's is returned itself.

    Returns:
        The copy, and a report of what was replaced and what was not. It counts the calls of the last run, which are
        logged after each: a replaced layer may hand a call back to ComfyUI.

    Raises:
        HostChanged: this version of ComfyUI has another interface.
    """
    check(f"{CHANGED}: VAE", vae, "first_stage_model")
    patches, report = _plan(vae.first_stage_model)
    if not patches:
        _log.info("%s", report)
        return vae, report
    check(f"{CHANGED}: VAE", vae, "patcher")
    check(f"{CHANGED}: VAE.patcher", vae.patcher, "clone", "add_object_patch")
    patched = copy.copy(vae)
    patched.patcher = vae.patcher.clone()
    for name, forward in patches.items():
        patched.patcher.add_object_patch(name, forward)
    if not hasattr(type(vae), "_swifti2v_runs"):
        patched.__class__ = _telling(type(vae), report)
    _log.info("%s", report)
    device = getattr(vae, "device", None)
    if device is not None and (reason := no_kernel_on(device)) is not None:
        _log.warning("SwiftI2V VAE: no kernel runs here, PyTorch computes: %s", reason)
    return patched, report


def _telling(kind: type, report: Report) -> type:
    """Returns a class like ``kind`` whose runs are followed by a report of their calls."""

    def telling(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            for _, _, patches in report.planned:
                for patch in patches:
                    patch.calls.clear()
            try:
                return getattr(kind, name)(*args, **kwargs)
            finally:
                rows = [row for row in report.outcomes() if row[0] != "not counted"]
                none = ["  no call of a replaced layer was counted"]
                _log.info("%s", "\n".join([f"{report.title}, {name}", *(table(rows) or none)]))

        return run

    runs = {name: telling(name) for name in _RUNS if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**runs, "__module__": kind.__module__, "_swifti2v_runs": tuple(runs)})


def _plan(module: Any) -> tuple[dict[str, MethodType], Report]:
    name = type(module).__name__
    title, other = f"SwiftI2V VAE: {name}", Line("first_stage_model", name, 0, "not a Wan VAE; left as it is")
    if not isinstance(module, nn.Module):
        return {}, Report(title, left=[other])
    if module not in _PLANS:
        from ..wan_vae.recipes import RECIPES

        patches, replaced, left = plan_patches(name, module, RECIPES, {"vae": True})
        for patch in patches:
            patch.module.__dict__[PATCH] = patch  # counts its calls
        report = Report(title, replaced=replaced, left=left if patches else [other], planned=[(name, None, patches)])
        _PLANS[module] = {f"{patch.name[len(name) + 1 :]}.forward": patch.replacement for patch in patches}, report
    return _PLANS[module]
