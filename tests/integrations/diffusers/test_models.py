"""diffusers' video models on our operators: the same pictures, all or nothing, with hooks, with LoRA, and back."""

from __future__ import annotations

import copy
import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import accelerate as hugging
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from swifti2v_kernels.integrations import norms
from swifti2v_kernels.integrations.diffusers import HostChanged, accelerate, cross, joint, restore
from tests.support import diffusers_models
from tests.support.diffusers_models import HEAD_DIM, MODELS, needs_group_offload, run
from tests.support.tolerances import PARITY, relative_error

RECIPES = {recipe.host: recipe for recipe in cross.RECIPES + joint.RECIPES}
#: One of each family, for what does not depend on the variant.
FAMILIES = ["Wan 2.1 image-to-video (CLIP)", "HunyuanVideo", "LTX-Video", "CogVideoX"]
every_model = pytest.mark.parametrize("name", MODELS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def make(name: str) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """Returns a model, its inputs, and what diffusers' own code computes."""
    module, inputs = diffusers_models.make(name)
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
    """Returns whether the forward of ``part`` is one of our replacements."""
    function = getattr(part.__dict__.get("forward"), "__func__", None)
    return "swifti2v" in getattr(function, "__module__", "")


def untouched(module: nn.Module) -> bool:
    return not any(ours(part) for part in module.modules())


@pytest.mark.compatibility("attention", "norms", "restore")
@every_model
def test_same_output_and_restored_bit_for_bit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every attention and layer is replaced; alone or together the output stays; nothing of ours is left afterwards.

    Inputs are not overwritten: every run is given the same ones.
    """
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


def model_offload(module: nn.Module, folder: str) -> None:
    hugging.cpu_offload_with_hook(module, execution_device="cpu")


def sequential_offload(module: nn.Module, folder: str) -> None:
    """Puts every weight on the meta device until its own module is called."""
    hugging.cpu_offload(module, execution_device=torch.device("cpu"))
    assert {p.device.type for p in module.parameters()} == {"meta"}


def group_offload(module: nn.Module, folder: str, **level: Any) -> None:
    """Puts the weights on disk; their memory holds something else until their group is called."""
    needs_group_offload()
    cpu = torch.device("cpu")
    module.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_to_disk_path=folder, **level)


OFFLOADS = {
    "model": (model_offload, "model offload"),
    "sequential": (sequential_offload, "sequential offload"),
    "leaves": (partial(group_offload, offload_type="leaf_level"), "group offload"),
    "blocks": (partial(group_offload, offload_type="block_level", num_blocks_per_group=1), "group offload"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.compatibility(OFFLOADS[kind][1])) for kind in OFFLOADS]
)
@pytest.mark.parametrize("first", ["accelerate", "offload"])
@every_family
def test_offloading_before_and_after(name: str, first: str, kind: str, tmp_path: Path) -> None:
    """Hooks that bring the weights may be put on before or after, and those of accelerate taken off again."""
    module, inputs, expected = make(name)
    steps = [lambda: OFFLOADS[kind][0](module, str(tmp_path)), lambda: accelerate(module)]
    for step in steps if first == "offload" else reversed(steps):
        step()
    assert relative_error(run(module, inputs), expected) < PARITY
    if first == "offload" and kind in ("model", "sequential"):
        hugging.hooks.remove_hook_from_module(module, recurse=True)
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
    """Models compile as one graph.

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
    for change in (lambda model: None, accelerate, restore):
        change(compiled)
        assert untouched(module) == (change is not accelerate)
        assert relative_error(run(compiled, inputs), expected) < PARITY


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


def test_masks_that_are_not_padding_stop() -> None:
    module, inputs, _ = make("LTX-Video")
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


@pytest.mark.parametrize("host", RECIPES)
def test_changed_internals_are_named_and_nothing_is_patched(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute that a replacement reads is named where the last module of its kind lacks it.

    Other parameters are named too.
    """
    recipe = RECIPES[host]
    name = next(n for n, model in MODELS.items() if any(kind(m) == host for m in model.make(HEAD_DIM[n]).modules()))
    module, inputs, expected = make(name)
    target = [m for m in module.modules() if kind(m) == host][-1]
    for need in recipe.needs:
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
    cls, method = (type(target.processor), "__call__") if recipe.processor else (type(target), "forward")
    original = getattr(cls, method)

    def more(self, *args, new_option, **kwargs):  # type: ignore[no-untyped-def]
        return original(self, *args, **kwargs)

    more.__module__ = original.__module__  # the host's own code, in another version
    monkeypatch.setattr(cls, method, more)
    with pytest.raises(HostChanged, match=r"a parameter 'new_option' in its .* that is not known"):
        accelerate(module)
    assert untouched(module)


@pytest.mark.parametrize("lost", ["attention_kwargs", "image_rotary_emb"])
def test_a_host_may_lack_options_at_the_end_alone(lost: str) -> None:
    """An option that a version does not have yet is never given; without one in between, others take its place."""
    module, _, _ = make("CogVideoX")
    recipe = RECIPES["CogVideoXBlock"]
    block = module.transformer_blocks[0]
    signature = inspect.signature(type(block).forward)

    def forward(*args: Any, **kwargs: Any) -> None:
        """Has the host's signature without the option."""

    left = [p for p in signature.parameters.values() if p.name != lost]
    forward.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    block.__class__ = type("CogVideoXBlock", (type(block),), {"forward": forward})
    assert recipe.unlike(block) == (None if lost == "attention_kwargs" else f"no parameter {lost!r} in its forward")


def test_what_others_replaced_is_left_and_named() -> None:
    module, _, _ = make("Wan 2.1 text-to-video")
    module.blocks[0].forward = lambda *a, **k: a[0]
    report = accelerate(module)
    assert any("blocks.0" in x.component and x.text == "its forward has been replaced already" for x in report.left)
    module.blocks[1].attn1.forward = theirs = lambda *a, **k: a[0]
    assert [line.component for line in restore(module).left] == ["WanTransformer3DModel.blocks.1.attn1"]
    assert module.blocks[1].attn1.forward is theirs


def test_unknown_modules_are_named_and_left() -> None:
    report = accelerate(nn.Linear(2, 3))
    assert not report.replaced
    assert str(report).split()[-5:] == ["left", "Linear", "Linear", "not", "known"]
    with pytest.raises(TypeError, match="pipe_or_module: expected a torch module, or an object that"):
        accelerate("Wan")
    with pytest.raises(TypeError, match="model: expected a torch module"):
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
    assert {line.text for line in again.left} == {"its forward has been replaced already"}
    assert not untouched(module)


# Precision

#: Roundings are other ones in other places, so one model's errors scatter around the host's: within 8 % of it where
#: this was looked at.
RATIO = 1.15
#: What pipelines keep in float32.
WIDE = ("timestep", "image_rotary_emb")


def narrow(name: str, value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.bfloat16() if floating and name not in WIDE else value


@every_model
def test_as_near_to_float32_as_the_host_is(name: str) -> None:
    module, inputs, exact = make(name)
    module = module.to(torch.bfloat16)
    inputs = {key: narrow(key, value) for key, value in inputs.items()}
    theirs = run(module, inputs)
    accelerate(module)
    ours = run(module, inputs)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert relative_error(ours, exact) < RATIO * relative_error(theirs, exact)


@every_model
def test_under_autocast_dtypes_and_values_are_the_hosts(name: str) -> None:
    """float32 weights, as LoRAs are trained: every output that a layer hands on has the host's dtype too."""
    module, inputs, exact = make(name)
    theirs, their_dtypes = _autocast(module, inputs)
    accelerate(module)
    ours, our_dtypes = _autocast(module, inputs)
    assert our_dtypes == their_dtypes
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert relative_error(ours, exact) < RATIO * relative_error(theirs, exact)


def _autocast(module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """Returns a model's sample under autocast, and the dtypes that its layers return."""
    dtypes: list[Any] = []
    layers = [part for part in module.modules() if type(part).__name__.endswith("Block")]
    hooks = [
        layer.register_forward_hook(lambda layer, args, out: dtypes.append(tree_map(lambda x: x.dtype, out)))
        for layer in layers
    ]
    with torch.autocast("cpu", torch.bfloat16):
        sample = run(module, inputs)
    for hook in hooks:
        hook.remove()
    assert len(dtypes) >= len(layers) > 0
    return sample, dtypes


# Memory: what computes in parts or row by row, to be smaller, gives the same wherever it is cut


@every_model
def test_feed_forwards_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 7 tokens give the same: the last one is shorter, and batch entries are parts of their own."""
    monkeypatch.setattr(norms, "PART_TOKENS", 7)
    module, inputs, expected = make(name)
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
