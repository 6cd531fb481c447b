"""LoRAs: files that diffusers, PEFT and the tests write, against diffusers' own merging and against a written-out one.

diffusers passes over what it has no place for (differences of norms and of modulation tables). Here all of a file is
merged, or the keys that cannot be are named.
"""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from model import InputError, LoRA, SegmentPlan, WanDiT, apply_loras, load_dit, merge_loras, sample_latents
from model.lora import LoRAMismatch
from model.lora_files import open_lora
from model.scheduler import flow_sigmas
from model.weights import inspect_dit, random_weights
from tests.conftest import TINY_DIT
from tests.original_names import float8_with_scales, original_dit, original_module
from tests.test_dit import saved_diffusers_dit
from tests.tolerances import BFLOAT16_MODEL, OPERATOR, PARITY, relative_error

I2V = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 48}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = [
    *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ATTENTION),
    "ffn.net.0.proj",
    "ffn.net.2",
]
MODULES = [f"blocks.{i}.{layer}" for i in range(2) for layer in LAYERS]
OUTER = [
    "patch_embedding",
    "proj_out",
    "condition_embedder.time_proj",
    *(f"condition_embedder.{name}_embedder.linear_{i}" for name in ("time", "text") for i in (1, 2)),
]


def inputs(dit):
    """Latents, timestep, text and image for one forward."""
    config = dit.config
    image = None if config.image_dim is None else torch.randn(1, 257, config.image_dim)
    latents = torch.randn(1, config.in_channels, 3, 4, 6)
    return latents, torch.tensor([500.0]), torch.randn(1, 512, config.text_dim), image


def agrees(ours, theirs):
    """Whether both predict the same."""
    given = inputs(ours)
    with torch.no_grad():
        return relative_error(ours(*given), theirs(*given).sample) < PARITY


def state_of(dit):
    return {name: tensor.clone() for name, tensor in dit.state_dict().items()}


def same(state, dit):
    return all(torch.equal(tensor, state[name]) for name, tensor in dit.state_dict().items())


def factors(dit, modules, rank=3, seed=0):
    """``{module: (down, up)}`` for weights of ``dit``, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    shapes = {module: dit.get_parameter(f"{module}.weight").shape for module in modules}
    return {module: (normal(rank, *shape[1:]), normal(shape[0], rank)) for module, shape in shapes.items()}


def product(down, up):
    return (up @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def spelled(pairs, prefix="", down="lora_A", up="lora_B", name=lambda module: module):
    """A LoRA's tensors under some spelling."""
    state = {}
    for module, (a, b) in pairs.items():
        state[f"{prefix}{name(module)}.{down}.weight"] = a.clone()
        state[f"{prefix}{name(module)}.{up}.weight"] = b.clone()
    return state


def kohya(module):
    return original_module(module).replace(".", "_")


def saved(path, state, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path, metadata=metadata)
    return path


CONFIGS = {
    "alpha": LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, init_lora_weights=False),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=[*ATTENTION, "net.0.proj", "proj_out", "patch_embedding", "add_k_proj", "linear_1"],
        rank_pattern={"blocks.1.attn1.to_q": 6, "proj_out": 2},
        alpha_pattern={"attn2.to_k": 7, r"blocks\.\d\.attn1\.to_v": 1},
        init_lora_weights=False,
    ),
    "rslora": LoraConfig(
        r=4, lora_alpha=2, target_modules=ATTENTION, use_rslora=True, lora_bias=True, init_lora_weights=False
    ),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("writer", ["diffusers model", "diffusers pipeline", "peft"])
def test_peft_adapters_equal_the_model_that_they_were_saved_from(writer, config, tmp_path):
    """Alpha is in the header (diffusers) or in adapter_config.json beside the file (PEFT)."""
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
    """A T2V LoRA with alphas and an I2V one on an I2V model; the image's keys and values have entries in one only."""
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


