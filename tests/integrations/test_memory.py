"""Replacements that compute in parts or row by row, to be smaller, give the same wherever it is cut."""

from __future__ import annotations

import re

import pytest
import torch

from swifti2v_kernels.integrations.diffusers import accelerate, norms
from tests.support.diffusers_models import HEAD_DIM, MODELS, build, run
from tests.support.tolerances import PARITY, relative_error


@pytest.mark.parametrize("name", MODELS)
def test_feed_forwards_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 7 tokens give the same: the last one is shorter, and batch entries are parts of their own."""
    monkeypatch.setattr(norms, "PART_TOKENS", 7)
    model = MODELS[name]
    module = build(model, HEAD_DIM[name])
    inputs = model.inputs(module)
    expected = run(module, inputs)
    accelerate(module)
    longest = []
    last = re.compile(r"^(blocks|(single_)?transformer_blocks)\.\d+\.(ffn\.net\.2|ff(_context)?\.net\.2|proj_out)$")
    forwards = [m for path, m in module.named_modules() if last.match(path)]
    assert len(forwards) >= 2
    for linear in forwards:
        inner = linear.forward
        linear.forward = lambda x, inner=inner: (longest.append(x.shape[:2]), inner(x))[1]
    assert relative_error(run(module, inputs), expected) < PARITY
    assert set(longest) <= {(1, n) for n in range(1, 8)}
    assert (1, 7) in longest


def test_hooks_on_a_feed_forward_see_it_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "PART_TOKENS", 7)
    model = MODELS["Wan 2.1 text-to-video"]
    module = build(model, 24)
    inputs = model.inputs(module)
    expected = run(module, inputs)
    accelerate(module)
    seen = []
    module.blocks[0].ffn.net[2].register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    assert relative_error(run(module, inputs), expected) < PARITY
    assert seen == [(2, 18, 48)]


def test_modulation_is_summed_as_in_diffusers() -> None:
    """Sums of a 16-bit timestep embedding and a table of either precision are float32, as in diffusers."""
    temb = torch.randn(2, 5, 6, 24).bfloat16()
    for table in (torch.randn(6, 24), torch.randn(6, 24).bfloat16()):
        row = norms.modulation_rows(table, temb)
        expected = table.float() + temb.float()
        for i in range(6):
            assert row(i).dtype == torch.float32
            assert torch.equal(row(i), expected[:, :, i])
