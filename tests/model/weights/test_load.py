"""Loading: diffusers directories, original files of the DiT and the VAEs, float8, shards, pickles, what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from model import DiTConfig, InputError, VAEConfig, WanDiT, WanVAE, load_dit, load_vae
from model.config import PRESETS
from model.streaming.placement import Placement, placed_bytes
from model.weights.load import inspect_weights, random_weights
from tests.conftest import TINY_DIT
from tests.model.dit.test_model import saved_diffusers_dit
from tests.model.vae.test_model import saved_diffusers_vae
from tests.support.original_names import float8_with_scales, original_dit, original_vae

CLIP_DIT = DiTConfig(
    num_heads=1, num_layers=2, ffn_dim=96, in_channels=36, text_dim=32, freq_dim=64, image_dim=20, added_kv=True
)
VAE_21 = VAEConfig(base_dim=4, decoder_base_dim=8)
VAE_22 = replace(PRESETS["5b"].vae, base_dim=4, decoder_base_dim=8)


def loaded(folder, tensors, metadata=None, **options):
    """Returns the DiT of a file of these tensors."""
    save_file(tensors, folder / "wan.safetensors", metadata=metadata)
    return load_dit(folder / "wan.safetensors", **options)


def equals(dit, meant):
    """Returns whether a DiT holds these tensors of the original names, rounded to its dtypes."""
    state = original_dit(dit.state_dict())
    return state.keys() == meant.keys() and all(torch.equal(x, meant[name].to(x.dtype)) for name, x in state.items())


def same_state(loaded, model):
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    return all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("prefix", "config"),
    [
        ("", CLIP_DIT),
        ("model.diffusion_model.", DiTConfig(num_heads=2, num_layers=1, ffn_dim=8, cross_attn_norm=False)),
        ("module._orig_mod.dit.", CLIP_DIT),
    ],
)
def test_original_dit_file_loads_and_its_config_is_inferred(config, prefix, tmp_path):
    model = random_weights(WanDiT, config, 0)
    original = original_dit(model.state_dict())
    assert convert_wan_transformer_to_diffusers(dict(original)).keys() == model.state_dict().keys()
    found = loaded(tmp_path, {prefix + name: tensor for name, tensor in original.items()})
    assert found.config == config
    assert same_state(found, model)


def test_original_dit_directory_with_shards_and_config(tmp_path):
    """The layout of the Wan repositories loads; heads of another size than 128 are known from config.json only."""
    model = random_weights(WanDiT, TINY_DIT, 0)
    original = original_dit(model.state_dict())
    names = sorted(original)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save_file({name: original[name] for name in part}, tmp_path / file)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    with pytest.raises(InputError, match="number of heads cannot be read"):
        load_dit(tmp_path)
    assert same_state(load_dit(index, config=TINY_DIT), model)
    config = {"_class_name": "WanModel", "model_type": "i2v", "num_heads": 2, "eps": 1e-6, "num_layers": 2}
    for change, message in (
        ({"num_layers": 3}, r"num_layers: config\.json says 3, the tensors are 2"),
        ({"_class_name": "CausalWanModel"}, r"_class_name in config\.json: expected one of .*, got 'CausalWanModel'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            load_dit(tmp_path)
    for name in ("WanModel", "WanTransformer3DModel", "Wan2_2Transformer3DModel"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": name}))
        assert load_dit(tmp_path).config == TINY_DIT
    assert same_state(load_dit(tmp_path), model)
    save_file(original, tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="in more than one file"):
        load_dit(tmp_path)
    # Without an index, shards that are missing may hold whole layers, which nobody would miss.
    index.unlink()
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="holds 1 shards of 2: diffusion_pytorch_model-00001-of-00002"):
        load_dit(tmp_path)


def json_tensor(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("generation", "dtype", "by_row", "prefix"),
    [
        ("scale_weight", torch.float8_e4m3fn, False, "model.diffusion_model."),
        ("weight_scale", torch.float8_e5m2, True, ""),
        ("header", torch.float8_e4m3fn, True, "model.diffusion_model."),
        ("header", torch.float8_e5m2, False, ""),
    ],
)
def test_float8_with_scales_is_their_product_rounded_once(generation, dtype, by_row, prefix, tmp_path):
    """ComfyUI's float8 files of all three generations load: a marker, a tensor of JSON a layer, header metadata."""
    model = random_weights(WanDiT, CLIP_DIT, 0)
    scale_name = "scale_weight" if generation == "scale_weight" else "weight_scale"
    options = {"scale_name": scale_name, "dtype": dtype, "by_row": by_row}
    stored, meant = float8_with_scales(original_dit(model.state_dict()), **options)
    metadata, layers = {}, [name.removesuffix(f".{scale_name}") for name in stored if name.endswith(scale_name)]
    name = str(dtype).removeprefix("torch.")
    file = {prefix + name: tensor for name, tensor in stored.items()}
    if generation == "scale_weight":
        file[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=dtype)
        file |= {f"{prefix}{layer}.scale_input": torch.tensor(0.5) for layer in layers}
    elif generation == "weight_scale":
        file |= {f"{prefix}{layer}.comfy_quant": json_tensor({"format": name}) for layer in layers}
        file |= {f"{prefix}{layer}.input_scale": torch.tensor(0.5) for layer in layers}
    else:
        entries = {f"{prefix}{layer}": {"format": name} for layer in layers}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": entries})
    assert len(layers) == 24
    assert all(equals(loaded(tmp_path, file, metadata, dtype=kind), meant) for kind in (torch.float32, torch.bfloat16))
    assert inspect_weights(tmp_path / "wan.safetensors", WanDiT).config == CLIP_DIT


