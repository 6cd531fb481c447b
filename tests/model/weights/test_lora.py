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


@pytest.mark.parametrize(
    ("writer", "config"),
    [("peft", "alpha"), ("peft", "patterns"), ("diffusers model", "patterns"), ("diffusers pipeline", "rslora")],
)
def test_peft_adapters_equal_the_model_that_they_were_saved_from(writer, config, tmp_path):
    """PEFT adapters equal their model, with alpha in the header (diffusers) or in adapter_config.json (PEFT)."""
    theirs = saved_diffusers_dit(tmp_path / "dit", **I2V)
    path = tmp_path / "lora"
    if writer == "peft":
        theirs = get_peft_model(theirs, CONFIGS[config])
        theirs.save_pretrained(path)
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
    assert not agrees(ours, theirs)
    merge_loras(ours, [LoRA(path)])
    assert agrees(ours, theirs)
    assert same(ours.state_dict(), load_dit(tmp_path / "dit", loras=[LoRA(path)]))


def flat(module):
    return module.replace(".", "_")


def half_dotted(module):
    return original_module(module).replace("blocks.", "blocks_")


def compiled(module):
    return re.sub(r"^(blocks\.\d)", r"\1._orig_mod", original_module(module))


#: Prefix, names of the two factors, and the function that spells a module.
SPELLINGS = {
    "PEFT": ("", "lora_A", "lora_B", str),
    "PEFT of a pipeline": ("base_model.model.transformer.", "lora_A", "lora_B", str),
    "PEFT, adapter named": ("base_model.model.", "lora_A.default", "lora_B.default", str),
    "PEFT, compiled": ("base_model.model._orig_mod.", "lora_A", "lora_B", str),
    "LightX2V": ("diffusion_model.", "lora_down", "lora_up", original_module),
    "ComfyUI": ("model.diffusion_model.", "lora_A", "lora_B", original_module),
    "ComfyUI's wrapper": ("diffusion_model.model.", "lora_down", "lora_up", original_module),
    "UniAnimate": ("pipe.dit.", "lora_down.default", "lora_up.default", original_module),
    "dit": ("dit.", "lora_A", "lora_B", original_module),
    "compiled layers": ("module.", "lora_A", "lora_B", compiled),
    "musubi": ("lora_unet_", "lora_down", "lora_up", kohya),
    "VideoX-Fun": ("lora_unet__", "lora_down", "lora_up", kohya),
    "half-dotted": ("lora_unet_", "lora_down", "lora_up", half_dotted),
    "kohya, of a transformer": ("lora_transformer_", "lora_down", "lora_up", flat),
    "LyCORIS": ("lycoris_", "lora_down", "lora_up", flat),
}  # fmt: skip
EVERY_MODULE = replace(TINY_DIT, in_channels=36, image_dim=20, added_kv=True, pos_embed_seq_len=514)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_every_module_is_the_same_merge(spelling, tmp_path):
    """A pair under every spelling adds ``strength * alpha / rank * up @ down`` to its weight, and nothing else."""
    dit = random_weights(WanDiT, EVERY_MODULE, 1)
    before = state_of(dit)
    modules = [name.removesuffix(".weight") for name, tensor in dit.named_parameters() if tensor.ndim > 1]
    modules = [module for module in modules if not module.endswith(("scale_shift_table", "pos_embed"))]
    assert len(modules) == len(MODULES) + len(OUTER) + 4 + 2
    pairs, (prefix, _, _, named) = factors(dit, modules, rank=3), SPELLINGS[spelling]
    state = spelled(pairs, *SPELLINGS[spelling])
    state |= {f"{prefix}{named(module)}.alpha": torch.tensor(2.0) for module in modules}
    merge_loras(dit, [LoRA(saved(tmp_path / "lora.safetensors", state), 0.5)])
    for name, tensor in dit.state_dict().items():
        if name.removesuffix(".weight") in pairs:
            down, up = pairs[name.removesuffix(".weight")]
            expected = before[name] + 0.5 * 2.0 / 3 * (up @ down.flatten(1)).view_as(tensor)
            assert relative_error(tensor, expected) < OPERATOR["float32"], name
        else:
            assert torch.equal(tensor, before[name]), name


def test_less_usual_forms(tmp_path):
    """Less usual forms merge: differences of weights, beside factors too, and of biases; tables without their leading
    1, parameters named in full, with underscores too, LyCORIS' norms, an alpha that counts before a configuration, and
    a pickled checkpoint whose matrices lie transposed."""
    dit = random_weights(WanDiT, TINY_DIT, 1)
    table, head = torch.randn(6, 48), torch.randn(1, 2, 48)
    (pair,) = factors(dit, MODULES[:1]).values()
    norm, weight = torch.randn(2, 48), torch.randn(48, 48)
    state = {"diffusion_model.blocks.0.diff_m": table, "diffusion_model.head.modulation.diff": head}
    state |= {"lora_unet_blocks_1.diff_m": table, "lycoris_blocks_0_norm2.w_norm": norm[0]}
    state |= {"lycoris_blocks_0_norm2.b_norm": norm[1]}
    state |= {f"{MODULES[0]}.diff": weight, f"{MODULES[0]}.diff_b": norm[0]}
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
    assert torch.equal(dit.get_parameter(f"{MODULES[0]}.bias"), before[f"{MODULES[0]}.bias"] + norm[0])
    expected = before[f"{MODULES[0]}.weight"] + 2 * product(*pair) + weight
    assert relative_error(dit.get_parameter(f"{MODULES[0]}.weight"), expected) < OPERATOR["float32"]
    assert same(dit.state_dict(), load_dit(tmp_path / "dit.pt", config=TINY_DIT, loras=[LoRA(file)]))
