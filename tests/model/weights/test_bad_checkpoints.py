"""Files that are damaged, made by hand or no checkpoints are refused in one line, by loaders and ``model.inspect``."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import DiTConfig, InputError, VAEConfig, WanDiT, WanVAE, load_dit, load_vae
from model.config import PRESETS
from model.weights.load import random_weights
from tests.model.dit.test_model import saved_diffusers_dit
from tests.model.vae.test_model import saved_diffusers_vae
from tests.model.weights.conftest import DIT
from tests.support.lora_spellings import saved

CLIP_DIT = replace(DIT, image_dim=4, added_kv=True, pos_embed_seq_len=6)
VAES = {
    "2.1": VAEConfig(base_dim=4, decoder_base_dim=8),
    "2.2": replace(PRESETS["5b"].vae, base_dim=4, decoder_base_dim=8),
}


@pytest.fixture
def refused(inspected):
    """Checks that a file is said not to load, with this exit code, and that the loader says why in one line."""

    def check(path, code, *words, load=load_dit):
        given, printed = inspected(path)
        assert given == code
        (report,) = printed["checkpoints"]
        assert report["loads"] is False
        with pytest.raises(InputError) as error:
            load(path)
        for text in (report["problem"], str(error.value)):
            assert "\n" not in text
            assert "weights_only" not in text  # torch's advice to trust a pickle
            assert all(word in text for word in words), text
        assert str(path.parent) in str(error.value)

    return check


class Code:
    """An object that would make a folder as it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


ONE = {"a": torch.zeros(1)}
INDEX = "m.safetensors.index.json"
NO_PICKLE, NO_DICTIONARY = "is no pickle of tensors alone: ", "does not hold a plain dictionary of names and"
OUTSIDE = "expected names of files in its own folder"
#: Files by their names, and what is said of them: of the only file, or else of their folder.
FILES = {
    "no pickle": ({"t.pt": b"hello\n"}, f"{NO_PICKLE}damaged, or code ("),
    "a pickle of code": ({"t.pt": pickle.dumps({"a": Code()}, 4)}, "code is never run here, expected tensors"),
    "an archive of code": ({"t.pth": {"weight": Code()}}, f"{NO_PICKLE}it holds posix.mkdir; code is never run here"),
    "an object": ({"t.pth": {"dtype": VAES["2.1"]}}, "it holds model.config.VAEConfig; code is never run"),
    "numbered": ({"t.pth": {"state_dict": {1: 2}}}, NO_DICTIONARY),
    "sparse": ({"t.bin": {"a": torch.eye(2).to_sparse()}}, NO_DICTIONARY),
    "broken safetensors": ({"t.safetensors": b"\x00" * 20}, "not a readable safetensors file"),
    "another suffix": ({"model.ckpt.txt": b"no"}, "neither .safetensors nor one of"),
    "a terminal's words": ({"t.safetensors": {"a\x1b[2J": torch.ones(1)}}, r"has a tensor called 'a\x1b[2J'; expected"),
    "a list of weights": ({INDEX: {"weight_map": {"a": ["x"]}}}, "is no index of shards"),
    "too deep an index": ({INDEX: "[" * 100_000}, "is not readable JSON"),
    "an empty index": ({INDEX: {"weight_map": {}}}, "names no shards"),
    "a shard above": ({INDEX: {"weight_map": {"a": "../x.safetensors"}}}, f"names '../x.safetensors'; {OUTSIDE}"),
    "a shard of a drive": ({INDEX: {"weight_map": {"a": "C:x.safetensors"}}}, OUTSIDE),
    "a shard that is a folder": ({INDEX: {"weight_map": {"a": "x"}}, "x": os.mkdir}, "lacks the shards x"),
    "a class that is a list": (
        {"a.safetensors": ONE, "config.json": {"_class_name": ["a"]}},
        "_class_name: expected a string, got ['a']",
    ),
    "several files": ({"a.safetensors": ONE, "b.safetensors": ONE}, "name one: a.safetensors, b.safetensors"),
    "nothing": ({"x": os.mkdir}, "no safetensors or"),
    "a pipe": ({"t.safetensors": os.mkfifo}, "is neither a file nor a directory"),
    "a folder for a file": ({"diffusion_pytorch_model.safetensors": os.mkdir, "x": b""}, "is no regular file; exp"),
    "a pipe for a configuration": ({"a.safetensors": ONE, "config.json": os.mkfifo}, "is no regular file; expected a"),
}