def lightx2v(dit, alpha=None):
    """A file with everything that LightX2V's hold, and ``{parameter: what it adds}``, written out."""
    pairs = factors(dit, [*MODULES, *OUTER], seed=2)
    state = spelled(pairs, "diffusion_model.", "lora_down", "lora_up", original_module)
    if alpha is not None:
        state |= {f"diffusion_model.{original_module(module)}.alpha": torch.tensor(alpha) for module in pairs}
    scale = 1 if alpha is None else alpha / 3
    added = {f"{module}.weight": scale * product(*pair) for module, pair in pairs.items()}
    shapes = {name: parameter.shape for name, parameter in dit.named_parameters()}
    for name in (*(f"{module}.bias" for module in (*pairs, "blocks.0.norm2")), "blocks.1.attn1.norm_q.weight"):
        kind = "diff_b" if name.endswith("bias") else "diff"
        added[name] = torch.randn(shapes[name])
        state[f"diffusion_model.{original_module(name.rpartition('.')[0])}.{kind}"] = added[name].clone()
    for name, key in (("blocks.0.norm2.weight", "blocks.0.norm3.diff"), ("proj_out.weight", "head.head.diff")):
        addition = torch.randn(shapes[name])
        added[name] = added.get(name, 0) + addition
        state[f"diffusion_model.{key}"] = addition
    tables = [(f"blocks.{i}.scale_shift_table", f"blocks.{i}.diff_m") for i in range(2)]
    for name, key in (*tables, ("scale_shift_table", "head.diff_m")):
        added[name] = torch.randn(shapes[name])
        state[f"diffusion_model.{key}"] = added[name].clone()
    return state, added


