"""Reports say what happened: calls served, handed back by reason, never called, and where no kernel will run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from swifti2v_kernels.common.target import pretend_gpu
from swifti2v_kernels.integrations import calls, diffusers, obstacles, wan
from swifti2v_kernels.integrations.patching import Report
from tests.support.diffusers_models import MODELS, build, make, run
from tests.support.wan_standin import model as original

WAN = "Wan 2.1 text-to-video"
NO_GPU = "kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu"
INSTEAD = "PyTorch computes, no faster than the host and slower on small inputs"
UNCOUNTED = f"no counted call; {calls.COMPILED}"


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_any_traced", False)


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
    assert "never" not in first
    for n in (1, 2):
        run(module, inputs)
        expected = {("served", 4, "WanAttnProcessor", 4 * n), ("served", 2, "WanTransformerBlock", 2 * n)}
        assert rows(report) == {(verb, count, host, f"{calls} calls") for verb, count, host, calls in expected}
        assert "no call so far" not in str(report)
    report.restore()
    run(module, inputs)
    assert "  8 calls" in str(report)


def chosen_backend(module: nn.Module) -> None:
    module.set_attention_backend("native")


def watched_projections(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda *_: None)


HANDED_BACK = {
    (WAN, chosen_backend): {"WanAttnProcessor": "the attention backend native was chosen for it"},
    ("CogVideoX", watched_projections): {
        "CogVideoXAttnProcessor2_0": "a hook on a projection or norm must see all tokens at once",
        "CogVideoXBlock": "a hook inside must see both streams at once",
    },
}


@pytest.mark.parametrize(("case", "reasons"), HANDED_BACK.items(), ids=["backend", "hooks"])
def test_a_model_whose_calls_are_all_handed_back_is_told_by_reason(case: Any, reasons: dict[str, str]) -> None:
    name, change = case
    module, inputs = make(name)
    report = diffusers.accelerate(module)
    change(module)
    run(module, inputs)
    found = {(verb, host, text.split(": ")[-1]) for verb, _, host, text in rows(report) if host in reasons}
    assert found == {("handed back", host, reason) for host, reason in reasons.items()}


def test_a_module_that_is_never_called_is_named() -> None:
    module, inputs = make(WAN)
    report = diffusers.accelerate(module)
    unused, module.blocks = module.blocks[1], module.blocks[:1]
    run(module, inputs)
    assert unused.attn1.processor is not None
    assert ("never called", 1, "WanTransformerBlock", "blocks.1") in rows(report)
    assert ("never called", 2, "WanAttnProcessor", "blocks.1.attn1, blocks.1.attn2") in rows(report)
    assert ("served", 2, "WanAttnProcessor", "2 calls") in rows(report)


@torch.no_grad()
def test_parts_of_a_layer_that_was_served_are_not_said_to_be_idle() -> None:
    """A layer of the VAE reads the weights of its parts; if a hook lets it not, they are called and counted."""
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]).eval()
    report = diffusers.accelerate(vae)
    for part in vae.decoder.mid_block.resnets[0].modules():
        part.register_forward_hook(lambda *_: None)
    vae.decode(torch.randn(1, 4, 2, 4, 4))
    found = {(verb, host): text for verb, _, host, text in rows(report)}
    assert found["handed back", "WanResidualBlock"].endswith("a hook on a layer inside")
    assert found["served", "WanResidualBlock"].endswith(" calls")
    convs = {text for verb, _, host, text in rows(report) if (verb, host) == ("served", "WanCausalConv3d")}
    assert {text.split()[-1] for text in convs} == {"calls", "were"}
    idle = [names.split(" and ")[0].split(", ") for (verb, _), names in found.items() if verb == "never called"]
    assert all(name.startswith(("encoder", "quant_conv")) for names in idle for name in names)


def test_a_copy_is_not_counted_for_the_model() -> None:
    module, inputs = make(WAN)
    report = diffusers.accelerate(module)
    run(copy.deepcopy(module), inputs)
    assert "no call so far" in str(report)
    run(module, inputs)
    assert ("served", 2, "WanTransformerBlock", "2 calls") in rows(report)


@pytest.mark.parametrize(
    "whole", [pytest.param(True, marks=pytest.mark.slow, id="whole"), pytest.param(False, id="layers")]
)
def test_compiled_code_is_not_compiled_again_and_its_calls_are_said_not_to_be_counted(whole: bool) -> None:
    """Neither counts nor what the host may have chosen are guarded such that the next call is another graph."""
    module, inputs = make(WAN)
    report = diffusers.accelerate(module)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    if whole:
        compiled: Any = torch.compile(module, fullgraph=True, backend=graphs)
    else:
        module.compile_repeated_blocks(fullgraph=True, backend=graphs)
        compiled = module
    for _ in range(3):
        run(compiled, inputs)
        assert graphs.frame_count == 1
    attentions = ", ".join(f"blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2))
    assert rows(report) == {
        ("not counted", 4, "WanAttnProcessor", f"{attentions}: {UNCOUNTED}"),
        ("not counted", 2, "WanTransformerBlock", f"blocks.0, blocks.1: {UNCOUNTED}"),
    }
    assert "never called" not in str(report)


@torch.no_grad()
def test_a_compiled_layer_s_parts_are_not_said_to_be_never_called_and_others_keep_their_rows() -> None:
    """Counts of what is not compiled stay, and what has none is named, be it compiled or unused."""
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]).eval()
    report = diffusers.accelerate(vae)
    vae.decoder.mid_block.resnets[0].compile(backend="eager")
    vae.decode(torch.randn(1, 4, 2, 4, 4))
    found = {(verb, host): (count, text) for verb, count, host, text in rows(report) if not text.startswith("as parts")}
    assert not any(verb == "never called" for verb, _ in found)
    blocks = [name for name, m in vae.named_modules() if type(m).__name__ == "WanResidualBlock"]
    idle = [name for name in blocks if name.startswith("encoder") or name == "decoder.mid_block.resnets.0"]
    count, text = found["not counted", "WanResidualBlock"]
    assert count == len(idle)
    assert text == f"{', '.join(idle[:4])} and {len(idle) - 4} more: {UNCOUNTED}"
    assert found["served", "WanResidualBlock"][0] == len(blocks) - len(idle)
    module, inputs = make(WAN)
    report = diffusers.accelerate(module)
    module.blocks = module.blocks[:1]
    run(module, inputs)
    assert ("not counted", 1, "WanTransformerBlock", f"blocks.1: {UNCOUNTED}") in rows(report)
    assert ("served", 1, "WanTransformerBlock", "1 call") in rows(report)


def test_the_wan_code_has_the_same_report_with_its_attention_calls() -> None:
    """Modules whose attention is another function are said to be called; what served that is counted apart."""
    torch.manual_seed(0)
    host = original.WanModel(original.WanT2VCrossAttention)
    tokens, grids = [torch.randn(24, 64), torch.randn(12, 64)], [(2, 3, 4), (1, 3, 4)]
    given = tokens, grids, 0.3 * torch.randn(2, 6, 64), torch.randn(2, 9, 64), 24
    report = wan.accelerate(host, backend="torch")
    host.blocks[0].norm1.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        host(*given)
    grid = "norm and rotation: grids that differ or have more tokens than there are"
    assert rows(report) == {
        ("handed back", 2, "WanSelfAttention", f"2 calls: {grid}"),
        ("called", 2, "WanT2VCrossAttention", "2 calls"),
        ("served", 1, "WanAttentionBlock", "1 call"),
        ("handed back", 1, "WanAttentionBlock", "1 call: a hook on norm1 or norm2"),
    }
    assert str(report).endswith("  attention calls\n         4  served by reference")


# Where no kernel runs


def obstacle(report: Report) -> list[str]:
    return [line.text for _, line in report.obstacles()]


def test_a_model_on_the_cpu_has_no_kernels_and_is_told_so() -> None:
    for report in (
        diffusers.accelerate(make(WAN)[0]),
        wan.accelerate(original.WanModel(original.WanT2VCrossAttention)),
    ):
        (text,) = obstacle(report)
        assert text == f"weights are on cpu: {NO_GPU}; {INSTEAD}"
        assert f"{text}\n" in str(report)
    assert obstacle(diffusers.accelerate(make(WAN)[0], dry_run=True))
    assert not obstacle(diffusers.accelerate(nn.Linear(2, 2)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the device ``cuda`` one on which kernels run."""
    monkeypatch.setattr(obstacles, "device_obstacle", lambda device: None if device.type == "cuda" else NO_GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(obstacles, "_in_attention", lambda *_: None)


@pytest.mark.parametrize("device", ["cuda", 0, "cpu"])
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_where_hooks_bring_the_weights_decides(kind: str, device: str | int, gpu: None) -> None:
    """Weights that lie on the CPU and are computed with elsewhere are no reason to say that no kernel runs."""
    module, _ = make(WAN)
    report = diffusers.accelerate(module)
    assert obstacle(report)
    if kind == "group":
        hook = SimpleNamespace(group=SimpleNamespace(onload_device=device))
        module.blocks[0]._diffusers_hook = SimpleNamespace(hooks={"group_offloading": hook}, _fn_refs=[])
    else:
        part = module if kind == "model" else module.blocks[0].attn1.to_q
        part._hf_hook = SimpleNamespace(execution_device=device)
    brought = f"hooks bring the weights to cpu: {NO_GPU}; {INSTEAD}"
    assert obstacle(report) == ([brought] if device == "cpu" else [])


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [
        (24, torch.bfloat16, "kernels exist for head_dim 64, 96, 128, got 24"),
        (64, torch.float32, "kernels exist for float16 and bfloat16, got torch.float32, unless autocast is on"),
        (64, torch.float64, "kernels exist for float16 and bfloat16, got torch.float64"),
        (64, torch.bfloat16, None),
        (64, torch.float8_e4m3fn, None),
    ],
)
def test_attention_that_no_kernel_takes_is_told(head_dim: int, dtype: torch.dtype, reason: str | None) -> None:
    """Heads of another size, and weights whose type the projections hand on, are said as ``explain`` says them."""
    module = build(MODELS[WAN], head_dim).to(dtype)
    with pretend_gpu(90):
        report = diffusers.accelerate(module)
        expected = [] if reason is None else [f"attention: {reason}; {INSTEAD}"]
        assert obstacle(report) == expected
    with pretend_gpu(90):
        host = original.WanModel(original.WanT2VCrossAttention, dim=2 * head_dim).to(dtype)
        found = obstacle(wan.accelerate(host))
        # The original casts to 16 bits within its attention.
        assert found == (expected if head_dim == 24 else [])
