"""diffusers' models on the kernels: the same numbers, no concatenation of queries, keys or values, and less memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.dit.count import count_layer
from bench.dit.layer import ACCELERATED, LAYER_PROVIDERS
from bench.dit.shapes import SHAPES
from swifti2v_kernels.integrations.diffusers import accelerate
from tests.support.diffusers_models import MODELS, build, run
from tests.support.operators_called import Operators
from tests.support.tolerances import KERNEL_PARITY, relative_error

#: (model, concatenations of queries, keys and values, or of what they are projected from, inside diffusers' attention)
CONCATENATIONS = {
    "Wan 2.1 image-to-video (CLIP)": 0,
    "HunyuanVideo": 3 * 1 + 3 * 2,
    "HunyuanVideo image-to-video (token_replace)": 3 * 1 + 3 * 2,
    "LTX-Video": 0,
    "CogVideoX": 2,
    "Mochi": 2 * (2 * 3 + 1),
}


class Calls(Operators):
    """A mode that also counts concatenations inside attention modules."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.inside = 0
        for part in module.modules():
            if hasattr(part, "processor"):
                part.register_forward_pre_hook(lambda *_: self._step(1))
                part.register_forward_hook(lambda *_: self._step(-1))

    def _step(self, by: int) -> None:
        self.inside += by

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cat.default and self.inside:
            self.counts["cat"] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.compatibility("no concatenation")
@pytest.mark.parametrize("name", CONCATENATIONS)
def test_kernels_compute_and_nothing_is_concatenated(name: str) -> None:
    """No query, key or value is concatenated any more; the count before shows that it would be seen."""
    model = MODELS[name]
    module = build(model, head_dim=64)
    inputs = model.inputs(module)
    if "CLIP" in name or "LTX" in name:  # 512 tokens of text, which diffusers fixes, and the most of the clip
        del (module.blocks if "CLIP" in name else module.transformer_blocks)[1:]
        inputs = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    before = Calls(module)
    with before:
        expected = run(module, inputs)
    report = accelerate(module)
    after = Calls(module)
    with after:
        actual = run(module, inputs)
    assert relative_error(actual, expected) < KERNEL_PARITY
    assert before.counts == Counter(cat=CONCATENATIONS[name])
    assert after.counts["cat"] == 0
    attentions = sum(line.count for line in report.replaced if "segment_attention" in line.text)
    with_image = len(module.blocks) if "CLIP" in name else 0
    assert after.counts["segment_attention"] == attentions + with_image
    assert after.counts["adaln"] > 0
    assert (after.counts["norm_rope"] > 0) == (name != "CogVideoX")


@pytest.mark.parametrize(("timesteps", "ours", "theirs"), [("one", 6.2, 15.6), ("per block", 9.1, 27.6)])
def test_a_block_needs_a_third_of_the_memory(timesteps: str, ours: float, theirs: float) -> None:
    """The peak of activations of a layer is a third, counted at the size of a 2K window of Wan 1.3B in bfloat16."""
    shape = SHAPES[0]
    stream = shape.tokens * shape.config.dim * 2
    peaks = {}
    for provider in (p for p in LAYER_PROVIDERS if p.name in (ACCELERATED, "diffusers, eager")):
        peaks[provider.name] = count_layer(provider.prepare, shape, timesteps, torch.device("meta"))[0] / stream
    assert peaks[ACCELERATED] < ours
    assert peaks["diffusers, eager"] > theirs


@pytest.mark.parametrize("name", ["Wan 2.1 text-to-video", "HunyuanVideo"])
def test_forward_derivatives_are_the_hosts(name: str) -> None:
    """The derivative of a model in a direction, which the kernels would give as zero."""
    model = MODELS[name]
    module = build(model, head_dim=64).requires_grad_(False)
    inputs = model.inputs(module)
    x = inputs.pop("hidden_states")

    def derivative() -> torch.Tensor:
        # Torch's fused attention has no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda x: module(x, **inputs, return_dict=False)[0], (x,), (x.cos(),))[1]

    expected = derivative()
    accelerate(module)
    assert relative_error(derivative(), expected) < KERNEL_PARITY
