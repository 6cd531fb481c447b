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
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ...common.dispatch import BACKENDS
from ..calls import AttentionCalls
from ..norms import BY
from ..patching import Line, Report, models_in, patch_models, restore_module
from ..recipe import HostChanged, Recipe
from .dit import FUNCTION, Attention, cross_attention_forward, layer_forward, own_forward, self_attention_forward
from .probes import layer_probe, self_attention_probe

__all__ = ["HostChanged", "Report", "accelerate", "restore"]

_HOST = "this version of the Wan code"
_CROSS = ("WanT2VCrossAttention", "WanI2VCrossAttention", "WanCrossAttention")
_PROJECTIONS = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads", "head_dim", "window_size")
_LAYER = ("modulation", "norm1.eps", "self_attn", "norm3", "cross_attn", "norm2.eps", "ffn")


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
        HostChanged: the host's code differs from what a replacement was written for, in an attribute that the message
            names. Nothing is changed then.

    Examples:
        >>> wan_i2v = wan.WanI2V(config, checkpoint_dir)  # doctest: +SKIP
        >>> report = accelerate(wan_i2v)  # doctest: +SKIP
        >>> wan_i2v.generate(...)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    calls = AttentionCalls()
    report = Report(f"swifti2v_kernels in {type(model).__name__} (original Wan code)", dry_run, calls=calls)
    recipes = _recipes(Attention(calls, backend))
    wanted = {"attention": attention, "norms": norms, "vae": vae}

    def look(name: str, root: nn.Module) -> list[Line]:
        if attention:
            _check_function(name, root)
        return _not_known(name, root, recipes)

    patch_models(report, _models(model), recipes, wanted, _HOST, look)
    print(report)
    return report


def restore(model: Any) -> Report:
    """Undoes :func:`accelerate`: afterwards a model computes with the host's own code, bit for bit as before.

    Args:
        model: the model that was accelerated, or a part of it that was accelerated by itself.

    Returns:
        A report whose ``left`` names what somebody else has replaced in the meantime, and which is therefore left.

    Raises:
        TypeError: there is no torch module in ``model``.
    """
    return restore_module(*dict(_models(model)).values(), title=f"restored {type(model).__name__}")


def _recipes(attention: Attention) -> tuple[Recipe, ...]:
    from ..wan_vae.recipes import ORIGINAL_RECIPES

    cross, by = cross_attention_forward(attention), "segment_attention"
    return (
        Recipe(
            "WanSelfAttention",
            "attention",
            "qk_norm_rope, segment_attention",
            _PROJECTIONS,
            self_attention_forward(attention),
            fits=_decorated,
            own=attention.forward,
            served_apart=True,
            probe=self_attention_probe,
        ),
        *(Recipe(host, "attention", by, (), cross, fits=_decorated, served_apart=True) for host in _CROSS),
        Recipe("WanAttentionBlock", "norms", BY, _LAYER, layer_forward, probe=layer_probe),
        *ORIGINAL_RECIPES,
    )


def _decorated(module: nn.Module) -> str | None:
    """Returns why the forward cannot be copied: what decorators do, its code does not show."""
    kind = type(module)
    return None if own_forward(kind) is kind.forward else "its forward has a decorator"


def _models(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yields the module, or those of a pipeline object: its attributes, and the ``model`` of those that wrap one."""
    parts = {}
    for name, part in getattr(model, "__dict__", {}).items():
        wraps = not isinstance(part, nn.Module)
        if isinstance(inner := getattr(part, "model", None) if wraps else part, nn.Module):
            parts[f"{name}.model" if wraps else name] = inner
    return models_in(model, parts, "model: expected a torch module, or an object that holds some")


def _check_function(component: str, root: nn.Module) -> None:
    """Checks that the known attention modules call a ``flash_attention`` that takes what ours takes."""
    expected = list(inspect.signature(Attention(AttentionCalls()).function(lambda: None)).parameters)
    for name, module in root.named_modules():
        kind = type(module).__name__
        if kind not in ("WanSelfAttention", *_CROSS):
            continue
        path = f"{component}.{name}" if name else component
        function = own_forward(type(module)).__globals__.get(FUNCTION)
        if not callable(function):
            what = f"the module of {path} has no attribute {FUNCTION!r}"
        elif missing := [x for x in expected if x not in inspect.signature(function).parameters]:
            what = f"its {FUNCTION} has no parameter {missing[0]!r}"
        else:
            continue
        raise HostChanged(f"{_HOST} is not what the replacement of {kind} was written for: {what}; nothing was changed")


def _not_known(component: str, root: nn.Module, recipes: Sequence[Recipe]) -> list[Line]:
    """Returns a line for each kind of module that calls ``flash_attention`` and that no recipe is for."""
    known = {recipe.host for recipe in recipes}
    counts: Counter[str] = Counter()
    for module in root.modules():
        kinds = [kind.__name__ for kind in type(module).__mro__]
        # Scripted modules have no code of their own.
        forward = inspect.unwrap(getattr(type(module), "forward", None))
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        if FUNCTION in names and known.isdisjoint(kinds):
            counts[kinds[0]] += 1
    return [Line(component, kind, n, "not known") for kind, n in counts.items()]
