"""The original Wan code (the Wan2.1 and Wan2.2 repositories) on our operators: two lines, and the same pictures.

    from swifti2v_kernels.integrations.wan import accelerate
    accelerate(wan_i2v)

The host's attention goes through the function ``flash_attention`` of its attention module. In the modules of the given
model, and in no others, ours is called in its place, and calls that the kernels cannot serve go on to the host's.
Self-attention also has norm and rotation of queries and keys fused, the DiT's layers their adaptive norms and
residuals, and the VAE its convolutions. Projections are called as modules and weights never copied or converted.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ...common.dispatch import BACKENDS
from ..norms import BY
from ..patching import Report, models_in, patch_models, restore
from ..recipe import Recipe
from ..sdpa import AttentionCalls
from .dit import FUNCTION, Attention, layer_forward, layer_probe, self_attention_probe

__all__ = ["Report", "accelerate", "restore"]

_CROSS = ("WanT2VCrossAttention", "WanI2VCrossAttention", "WanCrossAttention")


def accelerate(
    model: Any,
    attention: bool = True,
    norms: bool = True,
    vae: bool = True,
    dry_run: bool = False,
    *,
    backend: str = "auto",
) -> Report:
    """Puts our operators into a model of the original Wan code wherever they are known to fit, and prints what it did.

    The model is used as before and gives the same result up to rounding; on a GPU where our kernels serve its attention
    it needs no ``flash_attn``.

    Args:
        model: a ``WanModel``, a VAE, or one of the pipeline objects (``WanT2V``, ``WanI2V``, ``WanTI2V``). What was
            accelerated before is restored first, so the last call decides.
        attention: whether to replace ``flash_attention``, and norm and rotation of queries and keys.
        norms: whether to replace the adaptive norms, gates and residuals of the DiT's layers.
        vae: whether to replace the convolutions, norms and upsampling of the VAE.
        dry_run: whether only to report what would be replaced.
        backend: backend of the attention, ``auto``, ``torch`` or ``triton``, as for
            :func:`swifti2v_kernels.integrations.sdpa.replace_sdpa`.

    Returns:
        A report of what was replaced, and of what was not and why. Printed again after a run, it counts the calls; its
        ``calls`` are those of attention by what served them, and its ``restore()`` undoes it.

    Raises:
        TypeError: there is no torch module in ``model``.
        ValueError: an unknown backend.

    Examples:
        >>> wan_i2v = wan.WanI2V(config, checkpoint_dir)  # doctest: +SKIP
        >>> report = accelerate(wan_i2v)  # doctest: +SKIP
        >>> wan_i2v.generate(...)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    calls, wanted = AttentionCalls(), {"attention": attention, "norms": norms, "vae": vae}
    report = Report(f"swifti2v_kernels in {type(model).__name__} (original Wan code)", dry_run, calls=calls)
    patch_models(report, models_in(model, "model"), _recipes(Attention(calls, backend)), wanted)
    return report


def _recipes(attention: Attention) -> tuple[Recipe, ...]:
    from ..wan_vae.recipes import RECIPES

    by, ours = "segment_attention", {"fits": _other_attention, "served_apart": True}
    proved = {**ours, "own": attention.forward, "probe": self_attention_probe}
    return (
        Recipe("WanSelfAttention", "attention", f"qk_norm_rope, {by}", attention.self_attention, **proved),
        *(Recipe(host, "attention", by, attention.cross_attention, **ours) for host in _CROSS),
        Recipe("WanAttentionBlock", "norms", BY, layer_forward, apart=("self_attn", "cross_attn"), probe=layer_probe),
        *RECIPES,
    )


def _other_attention(module: nn.Module) -> str | None:
    """Returns why the forward cannot be copied with our ``flash_attention`` in it, or None."""
    forward = type(module).forward
    # What decorators do, its code does not show.
    if forward is not inspect.unwrap(forward):
        return "its forward has a decorator"
    function = getattr(forward, "__globals__", {}).get(FUNCTION)
    if not callable(function):
        return f"its module has no {FUNCTION}"
    (*expected, _) = inspect.signature(Attention(AttentionCalls()).function(function)).parameters
    missing = [name for name in expected if name not in inspect.signature(function).parameters]
    return f"its {FUNCTION} has no parameter {missing[0]!r}" if missing else None
