"""diffusers models whose modules others watch, cache, replace or subclass: their code runs as on diffusers' own."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers import transformer_wan
from peft import LoraConfig
from torch import Tensor, nn

from swifti2v_kernels.integrations.diffusers import accelerate, restore
from tests.integrations.diffusers.test_models import every_family, untouched
from tests.support.diffusers_models import MODELS, make, run
from tests.support.tolerances import PARITY, relative_error

WAN = "Wan 2.1 text-to-video"


def in_blocks(module: nn.Module, *parts: str) -> list[nn.Module]:
    """Returns the modules of the layers whose names begin with one of ``parts``."""
    found = [(path.split("."), m) for path, m in module.named_modules() if "blocks." in path and "refiner" not in path]
    return [m for path, m in found if path[-1].startswith(parts)]


def changed(_: nn.Module, args: Any, out: Any) -> Any:
    """A forward hook under which it matters that it ran, and on which tokens."""
    if isinstance(out, tuple):
        return (changed(_, args, out[0]), *out[1:])
    # Where the heads of [B, L, H, D] stand is the host's own business, and differs between its versions.
    return 1.1 * out - (0.1 * out.mean(dim=1, keepdim=True) if out.ndim == 3 else 0.0)


@pytest.mark.parametrize(
    "parts", [("norm",), ("to_", "add_"), ("ff", "proj_", "act_")], ids=["norms", "attention", "ff"]
)
@every_family
def test_hooks_of_torch_run(name: str, parts: tuple[str, ...]) -> None:
    """Hooks on all norms, all projections, or all of the feed-forwards run; those on projections mix tokens.

    The calls of the modules around them are handed back with that reason.
    """
    module, inputs = make(name)
    plain = run(module, inputs)
    for part in in_blocks(module, *parts):
        part.register_forward_hook(changed)
    expected = run(module, inputs)
    assert relative_error(expected, plain) > 100 * PARITY
    report = accelerate(module)
    assert relative_error(run(module, inputs), expected) < 2 * PARITY
    assert "a hook on a layer inside" in {line.text.split(": ")[-1] for _, line in report.outcomes()}


@every_family
def test_what_attention_and_layers_return_and_are_given_is_not_overwritten(name: str) -> None:
    """Nothing that a cache on attention modules and layers could keep between steps is overwritten."""
    module, inputs = make(name)
    accelerate(module)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: Any, options: Any, out: Any) -> None:
        outs = out if isinstance(out, tuple) else (out,)
        kept.extend((x, x.clone()) for x in (*args, *options.values(), *outs) if isinstance(x, Tensor))

    for part in in_blocks(module, "attn", *"0123"):
        part.register_forward_hook(keep, with_kwargs=True)
    run(module, inputs)
    assert len(kept) > 20
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("Wan")])
def test_other_norms_in_a_wan_block(name: str) -> None:
    """Trained copies that PEFT puts in the norm's place, and a norm of another kind, are called."""
    module, inputs = make(name)
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["norm2"]))
    with torch.no_grad():
        for block in module.blocks:
            block.norm2.modules_to_save["default"].weight.add_(0.5)
    module.blocks[0].norm1 = nn.RMSNorm(module.blocks[0].attn1.inner_dim, eps=1e-6)
    expected = run(module, inputs)
    accelerate(module)
    assert relative_error(run(module, inputs), expected) < PARITY


