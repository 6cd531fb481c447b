"""LoRA files in all spellings equal diffusers' own merging or one that is written out.

diffusers passes over what it has no place for (differences of norms and of modulation tables). Here all of a file is
merged, or the keys that cannot be are named.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from model import LoRA, WanDiT, load_dit, merge_loras
from model.weights.load import random_weights
from tests.conftest import TINY_DIT
from tests.model.dit.test_model import saved_diffusers_dit
from tests.support.lora_spellings import (
    ATTENTION,
    I2V,
    MODULES,
    OUTER,
    agrees,
    factors,
    kohya,
    lightx2v,
    product,
    same,
    saved,
    spelled,
    state_of,
)
from tests.support.original_names import original_module
from tests.support.tolerances import OPERATOR, relative_error

CONFIGS = {
    "alpha": LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, init_lora_weights=False),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=[*ATTENTION, "net.0.proj", "proj_out", "patch_embedding", "add_k_proj", "linear_1"],
        # PEFT takes a pattern for the end of a name, from a dot on: "q" and "n2.to_v" are no layers of their own.
        rank_pattern={"q": 5, "blocks.1.attn1.to_q": 6, "proj_out": 2},
        alpha_pattern={
            "v": 40,
            "n2.to_v": 50,
            "attn2.to_k": 7,
            "to_k": 60,
            r"blocks\.\d\.attn1\.to_v": 1,
            r"(?:blocks\.)?1\.attn2\.to_out\.[0-9]+": 9,
            r".*?ffn.*0\.proj": 8,
        },
        init_lora_weights=False,
    ),
    "rslora": LoraConfig(
        r=4, lora_alpha=2, target_modules=ATTENTION, use_rslora=True, lora_bias=True, init_lora_weights=False
    ),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("writer", ["diffusers model", "diffusers pipeline", "peft"])
def test_peft_adapters_equal_the_model_that_they_were_saved_from(writer, config, tmp_path):
    """PEFT adapters equal their model, with alpha in the header (diffusers) or in adapter_config.json (PEFT)."""
    theirs = saved_diffusers_dit(tmp_path / "dit", **I2V)
    path = tmp_path / "lora"
    if writer == "peft":
        theirs = get_peft_model(theirs, CONFIGS[config])
        theirs.save_pretrained(path)
        assert (path / "adapter_config.json").exists()
    else:
        theirs.add_adapter(CONFIGS[config])
        theirs.save_lora_adapter(path)
    if writer == "diffusers pipeline":
        (file,) = path.iterdir()
        layers, metadata = load_file(file), theirs.peft_config["default"].to_dict()
        file.unlink()
        WanPipeline.save_lora_weights(path, layers, transformer_lora_adapter_metadata=metadata)
        assert all(key.startswith("transformer.") for key in load_file(*path.iterdir()))
    ours = load_dit(tmp_path / "dit")
    before = state_of(ours)
    assert not agrees(ours, theirs)
    merge_loras(ours, [LoRA(path)])
    assert agrees(ours, theirs)
    assert not same(before, ours)
    assert same(ours.state_dict(), load_dit(tmp_path / "dit", loras=[LoRA(path)]))


def test_several_at_once_with_strengths_equal_diffusers_fusing_them(tmp_path):
    """A T2V LoRA with alphas and an I2V one equal diffusers on an I2V model; only one has image keys and values."""
    theirs = saved_diffusers_dit(tmp_path / "dit", **I2V)
    ours = load_dit(tmp_path / "dit")
    first = spelled(factors(ours, MODULES), prefix="transformer.")
    first |= {f"transformer.{module}.alpha": torch.tensor(1.5) for module in MODULES}
    image = [f"blocks.{i}.attn2.add_{name}_proj" for i in range(2) for name in "kv"]
    second = spelled(factors(ours, [*MODULES[:3], *image], rank=5, seed=1), prefix="transformer.")
    files = [saved(tmp_path / "first.safetensors", first), saved(tmp_path / "second.safetensors", second)]
    alphas = {key: tensor.item() for key, tensor in first.items() if key.endswith("alpha")}
    factored = {key: tensor for key, tensor in first.items() if key not in alphas}
    theirs.load_lora_adapter(factored, network_alphas=alphas, adapter_name="first")
    theirs.load_lora_adapter(second, adapter_name="second")
    theirs.set_adapters(["first", "second"], [0.7, -0.4])
    merge_loras(ours, [LoRA(files[0], 0.7), LoRA(files[1], -0.4)])
    assert agrees(ours, theirs)
    theirs.fuse_lora()
    theirs.unload_lora()
    fused = theirs.state_dict()
    assert fused.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert relative_error(tensor, fused[name]) < OPERATOR["float32"], name


@pytest.mark.parametrize("alpha", [None, 8.0], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_lightx2v_files_add_factors_and_differences(strength, alpha, tmp_path):
    """Factors, biases, norms and the modulation tables equal a merge written out, and nothing else changes."""
    saved_diffusers_dit(tmp_path / "dit")
    ours = load_dit(tmp_path / "dit")
    before = state_of(ours)
    state, added = lightx2v(ours, alpha)
    file = saved(tmp_path / "distill.safetensors", state)
    merge_loras(ours, [LoRA(file, strength)])
    for name, tensor in ours.state_dict().items():
        if name in added:
            assert relative_error(tensor, before[name] + strength * added[name]) < OPERATOR["float32"], name
        else:
            assert torch.equal(tensor, before[name]), name


def flat(module):
    return module.replace(".", "_")


DOWN_UP = {"down": "lora_down", "up": "lora_up"}
SPELLINGS = {
    "PEFT": {},
    "diffusers": {"prefix": "transformer."},
    "PEFT of a pipeline": {"prefix": "base_model.model.transformer."},
    "PEFT, adapter named": {"prefix": "base_model.model.", "down": "lora_A.default", "up": "lora_B.default"},
    "LightX2V": {"prefix": "diffusion_model.", **DOWN_UP, "name": original_module},
    "ComfyUI": {"prefix": "model.diffusion_model.", "name": original_module},
    "ComfyUI's wrapper": {"prefix": "diffusion_model.model.", **DOWN_UP, "name": original_module},
    "DiffSynth": {"down": "lora_A.default", "up": "lora_B.default", "name": original_module},
    "UniAnimate": {
        "prefix": "pipe.dit.",
        "down": "lora_down.default",
        "up": "lora_up.default",
        "name": original_module,
    },
    "dit": {"prefix": "dit.", "name": original_module},
    "several GPUs": {"prefix": "module.", "name": original_module},
    "compiled": {"prefix": "_orig_mod.", "name": original_module},
    "PEFT, compiled": {"prefix": "base_model.model._orig_mod."},
    "compiled layers": {
        "prefix": "module.",
        "name": lambda module: re.sub(r"^(blocks\.\d)", r"\1._orig_mod", original_module(module)),
    },
    "musubi": {"prefix": "lora_unet_", **DOWN_UP, "name": kohya},
    "VideoX-Fun": {"prefix": "lora_unet__", **DOWN_UP, "name": kohya},
    "half-dotted": {
        "prefix": "lora_unet_",
        **DOWN_UP,
        "name": lambda module: original_module(module).replace("blocks.", "blocks_"),
    },
    "kohya, diffusers' names": {"prefix": "lora_unet_", **DOWN_UP, "name": flat},
    "kohya, of a transformer": {"prefix": "lora_transformer_", **DOWN_UP, "name": flat},
    "LyCORIS": {"prefix": "lycoris_", **DOWN_UP, "name": flat},
}
EVERY_MODULE = replace(TINY_DIT, in_channels=36, image_dim=20, added_kv=True, pos_embed_seq_len=514)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_every_module_is_the_same_merge(spelling, tmp_path):
    """A pair under every spelling adds ``strength * alpha / rank * up @ down`` to its weight, and nothing else."""
    dit = random_weights(WanDiT, EVERY_MODULE, 1)
    before = state_of(dit)
    modules = [name.removesuffix(".weight") for name, tensor in dit.named_parameters() if tensor.ndim > 1]
    modules = [module for module in modules if not module.endswith(("scale_shift_table", "pos_embed"))]
    assert len(modules) == len(MODULES) + len(OUTER) + 4 + 2
    pairs, given = factors(dit, modules, rank=3), SPELLINGS[spelling]
    state = spelled(pairs, **given)
    named = given.get("name", lambda module: module)
    state |= {f"{given.get('prefix', '')}{named(module)}.alpha": torch.tensor(2.0) for module in modules}
    merge_loras(dit, [LoRA(saved(tmp_path / "lora.safetensors", state), 0.5)])
    for name, tensor in dit.state_dict().items():
        if name.removesuffix(".weight") in pairs:
            down, up = pairs[name.removesuffix(".weight")]
            expected = before[name] + 0.5 * 2.0 / 3 * (up @ down.flatten(1)).view_as(tensor)
            assert relative_error(tensor, expected) < OPERATOR["float32"], name
        else:
            assert torch.equal(tensor, before[name]), name


def test_less_usual_forms(tmp_path):
    """Less usual forms merge: tables without their leading 1, parameters named in full, with underscores too, LyCORIS'
    norms, an alpha that counts before a configuration, and a pickled checkpoint whose matrices lie transposed."""
    dit = random_weights(WanDiT, TINY_DIT, 1)
    table, head = torch.randn(6, 48), torch.randn(1, 2, 48)
    (pair,) = factors(dit, MODULES[:1]).values()
    norm = torch.randn(2, 48)
    state = {"diffusion_model.blocks.0.diff_m": table, "diffusion_model.head.modulation.diff": head}
    state |= {"lora_unet_blocks_1.diff_m": table, "lycoris_blocks_0_norm2.w_norm": norm[0]}
    state |= {"lycoris_blocks_0_norm2.b_norm": norm[1]}
    state |= spelled({MODULES[0]: pair}) | {f"{MODULES[0]}.alpha": torch.tensor(6.0)}
    file = saved(tmp_path / "lora.safetensors", state)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 30}))
    before = state_of(dit)
    lying = {name: tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor for name, tensor in before.items()}
    assert not lying[f"{MODULES[0]}.weight"].is_contiguous()
    torch.save(lying, tmp_path / "dit.pt")
    merge_loras(dit, [LoRA(file)])
    for i in range(2):
        name = f"blocks.{i}.scale_shift_table"
        assert torch.equal(dit.state_dict()[name], before[name] + table)
        name = f"blocks.0.norm2.{('weight', 'bias')[i]}"
        assert torch.equal(dit.state_dict()[name], before[name] + norm[i])
    assert torch.equal(dit.scale_shift_table, before["scale_shift_table"] + head)
    expected = before[f"{MODULES[0]}.weight"] + 2 * product(*pair)
    assert relative_error(dit.get_parameter(f"{MODULES[0]}.weight"), expected) < OPERATOR["float32"]
    assert same(dit.state_dict(), load_dit(tmp_path / "dit.pt", config=TINY_DIT, loras=[LoRA(file)]))