def test_plain_float8_and_scales_of_one_that_mean_nothing(tmp_path):
    """Files cast to float8, biases too, load, and so do layers kept in 16 bits with a scale that means nothing."""
    state = original_dit(random_weights(WanDiT, CLIP_DIT, 0).state_dict())
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    assert equals(loaded(tmp_path, cast), cast)
    kept = {name: tensor.bfloat16() for name, tensor in state.items()}
    more = {"blocks.0.ffn.0.scale_weight": torch.ones(1), "scaled_fp8": torch.zeros(0)}
    assert equals(loaded(tmp_path, kept | more), kept)


def test_float8_shards_have_their_scales_in_any_file_and_shape(tmp_path):
    stored, meant = float8_with_scales(original_dit(random_weights(WanDiT, CLIP_DIT, 0).state_dict()))
    shaped = {name: x.view(1, 1, 1) if name.endswith("scale_weight") else x for name, x in stored.items()}
    for i in range(2):
        part = sorted(shaped)[i::2]
        save_file({name: shaped[name] for name in part}, tmp_path / f"wan-0000{i + 1}-of-00002.safetensors")
    assert equals(load_dit(tmp_path), meant)


@pytest.mark.parametrize(("index", "dtype"), [(True, torch.int8), (False, torch.float8_e4m3fn)])
def test_folders_of_lightx2v_load_and_stay_in_8_bits(index, dtype, tmp_path):
    """LightX2V's folders, a file a layer and one for the rest, load: a product rounded once, or kept as it is stored.

    Matrices of layers are in 8 bits with a scale a row; the rest is in float32, and config.json that of the release.
    """
    model = random_weights(WanDiT, CLIP_DIT, 0)
    options = {"scale_name": "weight_scale", "dtype": dtype, "by_row": True}
    stored, meant = float8_with_scales(original_dit(model.state_dict()), **options)
    weight_map = {name: f"block_{name.split('.')[1]}" if "blocks." in name else "non_block" for name in stored}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in stored.items() if weight_map[name] == file}
        save_file(part, tmp_path / f"{file}.safetensors")
    if index:
        entries = {"metadata": {}, "weight_map": {name: f"{file}.safetensors" for name, file in weight_map.items()}}
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(entries))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 1, "num_layers": 2}))
    whole, narrow = load_dit(tmp_path), load_dit(tmp_path, dtype=torch.bfloat16)
    assert equals(whole, meant)
    assert equals(narrow, meant)
    kept = inspect_weights(tmp_path, WanDiT).in_eight_bits()
    assert len(kept) == 24
    assert set(kept.values()) == {str(dtype).removeprefix("torch.")}
    placed = load_dit(tmp_path, placement=Placement(resident=0, quantize="file"))
    sizes = [placed_bytes(CLIP_DIT, torch.float32, Placement(quantize="file"), x).resident for x in (kept, {})]
    assert sizes[0] < sizes[1] / 3.5
    given = torch.randn(1, 36, 2, 4, 4), torch.tensor([5.0]), torch.randn(1, 5, 32), torch.randn(1, 257, 20)
    with torch.no_grad():
        assert torch.equal(placed(*given), whole(*given))


