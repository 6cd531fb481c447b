"""A stand-in for ComfyUI: its attention with overrides, model patchers, loading of models, and custom nodes.

What the nodes touch is as published: names, calling conventions, and who may change what when. Models are patched when
they are loaded, clones share one module and give it up to each other, and an attention function is wrapped once.
"""

from __future__ import annotations

import copy
import functools
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# comfy/ldm/modules/attention.py


def wrap_attn(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Looks the override up, once per call: what an override calls is not looked up again."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            options = kwargs.get("transformer_options") or {}
            if "optimized_attention_override" in options:
                return options["optimized_attention_override"](function, *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


#: Calls of the host's own attention since a test emptied it.
SEEN: list[dict[str, Any]] = []


@wrap_attn
def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):  # type: ignore[no-untyped-def]
    """Computes attention of ``[B, L, H*D]``, or of ``[B, H, L, D]`` with ``skip_reshape``."""
    SEEN.append(kwargs)
    if not skip_reshape:
        dim_head = q.shape[2] // heads
        q, k, v = (x.unflatten(2, (-1, dim_head)).transpose(1, 2) for x in (q, k, v))
    extra = {key: value for key, value in kwargs.items() if key in ("scale", "enable_gqa")}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **extra)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class WrappersMP:
    """The kinds of wrappers, as in comfy/patcher_extension.py."""

    OUTER_SAMPLE = "outer_sample"


def install(patch: pytest.MonkeyPatch) -> ModuleType:
    """Puts ``comfy.ldm.modules.attention``, which is returned, and ``comfy.patcher_extension`` where imports look."""
    attention, extension = ModuleType("comfy.ldm.modules.attention"), ModuleType("comfy.patcher_extension")
    attention.wrap_attn = wrap_attn  # type: ignore[attr-defined]
    extension.WrappersMP = WrappersMP  # type: ignore[attr-defined]
    for module in (*map(ModuleType, ("comfy", "comfy.ldm", "comfy.ldm.modules")), attention, extension):
        module.__path__ = []
        patch.setitem(sys.modules, module.__name__, module)
    return attention


# comfy/ldm/wan/model.py


class Attention(nn.Module):
    """An attention in which queries and keys are neither normed nor rotated."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None, transformer_options: dict[str, Any]) -> Tensor:
        context = x if context is None else context
        q, k, v = self.q(x), self.k(context), self.v(context)
        return self.o(attention_pytorch(q, k, v, heads=self.num_heads, transformer_options=transformer_options))


class WanModel(nn.Module):
    """A model with two layers of self- and cross-attention."""

    def __init__(self, dim: int = 48, num_heads: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(dim, num_heads) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + layer(x, context if i % 2 else None, transformer_options)
        return x


class WanModel_S2V(WanModel):
    """A model that hands no options to its layers, so that no override is called."""

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        return super().forward(x, context, {})


# comfy/model_patcher.py and comfy/model_management.py


class ModelPatcher:
    """A patcher whose clones share the module, and what its patches have replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}
        self.load_device = torch.device("cpu")

    def clone(self) -> ModelPatcher:
        n = type(self)(self.model)
        n.model_options = copy.deepcopy(self.model_options)
        n.object_patches = dict(self.object_patches)
        n.object_patches_backup = self.object_patches_backup
        n.wrappers = {kind: {key: w.copy() for key, w in keys.items()} for kind, keys in self.wrappers.items()}
        return n

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def is_clone(self, other: ModelPatcher) -> bool:
        return self.model is other.model

    def add_object_patch(self, name: str, obj: Any) -> None:
        self.object_patches[name] = obj

    def patch_model(self) -> None:
        for name, obj in self.object_patches.items():
            old = set_attr(self.model, name, obj)
            self.object_patches_backup.setdefault(name, old)

    def unpatch_model(self) -> None:
        for name, old in self.object_patches_backup.items():
            set_attr(self.model, name, old)
        self.object_patches_backup.clear()


def set_attr(owner: Any, path: str, value: Any) -> Any:
    """Sets a nested attribute and returns what stood there."""
    *parts, last = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    old = getattr(owner, last)
    setattr(owner, last, value)
    return old


LOADED: list[ModelPatcher] = []


def load_models_gpu(models: list[ModelPatcher]) -> None:
    """Loads each patcher with its own patches, in place of a clone that may be loaded."""
    for model in models:
        LOADED[:] = [other for other in LOADED if not model.is_clone(other)]
        model.unpatch_model()
        model.patch_model()
        LOADED.append(model)


# comfy/sd.py


class VAE:
    def __init__(self, first_stage_model: nn.Module | None) -> None:
        self.first_stage_model = first_stage_model
        if first_stage_model is not None:
            self.patcher = ModelPatcher(first_stage_model)
            self.device = torch.device("cpu")

    def decode(self, samples: Tensor) -> Tensor:
        load_models_gpu([self.patcher])
        return self.first_stage_model.decode(samples)

    def encode(self, pixels: Tensor) -> Tensor:
        load_models_gpu([self.patcher])
        return self.first_stage_model.encode(pixels)


# nodes.py and execution.py


def load_custom_node(path: Path) -> tuple[dict[str, type], dict[str, str]]:
    """Runs a folder of ``custom_nodes`` as ComfyUI does: under a name made of its path, not of its package."""
    names = runpy.run_path(os.fspath(path / "__init__.py"), run_name=str(path).replace(".", "_x_"))
    return names["NODE_CLASS_MAPPINGS"], names["NODE_DISPLAY_NAME_MAPPINGS"]


def execute(node: type, **given: Any) -> tuple[Any, ...]:
    """Runs one node of a graph: its declared inputs, with their defaults, and as many results as it declares."""
    inputs = {}
    for name, (kind, options) in node.INPUT_TYPES()["required"].items():
        assert isinstance(kind, str)
        inputs[name] = given.pop(name) if name in given else options["default"]
    assert not given
    results = getattr(node(), node.FUNCTION)(**inputs)
    assert len(results) == len(node.RETURN_TYPES)
    return results


def run(model: ModelPatcher, *inputs: Tensor) -> Tensor:
    """Runs the model as a sampler does, with the options of its patcher."""
    load_models_gpu([model])
    with torch.no_grad():
        return model.model.diffusion_model(*inputs, transformer_options=model.model_options["transformer_options"])


def sample(model: ModelPatcher, *inputs: Tensor, steps: int = 1) -> Tensor:
    """Samples with a model as comfy/samplers.py does, its wrappers around."""

    def outer_sample(x: Tensor, *others: Tensor) -> Tensor:
        for _ in range(steps):
            x = run(model, x, *others)
        return x

    wrappers = [w for keyed in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).values() for w in keyed]
    for wrapper in reversed(wrappers):
        outer_sample = functools.partial(wrapper, outer_sample)
    return outer_sample(*inputs)
