"""LoRAs that are merged into a model or as a checkpoint is read: their numbers, and how they are rounded."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from model import InputError, LoRA, WanDiT, load_dit, merge_loras
from model.weights.load import inspect_weights
from model.weights.lora_files import open_lora
from tests.model.dit.test_model import saved_diffusers_dit
from tests.support.lora_spellings import ATTENTION, MODULES, agrees, factors, saved, spelled
from tests.support.original_names import float8_with_scales, original_dit
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
        assert inspect_weights(path, WanDiT, loras).config == whole.config


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
    with pytest.raises(InputError, match="is for the second expert"):
        open_lora(saved(tmp_path / "second.safetensors", second))