@pytest.mark.parametrize("alpha", [None, 8.0], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_lightx2v_files_add_factors_and_differences(strength, alpha, tmp_path):
    """Against a merge written out: factors, biases, norms and the modulation tables; nothing else changes."""
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


def test_lightx2v_files_equal_diffusers_but_for_what_diffusers_passes_over(tmp_path):
    """diffusers drops the norms' and modulation's differences; and it reads no factors beside head.head.diff."""
    theirs = saved_diffusers_dit(tmp_path / "dit")
    ours = load_dit(tmp_path / "dit")
    before = state_of(ours)
    state, _ = lightx2v(ours, 8.0)
    both = {key for key in state if "head.head.lora" in key or key.endswith("head.head.alpha")}
    # Its converter leaves alphas of the embeddings over and then refuses the file.
    outer = {f"diffusion_model.{original_module(module)}.alpha" for module in OUTER}
    patch = {key for key in state if "patch_embedding" in key}
    state = {key: tensor for key, tensor in state.items() if key not in both | outer | patch}
    file = saved(tmp_path / "distill.safetensors", state)
    merge_loras(ours, [LoRA(file)])
    theirs.load_lora_adapter(WanPipeline.lora_state_dict(str(file)))
    theirs.fuse_lora()
    theirs.unload_lora()
    passed_over = []
    for name, tensor in theirs.state_dict().items():
        if torch.equal(tensor, before[name]) and not torch.equal(ours.get_parameter(name), before[name]):
            passed_over.append(name)
        else:
            assert relative_error(ours.get_parameter(name), tensor) < OPERATOR["float32"], name
    assert sorted(passed_over) == [
        "blocks.0.norm2.bias",
        "blocks.0.norm2.weight",
        "blocks.0.scale_shift_table",
        "blocks.1.attn1.norm_q.weight",
        "blocks.1.scale_shift_table",
        "scale_shift_table",
    ]


def test_musubi_files_equal_diffusers(tmp_path):
    theirs = saved_diffusers_dit(tmp_path / "dit", **I2V)
    ours = load_dit(tmp_path / "dit")
    image = [f"blocks.{i}.attn2.add_{name}_proj" for i in range(2) for name in "kv"]
    pairs = factors(ours, [*MODULES, *image])
    state = spelled(pairs, "lora_unet_", "lora_down", "lora_up", kohya)
    state |= {f"lora_unet_{kohya(module)}.alpha": torch.tensor(2.0) for module in pairs}
    file = saved(tmp_path / "musubi.safetensors", state)
    merge_loras(ours, [LoRA(file)])
    theirs.load_lora_adapter(WanPipeline.lora_state_dict(str(file)))
    assert agrees(ours, theirs)


SPELLINGS = {
    "PEFT": {},
    "diffusers": {"prefix": "transformer."},
    "PEFT of a pipeline": {"prefix": "base_model.model.transformer."},
    "PEFT, adapter named": {"prefix": "base_model.model.", "down": "lora_A.default", "up": "lora_B.default"},
    "LightX2V": {"prefix": "diffusion_model.", "down": "lora_down", "up": "lora_up", "name": original_module},
    "ComfyUI": {"prefix": "model.diffusion_model.", "name": original_module},
    "DiffSynth": {"down": "lora_A.default", "up": "lora_B.default", "name": original_module},
    "musubi": {"prefix": "lora_unet_", "down": "lora_down", "up": "lora_up", "name": kohya},
    "kohya, diffusers' names": {
        "prefix": "lora_unet_",
        "down": "lora_down",
        "up": "lora_up",
        "name": lambda module: module.replace(".", "_"),
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_every_module_is_the_same_merge(spelling, tmp_path):
    config = {**I2V, "pos_embed_seq_len": 514}
    saved_diffusers_dit(tmp_path / "dit", **config)
    ours, plain = load_dit(tmp_path / "dit"), load_dit(tmp_path / "dit")
    modules = [name.removesuffix(".weight") for name, tensor in ours.named_parameters() if tensor.ndim > 1]
    modules = [module for module in modules if not module.endswith(("scale_shift_table", "pos_embed"))]
    assert len(modules) == len(MODULES) + len(OUTER) + 4 + 2
    pairs = factors(ours, modules)
    file = saved(tmp_path / "lora.safetensors", spelled(pairs, **SPELLINGS[spelling]))
    merge_loras(ours, [LoRA(file)])
    with torch.no_grad():
        for module, pair in pairs.items():
            plain.get_parameter(f"{module}.weight").add_(product(*pair))
    for name, tensor in ours.state_dict().items():
        if name.removesuffix(".weight") in pairs:
            assert relative_error(tensor, plain.get_parameter(name)) < OPERATOR["float32"], name
        else:
            assert torch.equal(tensor, plain.get_parameter(name)), name


def test_factors_of_a_convolution_come_in_its_shape_or_flat(tmp_path, tiny_dit):
    (pair,) = factors(tiny_dit, ["patch_embedding"]).values()
    expected = tiny_dit.patch_embedding.weight + product(*pair)
    shaped = {"patch_embedding.lora_A.weight": pair[0], "patch_embedding.lora_B.weight": pair[1].view(48, 3, 1, 1, 1)}
    flat = {"patch_embedding.lora_A.weight": pair[0].flatten(1), "patch_embedding.lora_B.weight": pair[1]}
    for i, state in enumerate((shaped, flat)):
        dit = random_weights(WanDiT, TINY_DIT, 1)
        merge_loras(dit, [LoRA(saved(tmp_path / f"{i}.safetensors", state))])
        assert relative_error(dit.patch_embedding.weight, expected) < OPERATOR["float32"]


def test_less_usual_forms(tmp_path):
    """Tables without their leading 1, a parameter named in full, an alpha that counts before a configuration, and a
    pickled checkpoint whose matrices lie transposed."""
    dit = random_weights(WanDiT, TINY_DIT, 1)
    table, head = torch.randn(6, 48), torch.randn(1, 2, 48)
    (pair,) = factors(dit, MODULES[:1]).values()
    state = {"diffusion_model.blocks.0.diff_m": table, "diffusion_model.head.modulation.diff": head}
    state |= spelled({MODULES[0]: pair}) | {f"{MODULES[0]}.alpha": torch.tensor(6.0)}
    file = saved(tmp_path / "lora.safetensors", state)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 30}))
    before = state_of(dit)
    lying = {name: tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor for name, tensor in before.items()}
    assert not lying[f"{MODULES[0]}.weight"].is_contiguous()
    torch.save(lying, tmp_path / "dit.pt")
    merge_loras(dit, [LoRA(file)])
    assert torch.equal(dit.state_dict()["blocks.0.scale_shift_table"], before["blocks.0.scale_shift_table"] + table)
    assert torch.equal(dit.scale_shift_table, before["scale_shift_table"] + head)
    expected = before[f"{MODULES[0]}.weight"] + 2 * product(*pair)
    assert relative_error(dit.get_parameter(f"{MODULES[0]}.weight"), expected) < OPERATOR["float32"]
    assert same(dit.state_dict(), load_dit(tmp_path / "dit.pt", config=TINY_DIT, loras=[LoRA(file)]))


