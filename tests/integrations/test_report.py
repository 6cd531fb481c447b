"""Reports say what happened: calls served, handed back by reason, not counted, and where no kernel will run."""

from __future__ import annotations

import torch
from accelerate import cpu_offload_with_hook
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from swifti2v_kernels.integrations import diffusers, wan
from swifti2v_kernels.integrations.patching import Report
from tests.support.diffusers_models import make, run
from tests.support.wan_standin import model as original

WAN = "Wan 2.1 text-to-video"
NO_GPU = "kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu"
INSTEAD = "PyTorch computes, no faster than the host and slower on small inputs"


def rows(report: Report) -> set[tuple[str, int, str, str]]:
    """Returns what became of calls: verb, number of modules, their kind, and the text."""
    return {(verb, line.count, line.host, line.text) for verb, line in report.outcomes()}


def test_calls_are_counted_until_the_report_is_printed() -> None:
    """The report claims nothing of calls before a run, and has counted each run after it."""
    module, inputs = make(WAN)
    report = diffusers.accelerate(module)
    first = str(report)
    assert "no call so far" in first
    assert "served " not in first
    for n in (1, 2):
        run(module, inputs)
        expected = {("served", 4, "WanAttnProcessor", 4 * n), ("served", 2, "WanTransformerBlock", 2 * n)}
        assert rows(report) == {(verb, count, host, f"{calls} calls") for verb, count, host, calls in expected}
        assert "no call so far" not in str(report)
    report.restore()
    run(module, inputs)
    assert "  8 calls" in str(report)


def test_modules_without_a_call_are_named() -> None:
    module, inputs = make(WAN)
    report = diffusers.accelerate(module)
    module.blocks = module.blocks[:1]
    run(module, inputs)
    assert rows(report) == {
        ("served", 1, "WanTransformerBlock", "1 call"),
        ("not counted", 1, "WanTransformerBlock", "blocks.1"),
        ("served", 2, "WanAttnProcessor", "2 calls"),
        ("not counted", 2, "WanAttnProcessor", "blocks.1.attn1, blocks.1.attn2"),
    }


def test_compiled_code_is_not_compiled_again_and_its_calls_are_not_counted() -> None:
    """Neither counts nor what the host may have chosen are guarded such that the next call is another graph."""
    module, inputs = make(WAN)
    report = diffusers.accelerate(module)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    module.compile_repeated_blocks(fullgraph=True, backend=graphs)
    for _ in range(3):
        run(module, inputs)
        assert graphs.frame_count == 1
    assert {(verb, count) for verb, count, _, _ in rows(report)} == {("not counted", 4), ("not counted", 2)}


def test_the_wan_code_has_the_same_report_with_its_attention_calls() -> None:
    """Modules whose attention is another function are said to be called; what served that is counted apart."""
    torch.manual_seed(0)
    host = original.WanModel(original.WanT2VCrossAttention)
    tokens, grids = [torch.randn(24, 64), torch.randn(12, 64)], [(2, 3, 4), (1, 3, 4)]
    given = tokens, grids, 0.3 * torch.randn(2, 6, 64), torch.randn(2, 9, 64), 24
    report = wan.accelerate(host, backend="torch")
    with torch.no_grad():
        host(*given)
    grid = "norm and rotation: grids that differ, or padding after them"
    assert rows(report) == {
        ("handed back", 2, "WanSelfAttention", f"2 calls: {grid}"),
        ("called", 2, "WanT2VCrossAttention", "2 calls"),
        ("served", 2, "WanAttentionBlock", "2 calls"),
    }
    assert str(report).endswith("  attention calls\n         4  served by reference")


# Where no kernel runs


def obstacle(report: Report) -> list[str]:
    return [line.text for _, line in report.obstacles()]


def test_a_model_on_the_cpu_has_no_kernels_and_is_told_so() -> None:
    """Nothing is said of a model whose weights hooks bring elsewhere, nor where nothing was replaced."""
    module, _ = make(WAN)
    host = original.WanModel(original.WanT2VCrossAttention)
    for report in (diffusers.accelerate(module, dry_run=True), diffusers.accelerate(module), wan.accelerate(host)):
        (text,) = obstacle(report)
        assert text == f"weights are on cpu: {NO_GPU}; {INSTEAD}"
        assert f"{text}\n" in f"{report}\n"
    assert not obstacle(diffusers.accelerate(nn.Linear(2, 2)))
    report = diffusers.accelerate(module)
    cpu_offload_with_hook(module, execution_device="cpu")
    assert not obstacle(report)
