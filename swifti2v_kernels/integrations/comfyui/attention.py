"""ComfyUI's attention on our kernels, through the override that its ``optimized_attention`` looks up at every call.

The override is an entry of a model's ``transformer_options`` and so belongs to one ``MODEL`` of a graph. ComfyUI calls
it with the attention function that it would have used, and with that function's arguments.

Whether a model hands its ``transformer_options`` to its attention, and so calls the override at all, is not known
before it runs. So the node promises nothing, and after every sampling run the log says what became of the run's calls.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..patching import no_kernel_on
from ..recipe import check
from ..sdpa import AttentionCalls, attend

KEY = "optimized_attention_override"
CHANGED = "this version of ComfyUI is not what the node was written for"
_WRAPPER = "swifti2v_attention"
_ATTENTION_MODULE = "comfy.ldm.modules.attention"

Override = Callable[..., Tensor]

_log = logging.getLogger(__name__)


def accelerate_attention(model: Any, backend: str = "auto") -> tuple[Any, AttentionCalls]:
    """Clones a ComfyUI ``MODEL`` so that the clone's attention goes to our kernels.

    Args:
        model: a ``MODEL`` (``ModelPatcher``); it is not changed. An override that it has already is given what we
            cannot serve.
        backend: ``auto``, ``torch`` or ``triton``, as for
            :func:`swifti2v_kernels.integrations.sdpa.replace_sdpa`.

    Returns:
        The clone, and the counts of its attention calls in the last run.

    Raises:
        HostChanged: this version of ComfyUI has no such override, or its patcher another interface.
    """
    wrappers = "add_wrapper_with_key", "remove_wrappers_with_key"
    check(f"{CHANGED}: MODEL", model, "clone", "model_options", "model", *wrappers)
    check(f"{CHANGED}: {_ATTENTION_MODULE}", importlib.import_module(_ATTENTION_MODULE), "wrap_attn")
    calls, patched = AttentionCalls(), model.clone()
    options = patched.model_options.get("transformer_options", {})
    override = make_override(calls, options.get(KEY), backend)
    # New dictionaries, however deep this version's clone is.
    patched.model_options = {**patched.model_options, "transformer_options": {**options, KEY: override}}
    name = type(getattr(model.model, "diffusion_model", model.model)).__name__
    outer = importlib.import_module("comfy.patcher_extension").WrappersMP.OUTER_SAMPLE
    # A node of ours before this one is offered what is left, and would report that.
    patched.remove_wrappers_with_key(outer, _WRAPPER)
    patched.add_wrapper_with_key(outer, _WRAPPER, _telling(calls, name))
    _log.info(
        "SwiftI2V attention: calls that %s makes of ComfyUI's optimized attention will be offered to the kernels;"
        " totals follow after each run",
        name,
    )
    device = getattr(model, "load_device", None)
    if backend != "torch" and device is not None and (reason := no_kernel_on(device)) is not None:
        _log.warning("SwiftI2V attention: no kernel runs here, ComfyUI computes: %s", reason)
    return patched, calls


def _telling(calls: AttentionCalls, name: str) -> Callable[..., Any]:
    """Returns the wrapper of a sampling run that reports the run's calls."""

    def told(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.implementations.clear()
        calls.not_served.clear()
        try:
            return run(*args, **kwargs)
        finally:
            if calls.served or calls.not_served:
                _log.info("SwiftI2V attention of %s, in this run: %s", name, calls)
            else:
                _log.warning(
                    "SwiftI2V attention: no call of the override by %s was counted in this run, so nothing was"
                    " accelerated, unless it is compiled. Its attention does not pass through the override, or another"
                    " node has put its own there, or no step was made.",
                    name,
                )

    return told


def make_override(calls: AttentionCalls, previous: Override | None, backend: str = "auto") -> Override:
    """Returns the override that ComfyUI calls as ``override(function, q, k, v, heads, ...)``.

    Calls that our kernels cannot serve go to ``previous``, or to the function where there is none.
    """

    def override(function: Override, *args: Any, **kwargs: Any) -> Tensor:
        out = _serve(calls, backend, *args, **kwargs)
        if out is not None:
            return out
        return function(*args, **kwargs) if previous is None else previous(function, *args, **kwargs)

    return override


def _serve(
    calls: AttentionCalls,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    **rest: Any,
) -> Tensor | None:
    """Returns the attention of a call, or None if our kernels cannot serve it; it is counted either way.

    Tensors are ``[B, L, H*D]``, or ``[B, H, L, D]`` with ``skip_reshape``, and the result likewise by
    ``skip_output_reshape``. Other arguments (``transformer_options``, permission for low precision) do not concern us.
    """
    gqa = enable_gqa and (k.shape[1] != q.shape[1] if skip_reshape else k.shape[-1] != q.shape[-1])
    if calls.refuses(
        (torch.is_autocast_enabled(q.device.type), "autocast is on, under which ComfyUI's attention functions differ"),
        (mask is not None, "mask is given"),
        (attn_precision not in (None, q.dtype), f"attn_precision {attn_precision} for {q.dtype}"),
        (q.ndim != (4 if skip_reshape else 3), f"{q.ndim} axes"),
        (gqa, "enable_gqa: fewer heads of keys than of queries"),
    ):
        return None
    q, k, v = (x.transpose(1, 2) if skip_reshape else x.unflatten(2, (heads, -1)) for x in (q, k, v))
    out = attend(q, k, v, calls, scale=scale, backend=backend)
    if out is None:
        return None
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)