def written(folder, files):
    """Writes files, each as its content says, and returns the path of the only one or of the folder."""
    for name, content in files.items():
        if callable(content):
            content(folder / name)
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif name.endswith(".json"):
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        elif name.endswith(".safetensors"):
            saved(folder / name, content)
        else:
            torch.save(content, folder / name)
    return folder / name if len(files) == 1 and "x" not in files else folder


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_checkpoint_is_refused(kind, tmp_path, monkeypatch, inspected):
    """A file that is no checkpoint is refused at once in one line that names it, and no code in it runs."""
    folder = tmp_path / "folder"
    folder.mkdir()
    saved(tmp_path / "x.safetensors", ONE)
    monkeypatch.chdir(tmp_path)
    files, message = FILES[kind]
    path = written(folder, files)
    for load in (load_dit, load_vae):
        with pytest.raises(InputError, match=re.escape(message)) as error:
            load(path)
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)
        assert str(path) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["folder", "x.safetensors"]
    if path.suffix:
        code, printed = inspected(path)
        assert code == 2
        assert message in printed["checkpoints"][0]["problem"]


@pytest.mark.parametrize("load", [load_dit, load_vae])
def test_paths_without_a_file_are_refused(load, tmp_path):
    for path, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / ("x" * 5000), "cannot be read"),
        (Path("/dev/null"), "/dev/null is neither a file nor a directory"),
    ):
        with pytest.raises(InputError, match=message):
            load(path)


