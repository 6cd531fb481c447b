"""diffusers' video models on our operators: the same pictures, all or nothing, with hooks, with LoRA, and back."""

from __future__ import annotations

import copy
from typing import Any

import accelerate as hugging
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from swifti2v_kernels.integrations.diffusers import (
    HostChanged,
    accelerate,
    cogvideox,
    hunyuan_video,
    ltx_video,
    mochi,
    restore,
    wan,
)
from swifti2v_kernels.integrations.diffusers.attention import Processor
from tests.support.diffusers_models import HEAD_DIM, MODELS, build, needs_group_offload, run
from tests.support.tolerances import PARITY, relative_error

RECIPES = {r.host: r for host in (cogvideox, hunyuan_video, ltx_video, mochi, wan) for r in host.RECIPES}
#: One of each family, for what does not depend on the variant.
FAMILIES = ["Wan 2.1 image-to-video (CLIP)", "HunyuanVideo", "LTX-Video", "CogVideoX", "Mochi"]
every_model = pytest.mark.parametrize("name", MODELS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def make(name: str) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """Returns a model, its inputs, and what diffusers' own code computes."""
    module = build(MODELS[name], HEAD_DIM[name])
    inputs = MODELS[name].inputs(module)
    return module, inputs, run(module, inputs)


def kind(part: nn.Module) -> str:
    """Returns the name of the class of its attention processor, or of the module itself."""
    return type(getattr(part, "processor", part)).__name__


def known(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Returns the modules by feature that a recipe is for, found here without the library's own search."""
    found: dict[str, list[nn.Module]] = {"attention": [], "norms": []}
    for part in module.modules():
        if kind(part) in RECIPES:
            found[RECIPES[kind(part)].feature].append(part)
    return found


def ours(part: nn.Module) -> bool:
    """Returns whether the processor or the forward of ``part`` is one of our replacements."""
    function = getattr(part.__dict__.get("forward"), "__func__", None)
    return isinstance(getattr(part, "processor", None), Processor) or "swifti2v" in getattr(function, "__module__", "")


def untouched(module: nn.Module) -> bool:
    return not any(ours(part) for part in module.modules())


@pytest.mark.compatibility("attention", "norms", "restore")
@every_model
def test_same_output_and_restored_bit_for_bit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every attention and layer is replaced; alone or together the output stays; nothing of ours is left afterwards."""
    module, inputs, expected = make(name)
    parts = known(module)
    assert parts["attention"]
    assert parts["norms"]
    for features in ({"attention": True, "norms": True}, {"norms": False}, {"attention": False}):
        report = accelerate(module, **features)
        assert capsys.readouterr().out.strip() == str(report)
        for feature, modules in parts.items():
            on = features.get(feature, True)
            lines = [line for line in report.replaced if RECIPES[line.host].feature == feature]
            assert sum(line.count for line in lines) == (len(modules) if on else 0)
            for part in modules:
                assert ours(part) == on
        assert relative_error(run(module, inputs), expected) < PARITY
    assert not restore(module).left
    assert untouched(module)
    assert torch.equal(run(module, inputs), expected)


@every_family
def test_no_input_is_overwritten(name: str) -> None:
    """The replacements overwrite only what they made themselves: a second run gives the same, inputs included."""
    module, inputs, _ = make(name)
    accelerate(module)
    before = copy.deepcopy(inputs)
    first, second = run(module, inputs), run(module, inputs)
    assert torch.equal(first, second)
    for key, value in before.items():
        assert not isinstance(value, Tensor) or torch.equal(value, inputs[key])


@every_family
def test_gradients_are_those_of_diffusers(name: str) -> None:
    """The differentiable path runs where there are gradients: training code keeps working, LoRA training included."""
    gradients = []
    for accelerated in (False, True):
        module, inputs, _ = make(name)
        if accelerated:
            accelerate(module)
        module(**inputs, return_dict=False)[0].square().mean().backward()
        gradients.append({key: p.grad for key, p in module.named_parameters() if p.grad is not None})
    scale = max(g.norm() for g in gradients[0].values())
    # The same parameters have one, or training in parallel would stop.
    assert gradients[1].keys() == gradients[0].keys()
    for key, gradient in gradients[0].items():
        assert (gradient - gradients[1][key]).norm() < PARITY * scale, key


@pytest.mark.compatibility("model offload")
@pytest.mark.parametrize("first", ["accelerate", "offload"])
@every_family
def test_model_offload(name: str, first: str) -> None:
    """The hook of ``enable_model_cpu_offload`` may be put on before or after, and taken off again."""
    module, inputs, expected = make(name)
    steps = {
        "offload": lambda: hugging.cpu_offload_with_hook(module, execution_device="cpu"),
        "accelerate": lambda: accelerate(module),
    }
    for step in sorted(steps, key=lambda step: step != first):
        steps[step]()
    assert relative_error(run(module, inputs), expected) < PARITY
    if first == "offload":
        hugging.hooks.remove_hook_from_module(module, recurse=True)
        assert relative_error(run(module, inputs), expected) < PARITY
    restore(module)
    assert torch.equal(run(module, inputs), expected)


@pytest.mark.compatibility("sequential offload")
@pytest.mark.parametrize("first", ["accelerate", "offload"])
@every_family
def test_sequential_offload(name: str, first: str) -> None:
    """A weight is on the meta device until its own module is called under ``enable_sequential_cpu_offload``."""
    module, inputs, expected = make(name)
    if first == "accelerate":
        accelerate(module)
    hugging.cpu_offload(module, execution_device=torch.device("cpu"))
    if first == "offload":
        accelerate(module)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert relative_error(run(module, inputs), expected) < PARITY
    restore(module)
    assert torch.equal(run(module, inputs), expected)
    hugging.hooks.remove_hook_from_module(module, recurse=True)
    assert untouched(module)


@pytest.mark.compatibility("group offload")
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("first", ["accelerate", "offload"])
@every_family
def test_group_offload(name: str, first: str, level: str, tmp_path: Any) -> None:
    """A weight lies on disk and its memory holds something else until its group is called."""
    needs_group_offload()
    module, inputs, expected = make(name)
    if first == "accelerate":
        accelerate(module)
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    module.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=level,
        offload_to_disk_path=str(tmp_path),
        **options,
    )
    if first == "offload":
        accelerate(module)
    assert relative_error(run(module, inputs), expected) < PARITY
    restore(module)
    assert torch.equal(run(module, inputs), expected)


def test_layerwise_casting_is_kept() -> None:
    """Linear layers that diffusers keeps in 8 bits and casts at each call stay so."""
    name = "Wan 2.1 text-to-video"
    module, inputs, _ = make(name)
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = run(module, inputs)
    accelerate(module)
    assert relative_error(run(module, inputs), expected) < PARITY
    assert module.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn


def add_lora(module: nn.Module) -> None:
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    module.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets))


@pytest.mark.compatibility("LoRA")
@pytest.mark.parametrize("first", ["accelerate", "LoRA"])
@every_family
def test_lora_before_and_after(name: str, first: str) -> None:
    module, inputs, plain = make(name)
    other = copy.deepcopy(module)
    add_lora(other)
    expected = run(other, inputs)
    assert relative_error(expected, plain) > 100 * PARITY
    if first == "accelerate":
        accelerate(module)
    add_lora(module)
    if first == "LoRA":
        accelerate(module)
    assert relative_error(run(module, inputs), expected) < PARITY
    module.disable_adapters()
    assert relative_error(run(module, inputs), plain) < PARITY
    restore(module)
    # Bit for bit what the host computes in the same state: its layers with an adapter that is off are not its own ones.
    other.disable_adapters()
    assert torch.equal(run(module, inputs), run(other, inputs))


@pytest.mark.compatibility("torch.compile")
@pytest.mark.slow
@every_family
def test_compiles_as_one_graph(name: str) -> None:
    """Models compile as one graph, but for Mochi's own attention, which looks at the mask's values.

    Every operator is traced by autograd's compiler in a test of its own, so one family goes through that as a whole.
    """
    module, inputs, expected = make(name)
    accelerate(module)
    torch.compiler.reset()
    backend = "aot_eager" if name.startswith("Wan") else "eager"
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert relative_error(run(compiled, inputs), expected) < PARITY


@pytest.mark.slow
def test_compiled_before_it_is_accelerated() -> None:
    """The wrapper of ``torch.compile`` is looked through, and its graphs are made anew."""
    module, inputs, expected = make("Wan 2.1 text-to-video")
    compiled = torch.compile(module, backend="eager")
    assert relative_error(run(compiled, inputs), expected) < PARITY
    report = accelerate(compiled)
    assert sum(line.count for line in report.replaced) == 6
    assert relative_error(run(compiled, inputs), expected) < PARITY
    restore(compiled)
    assert relative_error(run(compiled, inputs), expected) < PARITY


def test_fused_projections_before_and_after() -> None:
    for name in ("Wan 2.1 text-to-video", "Wan 2.1 image-to-video (CLIP)"):
        module, inputs, expected = make(name)
        accelerate(module)
        for change in (module.fuse_qkv_projections, module.unfuse_qkv_projections):
            change()
            assert relative_error(run(module, inputs), expected) < PARITY


def test_a_copy_is_a_model_of_its_own() -> None:
    module, inputs, expected = make("HunyuanVideo")
    accelerate(module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert relative_error(run(other, inputs), expected) < PARITY
    restore(other)
    assert torch.equal(run(other, inputs), expected)
    assert not untouched(module)


def test_a_chosen_attention_backend_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend chosen before is left alone and said; one chosen after is used, by diffusers' own processor."""
    module, inputs, expected = make("Wan 2.1 text-to-video")
    for block in module.blocks:
        block.attn1.set_attention_backend("native")
    report = accelerate(module, norms=False)
    (line,) = (line for line in report.left if "backend" in line.text)
    assert (line.count, line.text) == (2, "the attention backend native was chosen for it")
    restore(module)
    for block in module.blocks:
        block.attn1.processor._attention_backend = None
    accelerate(module)
    seen = []
    original = type(module.blocks[0].attn1.processor.original)
    inner = original.__call__
    monkeypatch.setattr(
        original, "__call__", lambda self, *a, **k: (seen.append(self._attention_backend), inner(self, *a, **k))[1]
    )
    module.set_attention_backend("native")
    assert relative_error(run(module, inputs), expected) < PARITY
    assert [backend.value for backend in seen] == ["native"] * 4
    module.reset_attention_backend()
    seen.clear()
    run(module, inputs)
    assert not seen


def test_masks_that_are_not_padding_stop() -> None:
    module, inputs, _ = make("Mochi")
    accelerate(module)
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
    with pytest.raises(RuntimeError, match="attention_mask: expected padding after the text only"):
        run(module, inputs)


def test_text_without_any_token_counts_as_diffusers_has_it() -> None:
    module, inputs, _ = make("LTX-Video")
    inputs["encoder_attention_mask"][1] = 0
    expected = run(module, inputs)
    accelerate(module)
    # Logits of -10000 and something have lost 13 bits of that something upstream.
    assert relative_error(run(module, inputs), expected) < 10 * PARITY


@pytest.mark.parametrize("host", [host for host, recipe in RECIPES.items()])
def test_changed_internals_are_named_and_nothing_is_patched(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute that a replacement reads is named where the last module of its kind lacks it.

    Other parameters are named too.
    """
    recipe = RECIPES[host]
    name = next(n for n, model in MODELS.items() if any(kind(m) == host for m in model.make(HEAD_DIM[n]).modules()))
    module, inputs, expected = make(name)
    target = [m for m in module.modules() if kind(m) == host][-1]
    for need in recipe.needs(target) if callable(recipe.needs) else recipe.needs:
        *path, last = need.split(".")
        owner = target.get_submodule(".".join(path))
        if last in owner.__dict__ or last in {**owner._modules, **owner._parameters}:
            value = getattr(owner, last)
            delattr(owner, last)
            with pytest.raises(HostChanged, match=rf"diffusers .* no attribute '{need}'; nothing was changed"):
                accelerate(module)
            setattr(owner, last, value)
            assert untouched(module)
    assert torch.equal(run(module, inputs), expected)
    if recipe.processor is None:
        cls, method = type(target), "forward"
    else:
        cls, method = type(target.processor), "__call__"
    original = getattr(cls, method)

    def more(self, *args, new_option, **kwargs):  # type: ignore[no-untyped-def]
        return original(self, *args, **kwargs)

    more.__module__ = original.__module__  # the host's own code, in another version
    monkeypatch.setattr(cls, method, more)
    with pytest.raises(HostChanged, match=f"no parameter '{recipe.parameters[0]}'"):
        accelerate(module)
    assert untouched(module)


def test_a_failure_midway_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, expected = make("Wan 2.1 text-to-video")
    last = module.blocks[1].attn2

    def refuse(processor: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(last, "set_processor", refuse, raising=False)
    with pytest.raises(OSError, match="no"):
        accelerate(module)
    monkeypatch.undo()
    assert untouched(module)
    assert torch.equal(run(module, inputs), expected)


def test_what_others_replaced_is_left_and_named() -> None:
    module, _, _ = make("Wan 2.1 text-to-video")
    module.blocks[0].forward = lambda *a, **k: a[0]
    report = accelerate(module)
    assert any("blocks.0" in x.component and x.text == "its forward has been replaced already" for x in report.left)
    theirs = wan.WanProcessor(None)
    module.blocks[1].attn1.set_processor(theirs)
    left = restore(module).left
    assert [line.component.split(".", 1)[1] for line in left] == ["blocks.1.attn1"]
    assert module.blocks[1].attn1.processor is theirs


def test_unknown_modules_are_named_and_left() -> None:
    report = accelerate(nn.Linear(2, 3))
    assert not report.replaced
    assert str(report).split()[-5:] == ["left", "Linear", "Linear", "not", "known"]
    with pytest.raises(TypeError, match="pipe_or_module: expected a diffusers pipeline or a torch module, got str"):
        accelerate("Wan")
    with pytest.raises(TypeError, match="pipe_or_module"):
        restore(None)


def test_dry_run_changes_nothing() -> None:
    module, inputs, expected = make("CogVideoX")
    report = accelerate(module, dry_run=True)
    assert "would replace" in str(report)
    assert sum(line.count for line in report.replaced) == 4
    assert untouched(module)
    assert torch.equal(run(module, inputs), expected)
    accelerate(module)
    again = accelerate(module, dry_run=True)
    assert [line.text for line in again.left] == ["accelerated already"]
    assert not untouched(module)
