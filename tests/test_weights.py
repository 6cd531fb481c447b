"""Loading: diffusers directories, original files of the DiT and both VAEs, shards, pickles, and what is wrong."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from model import DiTConfig, InputError, VAEConfig, WanDiT, WanVAE, load_dit, load_vae
from model.config import PRESETS
from model.weights import inspect_dit, inspect_vae, random_weights
from tests.conftest import TINY_DIT
from tests.original_names import original_dit, original_vae
from tests.test_dit import saved_diffusers_dit
from tests.test_vae import saved_diffusers_vae

CLIP_DIT = DiTConfig(
    num_heads=1, num_layers=2, ffn_dim=96, in_channels=36, text_dim=32, freq_dim=64, image_dim=20, added_kv=True
)
VAE_21 = VAEConfig(base_dim=4, decoder_base_dim=8)
VAE_22 = replace(PRESETS["5b"].vae, base_dim=4, decoder_base_dim=8)


def same_state(loaded, model):
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    return all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("config", [CLIP_DIT, DiTConfig(num_heads=2, num_layers=1, ffn_dim=8, cross_attn_norm=False)])
def test_original_dit_file_loads_and_its_config_is_inferred(config, prefix, tmp_path):
    model = random_weights(WanDiT, config, 0)
    original = original_dit(model.state_dict())
    assert convert_wan_transformer_to_diffusers(dict(original)).keys() == model.state_dict().keys()
    save_file({prefix + name: tensor for name, tensor in original.items()}, tmp_path / "wan.safetensors")
    loaded = load_dit(tmp_path / "wan.safetensors")
    assert loaded.config == config
    assert same_state(loaded, model)


def test_original_dit_directory_with_shards_and_config(tmp_path):
    """The layout of the Wan repositories; heads of another size than 128 are known from config.json only."""
    model = random_weights(WanDiT, TINY_DIT, 0)
    original = original_dit(model.state_dict())
    names = sorted(original)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save_file({name: original[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="number of heads cannot be read"):
        load_dit(tmp_path)
    assert same_state(load_dit(tmp_path, config=TINY_DIT), model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "i2v", "num_heads": 2, "eps": 1e-6}))
    assert load_dit(tmp_path).config == TINY_DIT
    assert same_state(load_dit(tmp_path), model)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="lacks the shards diffusion_pytorch_model-00002-of-00002"):
        load_dit(tmp_path)


@pytest.mark.parametrize("config", [VAE_21, VAE_22], ids=["2.1", "2.2"])
def test_original_vae_file_loads_and_its_config_is_inferred(config, tmp_path):
    model = random_weights(WanVAE, config, 0)
    original = original_vae(model.state_dict(), config.num_res_blocks, config.residual)
    if not config.residual:  # diffusers converts this version only
        assert convert_wan_vae_to_diffusers(dict(original)).keys() == model.state_dict().keys()
    torch.save(original, tmp_path / "Wan_VAE.pth")
    loaded = load_vae(tmp_path / "Wan_VAE.pth")
    assert loaded.config == config
    assert same_state(loaded, model)


def test_published_sizes_have_the_published_number_of_parameters():
    """Parameter counts of the real models, from the Wan model cards' checkpoints."""

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


def test_every_tensor_that_does_not_fit_is_named_in_one_error(tmp_path):
    state = {name: tensor.clone() for name, tensor in random_weights(WanDiT, TINY_DIT, 0).state_dict().items()}
    del state["blocks.1.attn1.to_q.bias"], state["proj_out.bias"]
    state["blocks.0.extra"] = torch.zeros(3)
    state["blocks.0.ffn.net.2.weight"] = torch.zeros(48, 63)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        load_dit(tmp_path, config=TINY_DIT)
    for part in (
        "4 tensors",
        "missing blocks.1.attn1.to_q.bias (48,)",
        "missing proj_out.bias (16,)",
        "surplus blocks.0.extra",
        "misshapen blocks.0.ffn.net.2.weight: (48, 63), expected (48, 64)",
    ):
        assert part in str(error.value)


def test_checkpoint_is_checked_without_reading_its_tensors(tmp_path):
    saved_diffusers_dit(tmp_path / "dit")
    saved_diffusers_vae(tmp_path / "vae", base_dim=3, z_dim=4)
    assert inspect_dit(tmp_path / "dit") == load_dit(tmp_path / "dit").config
    assert inspect_vae(tmp_path / "vae") == load_vae(tmp_path / "vae").config
    config = json.loads((tmp_path / "dit" / "config.json").read_text())
    (tmp_path / "dit" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(InputError, match=r"missing blocks\.2\."):
        inspect_dit(tmp_path / "dit")


def test_wrong_files_are_explained(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_dit(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no safetensors or"):
        load_dit(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_dit(tmp_path / "broken.safetensors")
    (tmp_path / "model.ckpt.txt").write_text("no")
    with pytest.raises(InputError, match=r"neither \.safetensors nor one of"):
        load_dit(tmp_path / "model.ckpt.txt")
    saved_diffusers_vae(tmp_path / "vae", base_dim=3, z_dim=4)
    with pytest.raises(InputError, match="holds a AutoencoderKLWan, not a WanTransformer3DModel"):
        load_dit(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        load_vae(tmp_path / "vae")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"not a Wan VAE checkpoint: tensor 'encoder\.conv_in\.weight' is missing"):
        load_vae(tmp_path / "other.safetensors")


class _Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_never_run_code(tmp_path):
    torch.save({"weight": _Exploit(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="weights_only=True"):
        load_vae(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_unsupported_configurations_are_named(tmp_path):
    with pytest.raises(InputError, match="attn_scales"):
        VAEConfig.from_diffusers({"attn_scales": [0.5]})
    with pytest.raises(InputError, match=r"latents_mean: expected 4 numbers \(z_dim\), got 16"):
        VAEConfig.from_diffusers({"z_dim": 4})
    with pytest.raises(InputError, match="patch_size"):
        DiTConfig.from_diffusers({"patch_size": [2, 2, 2]})
    with pytest.raises(InputError, match="added_kv_proj_dim"):
        DiTConfig.from_diffusers({"added_kv_proj_dim": 7})


def test_random_weights_depend_on_the_seed_alone():
    first, again, other = (random_weights(WanDiT, TINY_DIT, seed) for seed in (3, 3, 4))
    assert same_state(first, again)
    assert not same_state(first, other)