CHANGES = {
    "a deciding shape": (
        {"patch_embedding.weight": torch.zeros(2, 2)},
        "tensor 'patch_embedding.weight' has the shape [2, 2], expected 5 sizes above 0",
    ),
    "complex": (
        {"blocks.0.self_attn.q.bias": torch.zeros(128, dtype=torch.complex64)},
        "blocks.0.self_attn.q.bias is complex64, expected floats",
    ),
    # Nobody can know which of two was meant.
    "two names": (
        {"blocks.1.attn1.to_q.weight": torch.zeros(128, 128)},
        "holds blocks.1.attn1.to_q.weight twice, as blocks.1.",
    ),
    "a format that is no JSON": ({"blocks.0.ffn.0.comfy_quant": torch.zeros(2)}, "how its layers are quantised is not"),
    # So many layers would take minutes to build, and Python refuses 5000 digits.
    "a huge number": ({f"blocks.{'9' * 5000}.x": torch.zeros(1)}, f"surplus blocks.{'9' * 5000}.x; missing blocks.2."),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_message_names_the_tensor_and_what_is_wrong_with_it(kind, wan, refused):
    changes, message = CHANGES[kind]
    refused(wan(changes), 2 if "quantised" in message else 1, message)


def test_every_tensor_that_does_not_fit_is_named_in_one_error(wan, state, tmp_path):
    changed = {name: x for name, x in state.items() if name not in ("blocks.1.self_attn.q.bias", "head.head.bias")}
    changed |= {"blocks.0.extra": torch.zeros(3), "blocks.0.ffn.2.weight": torch.zeros(128, 9)}
    with pytest.raises(InputError) as error:
        load_dit(saved(tmp_path / "x.safetensors", changed))
    for part in (
        "4 tensors: surplus blocks.0.extra",
        "missing blocks.1.attn1.to_q.bias (128,)",
        "missing proj_out.bias (64,)",
        "misshapen blocks.0.ffn.2.weight: (128, 9), expected (128, 8)",
    ):
        assert part in str(error.value)


ENDS = [f"{name}.weight" for name in ("encoder.conv_in", "decoder.conv_out", "post_quant_conv")]
#: The tensors that a configuration is inferred from.
DECIDING = {
    "DiT": (
        *("patch_embedding.weight", "proj_out.weight", "blocks.0.ffn.net.0.proj.weight"),
        *(f"condition_embedder.{name}_embedder.linear_1.weight" for name in ("text", "time")),
        *(f"condition_embedder.image_embedder.{name}" for name in ("norm1.weight", "pos_embed")),
    ),
    "2.1": ENDS,
    "2.2": ENDS,
}


@pytest.mark.parametrize("model", DECIDING)
def test_deciding_tensors_of_other_shapes_are_refused(model, tmp_path, refused):
    kind, config, load = (WanDiT, CLIP_DIT, load_dit) if model == "DiT" else (WanVAE, VAES[model], load_vae)
    state = random_weights(kind, config, 0).state_dict()
    shapes = [torch.zeros(()), torch.zeros(2, 2), torch.zeros(4, 0, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)]
    for i, key in enumerate(DECIDING[model]):
        for shape in (shapes[i % 4], shapes[(i + 1) % 4]):
            refused(saved(tmp_path / "model.safetensors", state | {key: shape}), 1, load=load)


def test_a_vae_without_its_blocks_or_with_odd_names(tmp_path, refused):
    state = random_weights(WanVAE, VAES["2.2"], 0).state_dict()
    file = saved(tmp_path / "vae.safetensors", {key: x for key, x in state.items() if "down_blocks" not in key})
    refused(file, 1, "tensors: missing encoder.down_blocks.0.resnets.0.norm1.gamma", load=load_vae)
    for name in ("decoder.odd.resample.1.weight", f"decoder.upsamples.{'9' * 5000}.time_conv.a"):
        marked = {"x.residual.0": torch.zeros(1), name: torch.zeros(1)}
        refused(saved(file, state | marked), 1, name, load=load_vae)
    saved(file, state | {f"encoder.down_blocks.{'9' * 5000}.x": torch.zeros(1)})
    refused(file, 1, "1 tensors: surplus encoder.down_blocks.999", load=load_vae)


WRONG = [0, -1, "x", [], ["a"], {}, 1.25, math.nan, math.inf, 10**30, 10**400, 99_999_999]
#: Of these keys these numbers are sensible.
SENSIBLE = {"eps": (1.25, 10**30, 99_999_999)}
KEYS = {
    "dit": (
        *("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "in_channels", "text_dim"),
        *("freq_dim", "patch_size", "eps", "cross_attn_norm", "image_dim", "pos_embed_seq_len", "added_kv_proj_dim"),
    ),
    "vae": (
        *("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "latents_mean", "latents_std"),
        *("in_channels", "is_residual"),
    ),
}


@pytest.mark.parametrize("model", KEYS)
def test_no_key_of_a_diffusers_config_takes_a_value_that_makes_no_sense(model, tmp_path, refused):
    """A key with a wrong value is refused; every key is given every third one."""
    if model == "dit":
        saved_diffusers_dit(tmp_path / "model", in_channels=36, image_dim=20, added_kv_proj_dim=48)
    else:
        saved_diffusers_vae(tmp_path / "model", base_dim=3, z_dim=4, num_res_blocks=1)
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    for i, key in enumerate(KEYS[model]):
        for value in WRONG[i % 3 :: 3]:
            if value not in SENSIBLE.get(key, ()):
                file.write_text(json.dumps({**config, key: value}))
                refused(file.parent, 1, load=load_dit if model == "dit" else load_vae)


def test_a_message_names_the_key_of_the_config_and_its_value(wan, tmp_path, refused):
    saved_diffusers_dit(tmp_path / "dit")
    file = tmp_path / "dit" / "config.json"
    config = json.loads(file.read_text())
    for key, value, message in (
        ("num_attention_heads", "x", "num_attention_heads: expected an integer of at least 1, got 'x'"),
        ("eps", math.nan, "eps: expected a finite number (of float32), got nan"),
        ("num_layers", 10_000, "its configuration has 10000 layers, and it holds "),
        ("ffn_dim", 10**30, "sizes beyond what torch can count"),
        ("quantization_config", {"quant_method": "torchao"}, "'torchao' (quantization_config of config.json)"),
    ):
        file.write_text(json.dumps({**config, key: value}))
        refused(tmp_path / "dit", 1, message)
    with pytest.raises(InputError, match="its configuration has 4000 layers, and it holds "):
        load_dit(wan(), config=replace(DIT, num_layers=4000))
    for heads in (0, "a", 3, True):
        (tmp_path / "config.json").write_text(json.dumps({"num_heads": heads}))
        with pytest.raises(InputError, match=rf"num_heads: expected .*got {heads!r}"):
            load_dit(tmp_path / "wan.safetensors")


VAE = {"base_dim": 4, "z_dim": 4, "is_residual": True, "latents_mean": [0] * 4, "latents_std": [1] * 4}
STAGES = {"dim_mult": [4, 2, 1], "temperal_downsample": [False, True]}


def test_configurations_that_cannot_run_are_named():
    """Fields that are not supported are named, and a VAE whose stages no shortcut can follow, which would fail in the
    first clip."""
    for kind, given, message in (
        (DiTConfig, {"patch_size": [2, 2, 2]}, "patch_size"),
        (DiTConfig, {"added_kv_proj_dim": 7}, "added_kv_proj_dim"),
        (VAEConfig, {"attn_scales": [0.5]}, "attn_scales"),
        (VAEConfig, {"z_dim": 4}, r"latents_mean: expected 4 numbers \(z_dim\), got 16"),
        (VAEConfig, VAE | STAGES, "dim_mult: channels after the decoder's stage 1: expected 4, a half or .*, got 8"),
        (
            VAEConfig,
            VAE | {"dim_mult": [2], "temperal_downsample": []},
            "dim_mult: expected at least two stages, got 1",
        ),
        (
            VAEConfig,
            VAE | STAGES | {"is_residual": False, "base_dim": 1},
            r"stages of 2 channels or more, got \[1, 2\]",
        ),
        (VAEConfig, VAE | {"latents_std": [1e-300] * 4}, "latents_std: expected a number above 0"),
    ):
        with pytest.raises(InputError, match=message):
            kind.from_diffusers(given)
    for given in ({"head_dim": 7}, {"freq_dim": 3}, {"eps": 1e-50}):
        with pytest.raises(InputError, match=f"{next(iter(given))}: expected "):
            DiTConfig(**given)
