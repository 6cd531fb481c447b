"""``python -m model.inspect`` says what a file is, in every layout that the tests can write, and whether it loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from model import DiTConfig, InputError, VAEConfig, WanDiT, WanVAE, load_dit, load_vae
from model.config import PRESETS
from model.inspect import checkpoints_in, inspect_checkpoint, main
from model.weights.load import random_weights
from model.weights.recognise import describe_dit, describe_vae
from tests.conftest import TINY_DIT
from tests.model.dit.test_model import saved_diffusers_dit
from tests.model.pipeline.test_encoders import save_text_encoder
from tests.model.vae.test_model import saved_diffusers_vae
from tests.support.original_names import float8_with_scales, original_dit, original_vae

DIT = DiTConfig(num_heads=1, num_layers=2, ffn_dim=96, in_channels=36, text_dim=32, freq_dim=64)
CLIP_DIT = replace(DIT, image_dim=20, added_kv=True)
VAE_21 = VAEConfig(base_dim=4, decoder_base_dim=8)


def original(config=DIT):
    return original_dit(random_weights(WanDiT, config, 0).state_dict())


def saved(path, state, metadata=None):
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata=metadata)
    return path


def lora(state, module, rank=4, prefix="diffusion_model."):
    """Returns factors for one module of an original checkpoint."""
    out, width = state[f"{module}.weight"].shape
    return {
        f"{prefix}{module}.lora_down.weight": torch.zeros(rank, width),
        f"{prefix}{module}.lora_up.weight": torch.zeros(out, rank),
    }


def test_an_original_file_with_prefix_and_scaled_float8(tmp_path):
    """The report agrees with tensors, bytes and parameters counted by hand, and the file does load."""
    state = original(CLIP_DIT)
    stored, _ = float8_with_scales(state)
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    file = saved(tmp_path / "wan.safetensors", {f"model.diffusion_model.{key}": stored[key] for key in stored})
    report = inspect_checkpoint(file)
    assert (report.kind, report.loads, report.exit_code, report.problem) == ("Wan DiT", True, 0, None)
    assert report.loaded_by == "load_dit"
    assert report.description == "I2V with CLIP (Wan2.1), own size (width 128, 2 layers, 36 -> 16 channels)"
    assert report.details["image_dim"] == 20
    assert report.dtypes == {"float32": len(stored) - 25, "float8_e4m3fn": 25}
    assert report.tensors == len(stored)
    assert report.parameters == sum(tensor.numel() for tensor in state.values())
    assert report.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert report.layout == (
        "names of the Wan repositories",
        "prefix model.diffusion_model. (as ComfyUI)",
        "8 bits with scales: 24 x float8_e4m3fn, one scale a tensor",
        "one file",
    )
    assert load_dit(file).config == CLIP_DIT


def test_a_diffusers_directory_in_shards(tmp_path, capsys):
    theirs = saved_diffusers_dit(tmp_path / "dit")
    assert main([str(tmp_path / "dit")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        str(tmp_path / "dit"),
        "  what    Wan DiT, T2V, own size (width 48, 2 layers, 16 -> 16 channels)",
        "  layout  names of diffusers; config.json of WanTransformer3DModel; sharded in 4 files",
    ]
    assert lines[3] == f"  tensors {len(theirs.state_dict())} float32"
    assert lines[4].startswith(f"  size    {sum(p.numel() for p in theirs.parameters()):,} parameters, ")
    assert lines[5] == "  loads   yes, by load_dit"


def test_both_vaes_and_pickles(tmp_path):
    vae_22 = replace(PRESETS["5b"].vae, base_dim=4, decoder_base_dim=8)
    for config, words in (
        (VAE_21, "version 2.1 (4x8x8, 16 channels)"),
        (vae_22, "version 2.2 (4x16x16, 48 channels)"),
    ):
        state = random_weights(WanVAE, config, 0).state_dict()
        torch.save(original_vae(state, config.num_res_blocks, config.residual), tmp_path / "vae.pth")
        report = inspect_checkpoint(tmp_path / "vae.pth")
        assert (report.kind, report.description, report.loaded_by) == ("Wan VAE", words, "load_vae")
        assert report.layout == ("names of the Wan repositories", "one file")
        assert load_vae(tmp_path / "vae.pth").config == config
        assert describe_vae(config) == words
    saved_diffusers_vae(tmp_path / "theirs", base_dim=3, z_dim=4, num_res_blocks=1)
    assert inspect_checkpoint(tmp_path / "theirs").loads


VARIANTS = {
    "T2V, 1.3B": DiTConfig(),
    "T2V (Wan2.1, or an expert of Wan2.2 T2V-A14B), 14B": replace(PRESETS["14b-1.3b"].stage_one, in_channels=16),
    "I2V without CLIP (an expert of Wan2.2 I2V-A14B), 14B": PRESETS["14b-1.3b"].stage_one,
    "I2V with CLIP, first and last frame (Wan2.1 FLF2V), 14B": replace(
        PRESETS["14b-1.3b"].stage_one, image_dim=1280, added_kv=True, pos_embed_seq_len=514
    ),
    "Wan2.2 TI2V, 5B": PRESETS["5b"].stage_one,
    "I2V without CLIP (Stage II of SwiftI2V), 1.3B": PRESETS["1.3b"].stage_two,
    "another input than latents, mask and reference: for load_dit, not for model.generate, 1.3B": DiTConfig(
        in_channels=48
    ),
}


@pytest.mark.parametrize("words", VARIANTS)
def test_published_variants_are_told_apart(words):
    config = VARIANTS[words]
    assert describe_dit(config).startswith(f"{words} (width {config.dim}, {config.num_layers} layers, ")


def test_encoders_as_transformers_saves_them_and_as_others_ship_them(tmp_path):
    _, model = save_text_encoder(tmp_path)
    report = inspect_checkpoint(tmp_path / "text_encoder")
    assert (report.kind, report.exit_code) == ("UMT5 text encoder", 0)
    assert report.loaded_by == "encode_prompt, as text_encoder of a weights directory"
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "encoder.embed_tokens.weight"}
    alone = saved(tmp_path / "umt5.safetensors", state | {"spiece_model": torch.zeros(9).byte()})
    report = inspect_checkpoint(alone)
    assert (report.kind, report.exit_code) == ("UMT5 text encoder", 1)
    assert report.problem == (
        "expected a directory as transformers saves it, its config.json with model_type 'umt5', got None"
    )
    vision = CLIPVisionConfig(hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    CLIPVisionModel(vision).save_pretrained(tmp_path / "image_encoder")
    report = inspect_checkpoint(tmp_path / "image_encoder")
    assert (report.kind, report.exit_code) == ("CLIP image encoder", 0)
    settings = tmp_path / "image_encoder" / "config.json"
    settings.write_text(settings.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    assert inspect_checkpoint(tmp_path / "image_encoder").problem == "config.json says 4 layers, the tensors are 3"
    theirs = saved(tmp_path / "wan_t5.safetensors", {"token_embedding.weight": torch.zeros(7, 4)})
    assert (inspect_checkpoint(theirs).kind, inspect_checkpoint(theirs).exit_code) == ("UMT5 text encoder", 1)


def test_a_lora_its_ranks_and_targets_and_whether_it_fits(tmp_path, capsys):
    state = original()
    dit = saved(tmp_path / "dit.safetensors", state)
    tensors = {}
    for i in range(2):
        for name, rank in (("self_attn.q", 4), ("ffn.0", 8)):
            tensors |= lora(state, f"blocks.{i}.{name}", rank)
    tensors["diffusion_model.head.diff_m"] = torch.zeros(1, 2, 128)
    file = saved(tmp_path / "lora.safetensors", tensors)
    report = inspect_checkpoint(file)
    assert (report.kind, report.exit_code) == ("LoRA", 0)
    assert report.details == {
        "ranks": {4: 2, 8: 2},
        "differences": 1,
        "targets": {"blocks.*.attn1.to_q.weight": 2, "blocks.*.ffn.net.0.proj.weight": 2, "scale_shift_table": 1},
        "widths": [128],
        "left_out": 0,
    }
    assert main([str(file), "--for", str(dit), "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert printed["loaded_by"] == f"load_dit(loras=...) and merge_loras; it fits {dit}"
    small = saved(tmp_path / "small.safetensors", original(replace(DIT, num_layers=1)))
    assert main([str(file), "--for", str(small)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 5 pairs and differences are left out" in printed
    assert "diffusion_model.blocks.1.ffn.0.lora_up.weight (the model has no blocks.1.ffn.net.0.proj.weight)" in printed
    assert main([str(dit), "--for", str(dit)]) == 2
    assert f"NO: for: expected a LoRA to hold against a DiT, got {dit}: Wan DiT\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="not a Wan DiT checkpoint"):
        inspect_checkpoint(file, saved(tmp_path / "none.safetensors", {"a": torch.zeros(1)}))


RELATIVES = {
    "vace_blocks.0.before_proj.weight": "Wan VACE",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Wan Animate",
    "casual_audio_encoder.encoder.final_linear.weight": "Wan S2V",
    "control_adapter.conv.weight": "Wan Fun Camera",
    "ref_conv.weight": "Wan Fun Control",
    "audio_proj.audio_proj_glob_1.layer.bias": "Wan with an audio branch (MultiTalk, HuMo)",
}
FAMILIES = {
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo",
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight": "HunyuanVideo",
    "patchify_proj.weight": "LTX-Video",
    "audio_patchify_proj.weight": "LTX-2",
    "patch_embed.text_proj.weight": "CogVideoX",
    "blocks.0.attn.qkv_x.weight": "Mochi",
    "double_blocks.0.img_attn.qkv.weight": "FLUX or a relative",
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("key", [*RELATIVES, *FAMILIES])
def test_other_models_are_called_by_name_and_said_not_to_load(key, prefix, tmp_path):
    """Relatives of Wan, which have all of its tensors and more, are named and do not load."""
    state = {key: torch.zeros(2)} | (original(TINY_DIT) if key in RELATIVES else {"other.weight": torch.zeros(2)})
    file = saved(tmp_path / "model.safetensors", {prefix + name: tensor for name, tensor in state.items()})
    report = inspect_checkpoint(file)
    assert (report.kind, report.loads, report.exit_code) == ((RELATIVES | FAMILIES)[key], False, 1)
    assert report.problem.startswith("this project's DiT has no ")


def without(state, *words):
    return {name: tensor for name, tensor in state.items() if not any(word in name for word in words)}


DORA = {"blocks.0.attn1.to_q.lora_magnitude_vector.weight": torch.zeros(128)}
FLUX = {f"double_blocks.{i}.img_mod.lin.lora_{kind}.weight": torch.zeros(4, 4) for i in range(30) for kind in "AB"}
NVFP4 = {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
PIPELINE = {"first_stage_model.conv1.weight": torch.zeros(1), "text_encoders.umt5xxl.shared.weight": torch.zeros(1)}
#: What is made of an original checkpoint, and what its report says: kind, exit code, and words of it.
FILES = {
    "a DoRA": (lambda state: lora(state, "blocks.0.self_attn.q") | DORA, "LoRA", 1, ["is DoRA"]),
    "a LoRA of FLUX": (
        *(lambda state: FLUX, "LoRA", 1),
        ["60 keys do not fit any Wan DiT (0 of 30 pairs", "; and 40 more"],
    ),
    "a LoRA of both experts": (
        lambda state: {
            **lora(state, "blocks.0.self_attn.q", prefix="transformer."),
            **lora(state, "blocks.1.ffn.2", prefix="transformer_2."),
        },
        *("LoRA", 0, ["; 2 tensors of the other expert left out; on blocks.*.attn1.to_q x1\n"]),
    ),
    "VACE's control blocks alone": (lambda state: {"vace_blocks.0.norm3.bias": torch.zeros(2)}, "Wan VACE", 1, []),
    "an audio projection alone": (lambda state: {"audio_proj.weight": torch.zeros(2)}, "unknown", 2, []),
    "NVFP4": (
        *(lambda state: state | NVFP4, "Wan DiT", 1),
        ["I2V without CLIP", "is quantised as nvfp4 in blocks.0.ffn.0; expected floats", "quantised: 1 x nvfp4"],
    ),
    "tensors that lack": (
        *(lambda state: without(state, "blocks.1.ffn.0.weight", "blocks.0.self_attn.q.bias"), "Wan DiT", 1),
        ["missing blocks.0.attn1.to_q.bias (128,); missing blocks.1.ffn.net.0.proj.weight (96, 128)"],
    ),
    "wan-00001-of-00002": (
        *(lambda state: without(state, "blocks.1", "blocks.0.self_attn.q.bias"), "Wan DiT", 1),
        ["one shard of several; name their directory or .index.json"],
    ),
    "float8": (
        *(lambda state: {name: tensor.to(torch.float8_e5m2) for name, tensor in state.items()}, "Wan DiT", 0),
        ["names of the Wan repositories; float8 without scales; one file", " float8_e5m2\n"],
    ),
    "a pipeline": (
        *(lambda state: {f"model.diffusion_model.{key}": state[key] for key in state} | PIPELINE, "Wan DiT", 0),
        ["a whole pipeline in one file: DiT, VAE, text encoder"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_is_and_what_keeps_it_from_loading_is_said(name, tmp_path):
    make, kind, exit_code, words = FILES[name]
    report = inspect_checkpoint(saved(tmp_path / f"{name}.safetensors", make(original())))
    assert (report.kind, report.exit_code, report.loads) == (kind, exit_code, exit_code == 0)
    for word in words:
        assert word in str(report)


def test_another_class_of_diffusers_is_called_by_its_name(tmp_path):
    (tmp_path / "other").mkdir()
    saved(tmp_path / "other" / "diffusion_pytorch_model.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLMochi"}))
    report = inspect_checkpoint(tmp_path / "other")
    assert (report.kind, report.exit_code) == ("AutoencoderKLMochi of diffusers", 1)


def test_a_directory_is_all_of_its_checkpoints_and_the_worst_exit_code(tmp_path, capsys):
    """All checkpoints are reported: of a diffusers pipeline, a --weights folder, a Wan repository, single files."""
    saved_diffusers_dit(tmp_path / "pipeline" / "transformer")
    saved_diffusers_vae(tmp_path / "pipeline" / "vae", base_dim=3, z_dim=4, num_res_blocks=1)
    save_text_encoder(tmp_path / "pipeline")
    assert main([str(tmp_path / "pipeline"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {Path(entry["path"]).name: entry["kind"] for entry in printed["checkpoints"]} == {
        "transformer": "Wan DiT",
        "vae": "Wan VAE",
        "text_encoder": "UMT5 text encoder",
    }
    wan = tmp_path / "wan"
    wan.mkdir()
    saved(wan / "diffusion_pytorch_model.safetensors", original())
    saved(wan / "lora.safetensors", {"x.lora_A.weight": torch.zeros(2, 2)})
    assert [path.name for path in checkpoints_in(wan)] == ["wan", "lora.safetensors"]
    assert main([str(wan)]) == 1
    (wan / "broken.safetensors").write_bytes(b"")
    assert main([str(wan)]) == 2
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert main([str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.startswith("error: weights: no safetensors or ")


def test_only_headers_are_read(tmp_path, monkeypatch):
    """No tensor of a whole model is asked for; of a LoRA its alphas are."""
    state = original()
    factors = lora(state, "blocks.0.self_attn.q") | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(2.0)}
    files = [saved(tmp_path / "lora.safetensors", factors), saved(tmp_path / "wan.safetensors", state)]
    read, handle = [], safetensors.safe_open

    class Recorder:
        def __init__(self, *args, **options):
            self._handle = handle(*args, **options)

        def __getattr__(self, name):
            return getattr(self._handle, name)

        def get_tensor(self, key):
            read.append(key)
            return self._handle.get_tensor(key)

    monkeypatch.setattr("safetensors.safe_open", Recorder)
    assert inspect_checkpoint(files[0], files[1]).exit_code == inspect_checkpoint(files[1]).exit_code == 0
    assert read == ["diffusion_model.blocks.0.self_attn.q.alpha"]
    load_dit(files[1])
    assert len(read) > len(state)
