"""LoRAs that are merged, merged as a checkpoint is read, or applied and taken off; and files that are no LoRAs."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file

from model import InputError, LoRA, SegmentPlan, WanDiT, apply_loras, load_dit, merge_loras, sample_latents
from model.csg.schedule import flow_sigmas
from model.weights.load import inspect_dit, random_weights
from model.weights.lora_files import open_lora
from tests.conftest import TINY_DIT
from tests.model.dit.test_model import saved_diffusers_dit
from tests.support.lora_spellings import ATTENTION, MODULES, OUTER, agrees, factors, same, saved, spelled, state_of
from tests.support.original_names import float8_with_scales, original_dit, original_module
from tests.support.tolerances import OPERATOR, relative_error


def five(tmp_path, dit):
    """Returns five LoRAs on the same modules, and their sum in float64."""
    loras, total = [], {}
    for i in range(5):
        pairs = factors(dit, MODULES, rank=i + 1, seed=i)
        strength = 0.02 * (i + 1)
        loras.append(LoRA(saved(tmp_path / f"{i}.safetensors", spelled(pairs)), strength))
        for module, (down, up) in pairs.items():
            name = f"{module}.weight"
            total[name] = total.get(name, 0) + strength * (up.double() @ down.double())
    return loras, total


def is_rounded_once(state, exact, dtype):
    """Returns whether all numbers are within half a step of the dtype of the exact ones, but for sums in float32."""
    half = torch.finfo(dtype).eps / 2
    return all(
        bool(((state[name].double() - value).abs() <= half * 1.001 * value.abs() + 1e-6).all())
        for name, value in exact.items()
    )


def test_many_loras_in_any_order_are_rounded_once(tmp_path):
    """Five LoRAs are rounded once, in any order; one after another into bfloat16 they would be rounded five times."""
    saved_diffusers_dit(tmp_path / "dit")
    half = load_dit(tmp_path / "dit", dtype=torch.bfloat16)
    loras, total = five(tmp_path, half)
    exact = {name: half.get_parameter(name).double() + addition for name, addition in total.items()}
    one_by_one = load_dit(tmp_path / "dit", dtype=torch.bfloat16)
    for lora in loras:
        merge_loras(one_by_one, [lora])
    merge_loras(half, loras)
    assert half.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16
    assert is_rounded_once(half.state_dict(), exact, torch.bfloat16)
    assert not is_rounded_once(one_by_one.state_dict(), exact, torch.bfloat16)
    forth, back = load_dit(tmp_path / "dit", loras=loras), load_dit(tmp_path / "dit", loras=loras[::-1])
    for name in total:
        assert relative_error(forth.state_dict()[name], back.state_dict()[name]) < OPERATOR["float32"]


def test_loading_with_loras_keeps_the_precision_of_the_file(tmp_path):
    """A file in float32 or scaled float8 is rounded to bfloat16 once, LoRAs included; tables stay float32."""
    saved_diffusers_dit(tmp_path / "dit")
    whole = load_dit(tmp_path / "dit")
    loras, total = five(tmp_path, whole)
    table, path = torch.full((1, 2, 48), 1e-4), tmp_path / "table.safetensors"
    loras.append(LoRA(saved(path, {"diffusion_model.head.diff_m": table}), 0.5))
    stored, meant = float8_with_scales(original_dit(whole.state_dict()))
    saved(tmp_path / "float8" / "wan.safetensors", stored)
    (tmp_path / "float8" / "config.json").write_text(json.dumps({"num_heads": 2}))
    eighth = load_dit(tmp_path / "float8").state_dict()
    assert original_dit(eighth).keys() == meant.keys()
    for path, base in ((tmp_path / "dit", whole.state_dict()), (tmp_path / "float8", eighth)):
        half = load_dit(path, dtype=torch.bfloat16, loras=loras)
        exact = {name: base[name].double() + addition for name, addition in total.items()}
        assert is_rounded_once(half.state_dict(), exact, torch.bfloat16)
        assert half.scale_shift_table.dtype == torch.float32
        assert torch.equal(half.scale_shift_table, base["scale_shift_table"] + 0.5 * table)
        assert inspect_dit(path, loras) == whole.config


def test_a_strength_of_zero_changes_nothing(tmp_path, tiny_dit):
    before = state_of(tiny_dit)
    file = saved(tmp_path / "lora.safetensors", spelled(factors(tiny_dit, MODULES)))
    merge_loras(tiny_dit, [LoRA(file, 0.0)])
    assert same(before, tiny_dit)


TEXT = torch.linspace(-1, 1, 7 * 16).view(1, 7, 16)


def sampled(dit):
    """Samples a clip of five blocks: windows, workspaces, steps."""
    torch.manual_seed(1)
    clip = torch.randn(1, 4, 5, 4, 6)
    for _ in sample_latents(dit, clip, TEXT, plan=SegmentPlan(5, 2), sigmas=flow_sigmas(2, 5.0), seed=3):
        pass
    return clip


@pytest.mark.parametrize("module", [*MODULES[:1], "blocks.1.ffn.net.2", "blocks.0.attn2.to_k", *OUTER])
def test_applied_loras_are_in_every_path_of_a_step_and_come_off_bit_for_bit(module, tmp_path):
    """Applied LoRAs change every path of a step, fused matmuls too, and come off bit for bit; weights do not move."""
    dit, merged = (random_weights(WanDiT, TINY_DIT, 1) for _ in range(2))
    before, places = state_of(dit), [parameter.data_ptr() for parameter in dit.parameters()]
    file = saved(tmp_path / "lora.safetensors", spelled(factors(dit, [module])))
    plain = sampled(dit)
    merge_loras(merged, [LoRA(file, 0.5)])
    applied = apply_loras(dit, [LoRA(file, 0.5)])
    assert torch.equal(sampled(dit), sampled(merged))
    assert not torch.equal(sampled(dit), plain)
    applied.remove()
    assert same(before, dit)
    assert torch.equal(sampled(dit), plain)
    assert [parameter.data_ptr() for parameter in dit.parameters()] == places


def test_strengths_of_applied_loras_change_from_the_weights_as_they_were(tmp_path):
    """Strengths changed again and again, in bfloat16, give what one merge with the last strengths gives."""
    saved_diffusers_dit(tmp_path / "dit")
    dit = load_dit(tmp_path / "dit", dtype=torch.bfloat16)
    before = state_of(dit)
    files = [saved(tmp_path / f"{i}.safetensors", spelled(factors(dit, MODULES, seed=i))) for i in range(2)]
    with apply_loras(dit, [LoRA(files[0]), LoRA(files[1], 0.3)]) as applied:
        assert applied.strengths == (1.0, 0.3)
        for strengths in ((0.9, 2.0), (0.0, -1.0), (0.25, 0.5)):
            applied.set_strengths(strengths)
            merged = load_dit(tmp_path / "dit", dtype=torch.bfloat16)
            merge_loras(merged, [LoRA(file, strength) for file, strength in zip(files, strengths, strict=True)])
            assert same(merged.state_dict(), dit)
        with pytest.raises(InputError, match="strengths: expected 2, one for each LoRA, got 1"):
            applied.set_strengths([1.0])
        with pytest.raises(InputError, match="strength: expected a finite number, got nan"):
            applied.set_strengths([1.0, math.nan])
        for again in (merge_loras, apply_loras):
            with pytest.raises(InputError, match="some are applied to this model already"):
                again(dit, [LoRA(files[0])])
    assert same(before, dit)
    for call in (applied.remove, lambda: applied.set_strengths([1.0, 1.0])):
        with pytest.raises(InputError, match="these have been removed from the model"):
            call()
    merge_loras(dit, [LoRA(files[0])])
    assert not same(before, dit)


def test_applied_loras_come_off_when_the_work_fails(tmp_path, tiny_dit, monkeypatch):
    """Applied LoRAs come off after an error in the ``with`` body, and after one while they are put on."""
    before = state_of(tiny_dit)
    file = saved(tmp_path / "lora.safetensors", spelled(factors(tiny_dit, MODULES)))
    with pytest.raises(KeyError), apply_loras(tiny_dit, [LoRA(file)]):
        raise KeyError
    assert same(before, tiny_dit)
    calls = []

    def failing(self, name, total, dtype, strengths=None):
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError
        return total.add_(1)

    monkeypatch.setattr("model.weights.lora.LoRASet.add_to", failing)
    with pytest.raises(MemoryError):
        apply_loras(tiny_dit, [LoRA(file)])
    assert same(before, tiny_dit)


def test_of_a_file_for_both_experts_the_chosen_ones_tensors_are_used(tmp_path):
    """The chosen expert's tensors are used, as diffusers saves them: under the expert's name, with its own alpha."""
    configs = [LoraConfig(r=4, lora_alpha=alpha, target_modules=ATTENTION, init_lora_weights=False) for alpha in (2, 7)]
    experts, layers, state, metadata = [], [], {}, {}
    for i, config in enumerate(configs):
        experts.append(saved_diffusers_dit(tmp_path / f"dit{i}"))
        experts[i].add_adapter(config)
        experts[i].save_lora_adapter(tmp_path / f"lora{i}")
        layers.append(load_file(*(tmp_path / f"lora{i}").iterdir()))
        name = ("transformer", "transformer_2")[i]
        state |= {f"{name}.{key}": tensor for key, tensor in layers[i].items()}
        metadata |= {f"{name}.lora_alpha": config.lora_alpha, f"{name}.r": config.r}
    saved(tmp_path / "both" / "lora.safetensors", state, {"lora_adapter_metadata": json.dumps(metadata)})
    for i in range(2):
        ours = load_dit(tmp_path / f"dit{i}", loras=[LoRA(tmp_path / "both", expert=i + 1)])
        assert agrees(ours, experts[i])
        assert open_lora(tmp_path / "both", i + 1).left_out == len(layers[1 - i])
    second = {f"transformer_2.{key}": tensor for key, tensor in layers[1].items()}
    file = saved(tmp_path / "second.safetensors", second)
    with pytest.raises(InputError, match="is for the second expert"):
        open_lora(file)
    with pytest.raises(InputError, match="expert: expected 1 or 2, got 3"):
        LoRA(file, expert=3)


REFUSED = {
    "LoHa": (LoHaConfig(r=4, target_modules=["to_q"]), "is LoHa"),
    "DoRA": (LoraConfig(r=4, target_modules=["to_q"], use_dora=True), "is DoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_of_another_kind_are_refused_by_name(kind, tmp_path):
    """Other kinds of adapters, as PEFT saves them, are refused by name."""
    saved_diffusers_dit(tmp_path / "dit")
    config, message = REFUSED[kind]
    get_peft_model(WanTransformer3DModel.from_pretrained(tmp_path / "dit"), config).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(InputError, match=message):
        load_dit(tmp_path / "dit", loras=[LoRA(tmp_path / "adapter")])


def test_wrong_lora_files_are_explained(tmp_path, tiny_dit):
    def refused(path, message):
        with pytest.raises(InputError, match=message):
            merge_loras(tiny_dit, [LoRA(path)])

    refused(tmp_path / "nowhere.safetensors", "lora: .*nowhere.safetensors does not exist")
    refused(tmp_path, r"lora: expected one LoRA in .*, found none; name a file")
    pair = spelled(factors(tiny_dit, MODULES[:1]))
    saved(tmp_path / "a.safetensors", pair)
    saved(tmp_path / "b.safetensors", pair)
    refused(tmp_path, r"found a.safetensors, b.safetensors; name a file")
    dit = saved(tmp_path / "dit.safetensors", tiny_dit.state_dict())
    refused(dit, r"dit.safetensors holds no LoRA; its tensors are named like ")
    two = saved(
        tmp_path / "two.safetensors", {key.replace("A.w", "A.x.w"): value for key, value in pair.items()} | pair
    )
    refused(two, r"holds several adapters \(.*lora_A.*, .*lora_A.*\); expected one a file")
    names = saved(tmp_path / "names.safetensors", pair | spelled(factors(tiny_dit, MODULES[:1]), name=original_module))
    refused(names, r"holds several adapters \(\S*(attn1.to_|self_attn.)q.lora_B.weight, .*\); expected one a file")
    alpha = saved(tmp_path / "alpha.safetensors", {**pair, f"{MODULES[0]}.alpha": torch.ones(2)})
    refused(alpha, rf"{re.escape(MODULES[0])}.alpha: expected one number, got \[2\]")
    lokr = saved(tmp_path / "lokr.safetensors", {f"{MODULES[0]}.lokr_w1": torch.ones(2, 2)})
    refused(lokr, r"is LoKr \(.*lokr_w1\), which cannot be merged as a LoRA; expected a LoRA")
    config = tmp_path / "peft" / "adapter_config.json"
    peft = saved(tmp_path / "peft" / "adapter_model.safetensors", pair)
    config.write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    refused(peft, rf"{re.escape(MODULES[0])} has rank 3, but adapter_config.json says 8: it describes another file")
    config.write_text(json.dumps({"peft_type": "ADALORA"}))
    refused(peft, r"is ADALORA \(adapter_config.json\)")
    config.write_text(json.dumps({"r": 3, "lora_alpha": 3, "use_dora": True}))
    refused(peft, r"is DoRA \(adapter_config.json\)")
    for values in ({"r": 3, "lora_alpha": "much"}, {"r": 3, "alpha_pattern": {"(": 1}}, {"r": 3, "rank_pattern": [1]}):
        config.write_text(json.dumps(values))
        refused(peft, "adapter_config.json is not understood")
    header = saved(tmp_path / "header.safetensors", pair, {"lora_adapter_metadata": "["})
    refused(header, "its lora_adapter_metadata is not readable JSON")