def five(tmp_path, dit):
    """Five LoRAs on the same layers, and their sum in float64."""
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
    """Whether no number is farther from the exact one than half a step of the dtype, but for the sums in float32."""
    half = torch.finfo(dtype).eps / 2
    return all(
        bool(((state[name].double() - value).abs() <= half * 1.001 * value.abs() + 1e-6).all())
        for name, value in exact.items()
    )


def test_many_loras_in_any_order_are_rounded_once(tmp_path):
    """Merged one after another into bfloat16 they would be rounded five times."""
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
    """float32 or scaled float8 in the file, bfloat16 in memory: rounded once, LoRAs included; tables stay float32."""
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
    """A clip of five blocks, by the sampler: windows, workspaces, steps."""
    torch.manual_seed(1)
    clip = torch.randn(1, 4, 5, 4, 6)
    for _ in sample_latents(dit, clip, TEXT, plan=SegmentPlan(5, 2), sigmas=flow_sigmas(2, 5.0), seed=3):
        pass
    return clip


@pytest.mark.parametrize("module", [*MODULES[:1], "blocks.1.ffn.net.2", "blocks.0.attn2.to_k", *OUTER])
def test_applied_loras_are_in_every_path_of_a_step_and_come_off_bit_for_bit(module, tmp_path):
    """The fused products of first and last layer, text and timesteps too; weights stay where graphs know them."""
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
    """Over and over, in bfloat16: as if merged once with the last strengths."""
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
    """An error inside the block, and one while they are put on."""
    before = state_of(tiny_dit)
    file = saved(tmp_path / "lora.safetensors", spelled(factors(tiny_dit, MODULES)))
    with pytest.raises(KeyError), apply_loras(tiny_dit, [LoRA(file)]):
        raise KeyError
    assert same(before, tiny_dit)
    calls = []

    def failing(self, name, total, strengths=None):
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError
        return total.add_(1)

    monkeypatch.setattr("model.lora.LoRASet.add_to", failing)
    with pytest.raises(MemoryError):
        apply_loras(tiny_dit, [LoRA(file)])
    assert same(before, tiny_dit)


def test_of_a_file_for_both_experts_the_chosen_ones_tensors_are_used(tmp_path):
    """Each as diffusers saves it, under the name of its expert, with another alpha."""
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


