"""ComfyUI's attention on our kernels, through the override that its ``optimized_attention`` looks up at every call.

The override is an entry of a model's ``transformer_options`` and so belongs to one ``MODEL`` of a graph. ComfyUI calls
it with the attention function that it would have used, and with that function's arguments.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..patching import HostChanged
from ..sdpa import AttentionCalls, attend
from .host import need

KEY = "optimized_attention_override"
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
        The clone, and the counts of its attention calls, which grow as it runs.

    Raises:
        HostChanged: this version of ComfyUI has no such override, or its patcher another interface.
    """
    need(model, "MODEL", "clone", "model_options", "model")
    need(importlib.import_module(_ATTENTION_MODULE), _ATTENTION_MODULE, "wrap_attn")
    if "transformer_options" not in model.model_options:
        raise HostChanged(
            "this version of ComfyUI is not what the node was written for: MODEL.model_options has no"
            " 'transformer_options'; nothing was changed"
        )
    calls = AttentionCalls()
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    override = make_override(calls, options.get(KEY), backend)
    # New dictionaries, however deep this version's clone is.
    patched.model_options = {**patched.model_options, "transformer_options": {**options, KEY: override}}
    _log.info("SwiftI2V attention: %s", _describe(model.model))
    return patched, calls


def make_override(calls: AttentionCalls, previous: Override | None, backend: str = "auto") -> Override:
    """Returns the override that ComfyUI calls as ``override(function, q, k, v, heads, ...)``.

    Calls that our kernels cannot serve go to ``previous``, or to the function where there is none.
    """

    def override(function: Override, *args: Any, **kwargs: Any) -> Tensor:
        kinds = len(calls.implementations) + len(calls.not_served)
        out = _serve(calls, backend, *args, **kwargs)
        if len(calls.implementations) + len(calls.not_served) > kinds:
            _log.info("SwiftI2V attention, so far: %s", calls)
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
    if mask is not None:
        reason = "mask is given"
    elif attn_precision not in (None, q.dtype):
        reason = f"attn_precision {attn_precision} for {q.dtype}"
    elif q.ndim != (4 if skip_reshape else 3):
        reason = f"{q.ndim} axes"
    elif enable_gqa and (k.shape[1] != q.shape[1] if skip_reshape else k.shape[-1] != q.shape[-1]):
        reason = "enable_gqa: fewer heads of keys than of queries"
    else:
        q, k, v = (x.transpose(1, 2) if skip_reshape else x.unflatten(2, (heads, -1)) for x in (q, k, v))
        out = attend(q, k, v, calls, scale=scale, backend=backend)
        if out is None:
            return None
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)
    calls.not_served[reason] += 1
    return None


def _describe(model: Any) -> str:
    """Returns what was patched, in words for the log."""
    diffusion = getattr(model, "diffusion_model", model)
    name = type(diffusion).__name__
    if not any(kind.__name__ == "WanModel" for kind in type(diffusion).__mro__):
        return f"{name} is not a Wan model; its calls of optimized_attention are served all the same"
    kinds = [type(module).__name__ for module in diffusion.modules()]
    count = sum(kind.startswith("Wan") and kind.endswith("Attention") for kind in kinds)
    return f"{name}, {count} attention modules"
