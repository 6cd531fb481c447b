"""diffusers' models on the kernels: the same numbers, no concatenation of queries, keys or values, and less memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from bench.dit.layer import ACCELERATED, LAYER_PROVIDERS, layer_inputs
from bench.dit.shapes import SHAPES
from model.machine.counted import TensorMemory
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


@pytest.mark.parametrize(("timesteps", "streams"), [("one", 6.2), ("per block", 9.1)])
def test_a_block_needs_few_copies_of_its_tokens(timesteps: str, streams: float) -> None:
    """The peak of activations of a layer at 2K is a third of diffusers', which is 15.6 and 27.6 copies."""
    inputs = layer_inputs(SHAPES[0], torch.device("meta"), torch.bfloat16, timesteps)
    provider = next(p for p in LAYER_PROVIDERS if p.name == ACCELERATED)
    with torch.no_grad():
        runner = provider.prepare(inputs)
        with TensorMemory([*inputs.layer.parameters(), inputs.text, runner.modulation, *runner.rope]) as memory:
            before = memory.live
            runner.load()
            runner.step()
    assert memory.peak - before < streams * inputs.x.nbytes