def test_a_lora_for_another_model_names_every_key_and_changes_nothing(tmp_path, tiny_dit):
    before = state_of(tiny_dit)
    good = saved(tmp_path / "good.safetensors", spelled(factors(tiny_dit, MODULES[:1])))
    state = spelled(factors(tiny_dit, MODULES[1:3]))
    state["blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(4, 40)
    state["blocks.0.attn1.to_q.lora_B.weight"] = torch.zeros(48, 4)
    state |= {
        "blocks.7.ffn.net.2.lora_A.weight": torch.zeros(4, 64),
        "blocks.7.ffn.net.2.lora_B.weight": torch.ones(48, 4),
    }
    del state["blocks.0.attn1.to_v.lora_B.weight"]
    state |= {"double_blocks.0.img_mod.lora_A.weight": torch.zeros(4, 48)}
    state |= {"double_blocks.0.img_mod.lora_B.weight": torch.zeros(4, 48), "proj_out.weight": torch.zeros(16, 48)}
    state |= {"diffusion_model.head.diff_m": torch.zeros(1, 3, 48), "blocks.1.attn2.norm_k.alpha": torch.tensor(1.0)}
    bad = saved(tmp_path / "bad.safetensors", state)
    expected = [
        "bad.safetensors: blocks.0.attn1.to_q.lora_A.weight ([4, 40] for a parameter of [48, 48])",
        "bad.safetensors: blocks.0.attn1.to_q.lora_B.weight ([48, 4] for a parameter of [48, 48])",
        "bad.safetensors: blocks.0.attn1.to_v.lora_A.weight (its counterpart is missing)",
        "bad.safetensors: blocks.1.attn2.norm_k.alpha (its counterpart is missing)",
        "bad.safetensors: blocks.7.ffn.net.2.lora_A.weight (the model has no blocks.7.ffn.net.2.weight)",
        "bad.safetensors: blocks.7.ffn.net.2.lora_B.weight (the model has no blocks.7.ffn.net.2.weight)",
        "bad.safetensors: diffusion_model.head.diff_m ([1, 3, 48] for a parameter of [1, 2, 48])",
        "bad.safetensors: double_blocks.0.img_mod.lora_A.weight (no parameter of a Wan DiT)",
        "bad.safetensors: double_blocks.0.img_mod.lora_B.weight (no parameter of a Wan DiT)",
        "bad.safetensors: proj_out.weight (no part of a LoRA)",
    ]
    for change in (merge_loras, apply_loras):
        with pytest.raises(LoRAMismatch) as error:
            change(tiny_dit, [LoRA(good), LoRA(bad)])
        assert sorted(error.value.problems) == expected
        assert all(problem in str(error.value) for problem in expected)
        assert "10 keys do not fit the model" in str(error.value)
    assert same(before, tiny_dit)


def test_of_many_keys_that_do_not_fit_the_message_lists_twenty(tmp_path):
    dit = random_weights(WanDiT, TINY_DIT, 1)
    state = {f"blocks.{i}.nothing.lora_A.weight": torch.zeros(4, 48) for i in range(33)}
    with pytest.raises(LoRAMismatch) as error:
        merge_loras(dit, [LoRA(saved(tmp_path / "bad.safetensors", state))])
    assert len(error.value.problems) == 33
    assert str(error.value).count("its counterpart is missing") == 20
    assert str(error.value).endswith("; and 13 more")


def test_a_t2v_lora_leaves_the_image_branch_as_it_is(tmp_path):
    saved_diffusers_dit(tmp_path / "t2v")
    saved_diffusers_dit(tmp_path / "i2v", **I2V)
    pairs = factors(load_dit(tmp_path / "t2v"), MODULES)
    file = saved(tmp_path / "t2v.safetensors", spelled(pairs, "diffusion_model.", name=original_module))
    ours = load_dit(tmp_path / "i2v")
    before = state_of(ours)
    merge_loras(ours, [LoRA(file)])
    changed = {name for name, tensor in ours.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{module}.weight" for module in MODULES}


REFUSED = {
    "LoHa": (LoHaConfig(r=4, target_modules=["to_q"]), "is LoHa"),
    "DoRA": (LoraConfig(r=4, target_modules=["to_q"], use_dora=True), "is DoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_of_another_kind_are_refused_by_name(kind, tmp_path):
    """As PEFT saves them."""
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
    with pytest.raises(InputError, match="strength: expected a finite number, got inf"):
        LoRA(peft, math.inf)


def test_a_bfloat16_model_with_a_lora_stays_near_float32(tmp_path):
    theirs = saved_diffusers_dit(tmp_path / "dit")
    theirs.add_adapter(CONFIGS["alpha"])
    theirs.save_lora_adapter(tmp_path / "lora")
    half = load_dit(tmp_path / "dit", dtype=torch.bfloat16, loras=[LoRA(tmp_path / "lora")])
    latents, timestep, text, _ = inputs(half)
    with torch.no_grad():
        expected = theirs(latents, timestep, text).sample
    assert relative_error(half(latents.bfloat16(), timestep, text), expected) < BFLOAT16_MODEL