def test_int8_of_comfyui_loads_unless_it_is_rotated(tmp_path):
    options = {"scale_name": "weight_scale", "dtype": torch.int8}
    stored, meant = float8_with_scales(original_dit(random_weights(WanDiT, CLIP_DIT, 0).state_dict()), **options)
    layers = [name.removesuffix(".weight_scale") for name in stored if name.endswith("weight_scale")]
    stored |= {f"{layer}.comfy_quant": json_tensor({"format": "int8_tensorwise"}) for layer in layers}
    assert equals(loaded(tmp_path, stored), meant)
    stored[f"{layers[0]}.comfy_quant"] = json_tensor({"format": "int8_tensorwise", "convrot": True})
    with pytest.raises(InputError, match=rf"quantised as int8_tensorwise with convrot in {layers[0]};"):
        loaded(tmp_path, stored)


HALF = "8 bits with a scale for 12 matrices and without one for 12"


@pytest.mark.parametrize(
    ("lacking", "more", "named"),
    [
        (".1.", {}, rf"{HALF} \(blocks\.1\.\w+\.\w+\.weight and 11 more\)"),
        (
            ".1.",
            {"scaled_fp8": torch.zeros(2)},
            "float8_e4m3fn without the scale that scaled_fp8 announces in",
        ),
        ("", "formats", "float8_e4m3fn without the scale that float8_e4m3fn announces in .* and 23 more"),
        ("", {}, r"q\.weight holds the largest number of float8_e4m3fn, as weights do that have a scale; expected"),
        (".0.self_attn.q.", {"blocks.0.self_attn.q.weight": torch.float16}, None),
        ("none", {"blocks.0.norm3.weight": torch.float8_e5m2, "patch_embedding.weight": torch.float8_e5m2}, None),
        ("none", {"text_encoders.x.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, None),
    ],
)
def test_scales_are_there_for_all_matrices_in_float8_or_for_none(lacking, more, named, tmp_path):
    """A file whose matrices have scales in part, or that announces scales which it lacks, is refused.

    Its weights would be hundreds of times too large. Not all of a file is quantised, though: matrices in 16 bits
    without scales, kernels and norms in float8, and other parts of a pipeline are no reason. A file that has lost all
    scales without a trace is known by numbers that fill the range of float8.
    """
    stored, _ = float8_with_scales(original_dit(random_weights(WanDiT, CLIP_DIT, 0).state_dict()))
    prefix, metadata = "model.diffusion_model.", {}
    scales = [name for name in stored if name.endswith(".scale_weight")]
    if more == "formats":
        layers = {prefix + name.removesuffix(".scale_weight"): {"format": "float8_e4m3fn"} for name in scales}
        more, metadata = {}, {"_quantization_metadata": json.dumps({"layers": layers})}
    stored = {name: value for name, value in stored.items() if name not in scales or lacking not in name}
    for name, value in more.items():
        stored[name] = stored[name].to(value) if isinstance(value, torch.dtype) else value
    file = {name if "encoders" in name else prefix + name: value for name, value in stored.items()}
    if named is None:
        loaded(tmp_path, file, metadata)
        return
    with pytest.raises(InputError, match=named.replace("blocks", r"model\.diffusion_model\.blocks")):
        loaded(tmp_path, file, metadata)


NVFP4 = {"blocks.0.ffn.0.comfy_quant": json_tensor({"format": "nvfp4"})}
BITSANDBYTES = {"blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}
FLOAT8 = {"blocks.0.ffn.0.weight": torch.zeros(64, 48, dtype=torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "named"),
    [
        (NVFP4, {}, "nvfp4 in blocks.0.ffn.0;"),
        ({"blocks.0.ffn.0.weight_scale_2": torch.ones(())}, {}, "nvfp4 in blocks.0.ffn.0;"),
        ({}, {"layers": {"blocks.1.ffn.2": {"format": "mxfp8"}}}, "mxfp8 in blocks.1.ffn.2;"),
        ({"blocks.0.ffn.0.weight": torch.zeros(64, 48).char()}, {}, "int8 without a scale in blocks.0.ffn.0;"),
        (BITSANDBYTES, {}, "bitsandbytes nf4 in blocks.0.ffn.0;"),
        (
            {**FLOAT8, "blocks.0.ffn.0.weight_scale": torch.ones(2, 2)},
            {},
            r"float8_e4m3fn with float32 scales of shape \[2, 2\] in blocks.0.ffn.0;",
        ),
    ],
)
def test_other_quantisations_are_named(tensors, metadata, named, tmp_path):
    state = original_dit(random_weights(WanDiT, TINY_DIT, 0).state_dict())
    header = {"_quantization_metadata": json.dumps(metadata)} if metadata else {}
    with pytest.raises(InputError, match=rf"wan.safetensors is quantised as {named}.* expected floats, or float8"):
        loaded(tmp_path, {**state, **tensors}, header, config=TINY_DIT)


def test_each_part_of_a_whole_pipeline_in_one_file_loads_from_it(tmp_path):
    """Each part of a ComfyUI checkpoint loads from it; a tensor that belongs to no part is surplus."""
    dit, vae = random_weights(WanDiT, CLIP_DIT, 0), random_weights(WanVAE, VAE_21, 1)
    original = {f"model.diffusion_model.{name}": tensor for name, tensor in original_dit(dit.state_dict()).items()}
    names = original_vae(vae.state_dict(), VAE_21.num_res_blocks, VAE_21.residual)
    original |= {f"first_stage_model.{name}": tensor.contiguous() for name, tensor in names.items()}
    original["text_encoders.umt5xxl.shared.weight"] = torch.zeros(7, 4)
    save_file(original, tmp_path / "all.safetensors")
    assert same_state(load_dit(tmp_path / "all.safetensors"), dit)
    assert same_state(load_vae(tmp_path / "all.safetensors"), vae)
    save_file({**original, "surplus": torch.zeros(1)}, tmp_path / "more.safetensors")
    for load in (load_dit, load_vae):
        with pytest.raises(InputError, match="1 tensors: surplus surplus"):
            load(tmp_path / "more.safetensors")


@pytest.mark.parametrize("config", [VAE_21, VAE_22], ids=["2.1", "2.2"])
def test_original_vae_file_loads_and_its_config_is_inferred(config, tmp_path):
    model = random_weights(WanVAE, config, 0)
    original = original_vae(model.state_dict(), config.num_res_blocks, config.residual)
    if not config.residual:  # diffusers converts this version only
        assert convert_wan_vae_to_diffusers(dict(original)).keys() == model.state_dict().keys()
    torch.save(original, tmp_path / "Wan_VAE.pth")
    found = load_vae(tmp_path / "Wan_VAE.pth")
    assert found.config == config
    assert same_state(found, model)


def test_published_sizes_have_the_published_number_of_parameters():
    """The presets have the parameter counts of the published checkpoints."""

    def count(kind, config):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in kind(config).parameters())

    assert count(WanDiT, DiTConfig()) == pytest.approx(1.419e9, rel=1e-3)
    assert count(WanDiT, PRESETS["14b-1.3b"].stage_one) == pytest.approx(14.289e9, rel=1e-3)
    assert count(WanDiT, PRESETS["5b"].stage_one) == pytest.approx(5.000e9, rel=1e-3)
    assert count(WanVAE, VAEConfig()) == pytest.approx(126.9e6, rel=1e-3)
    assert count(WanVAE, PRESETS["5b"].vae) == pytest.approx(704.7e6, rel=1e-3)


def test_pipeline_directory_and_variant_file_are_found(tmp_path):
    theirs = saved_diffusers_dit(tmp_path / "transformer")
    saved_diffusers_vae(tmp_path / "vae", base_dim=3, z_dim=4, num_res_blocks=1)
    assert load_dit(tmp_path).config.num_layers == 2
    assert load_vae(tmp_path).config.z_dim == 4
    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    assert same_state(load_dit(tmp_path / "half"), load_dit(tmp_path))


def test_other_models_are_told_from_the_one_that_was_meant(tmp_path):
    saved_diffusers_vae(tmp_path / "vae", base_dim=3, z_dim=4)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is a Wan VAE; expected a Wan DiT"):
        load_dit(tmp_path / "vae")
    with pytest.raises(InputError, match=r"not a Wan VAE checkpoint: tensor 'encoder\.conv_in\.weight' is missing"):
        load_vae(tmp_path / "other.safetensors")


def test_random_weights_depend_on_the_seed_alone():
    first, again, other = (random_weights(WanDiT, TINY_DIT, seed) for seed in (3, 3, 4))
    assert same_state(first, again)
    assert not same_state(first, other)