def test_one_model_under_two_names_is_patched_once_and_keeps_its_hooks() -> None:
    module, inputs = make(WAN)
    expected = run(module, inputs)
    calls = []

    class Watch(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    for block in module.blocks:
        add_hook_to_module(block, Watch())
    pipe = diffusers.WanPipeline(None, None, vae=None, scheduler=None, transformer=module, transformer_2=module)
    report = accelerate(pipe)
    text = "the same modules as in transformer"
    assert {(x.component, x.text) for x in report.left} == {("transformer_2", text)}
    for _ in range(2):
        calls.clear()
        assert relative_error(run(module, inputs), expected) < PARITY
        assert calls == list(module.blocks)
        restore(pipe)


def mine(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    return hidden_states + 0.5 * self.attn1(hidden_states, None, None, rotary_emb)


@pytest.mark.parametrize("way", ["class", "same name", "subclass"])
def test_other_peoples_code_is_left_and_named(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward put into diffusers' class, a class of the same name from elsewhere and a subclass are left, named."""
    module, inputs = make(WAN)
    host = transformer_wan.WanTransformerBlock
    if way == "class":
        monkeypatch.setattr(host, "forward", mine)
        text = f"not the code of diffusers: it comes from {__name__}"
    else:
        name = host.__name__ if way == "same name" else "MyBlock"
        kind = type(name, (host,), {"forward": mine, "__module__": __name__})
        for block in module.blocks:
            block.__class__ = kind
        text = "not known" if way == "subclass" else f"not the code of diffusers: it comes from {__name__}"
    expected = run(module, inputs)
    report = accelerate(module)
    assert [(x.count, x.text) for x in report.left] == [(2, text)]
    assert [x.host for x in report.replaced] == ["WanAttnProcessor"]
    assert relative_error(run(module, inputs), expected) < PARITY


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the attention backends of the calls that diffusers' own processor computes."""
    seen: list[Any] = []
    inner = transformer_wan.WanAttnProcessor.__call__

    @functools.wraps(inner)
    def call(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(self._attention_backend)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(transformer_wan.WanAttnProcessor, "__call__", call)
    return seen


def test_an_attention_backend_that_is_active_for_all(computed: list[Any]) -> None:
    """diffusers' processors compute within ``attention_backend(...)``, and a model is not accelerated there at all."""
    module, inputs = make(WAN)
    expected = run(module, inputs)
    accelerate(module)
    computed.clear()
    with attention_backend("_native_math"):
        assert relative_error(run(module, inputs), expected) < PARITY
        assert computed == [None] * 4
        restore(module)
        report = accelerate(module, norms=False)
        assert {x.text for x in report.left if x.host == "WanAttnProcessor"} == {
            "the attention backend _native_math is active"
        }


def test_a_chosen_attention_backend_is_respected(computed: list[Any]) -> None:
    """A backend chosen before is left alone and said; one chosen after is used by diffusers' own processor."""
    module, inputs = make(WAN)
    expected = run(module, inputs)
    for block in module.blocks:
        block.attn1.set_attention_backend("native")
    (line,) = (line for line in accelerate(module, norms=False).left if "backend" in line.text)
    assert (line.count, line.text) == (2, "the attention backend native was chosen for it")
    module.reset_attention_backend()
    accelerate(module)
    computed.clear()
    module.set_attention_backend("native")
    assert relative_error(run(module, inputs), expected) < PARITY
    assert [backend.value for backend in computed] == ["native"] * 4


def test_projections_that_diffusers_fuses_in_between() -> None:
    """Attention with diffusers' processors for fused projections is its own until they are taken out again."""
    module, inputs = make("CogVideoX")
    expected = run(module, inputs)
    report = accelerate(module)
    module.fuse_qkv_projections()
    assert relative_error(run(module, inputs), expected) < PARITY
    assert "2 calls: it has another processor, FusedCogVideoXAttnProcessor2_0" in str(report)
    module.unfuse_qkv_projections()
    run(module, inputs)
    assert ("served", "2 calls") in {(verb, line.text) for verb, line in report.outcomes()}
    assert not restore(module).left
    assert untouched(module)
    assert torch.equal(run(module, inputs), expected)


def test_a_processor_of_the_same_name_that_is_set_afterwards_computes() -> None:
    class WanAttnProcessor(transformer_wan.WanAttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().__call__(*args, **kwargs)

    (module, inputs), (theirs, _) = make(WAN), make(WAN)
    report = accelerate(module)
    for model in (module, theirs):
        model.blocks[0].attn1.set_processor(WanAttnProcessor())
    assert relative_error(run(module, inputs), run(theirs, inputs)) < PARITY
    assert f"1 call: it has another processor, WanAttnProcessor of {__name__}" in str(report)


def test_pickling_is_refused_with_a_reason_and_states_are_not(tmp_path: Any) -> None:
    module, inputs = make(WAN)
    expected = run(module, inputs)
    accelerate(module)
    with pytest.raises(TypeError, match=r"cannot be pickled: restore\(\) it first, or save its state_dict\(\)"):
        pickle.dumps(module)
    module.save_pretrained(tmp_path)
    again = type(module).from_pretrained(tmp_path)
    assert torch.equal(run(again, inputs), expected)
    restore(module)
    assert torch.equal(run(pickle.loads(pickle.dumps(module)), inputs), expected)
