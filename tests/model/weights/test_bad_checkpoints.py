"""Files that are damaged, made by hand or no checkpoints at all give one line that says what is wrong with which file.

Everything here goes through ``model.inspect``, whose exit code and JSON it checks, and through the loaders.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from dataclasses import replace

import pytest
import torch

from model import InputError, LoRA, VAEConfig, WanDiT, WanVAE, load_dit, load_vae, merge_loras
from model.config import PRESETS
from model.inspect import main
from model.weights.files import open_weights
from model.weights.load import random_weights
from tests.conftest import TINY_DIT
from tests.model.dit.test_model import saved_diffusers_dit
from tests.model.vae.test_model import saved_diffusers_vae
from tests.model.weights.conftest import DIT
from tests.support.lora_spellings import MODULE, pair, saved
from tests.support.tolerances import PARITY, relative_error

CLIP_DIT = replace(DIT, image_dim=4, added_kv=True, pos_embed_seq_len=6)
VAES = {
    "2.1": VAEConfig(base_dim=4, decoder_base_dim=8),
    "2.2": replace(PRESETS["5b"].vae, base_dim=4, decoder_base_dim=8),
}


@pytest.fixture
def refused(inspected):
    """Checks that a file is said not to load, with this exit code, and that the loader says why in one line."""

    def check(path, code, *words, load=load_dit, named=None):
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
        assert str(named or path) in str(error.value)

    return check


class Code:
    """An object that would make a folder as it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


NO_PICKLE, DAMAGED = "is no pickle of tensors alone: it ", "is damaged, or no such file at all ("
RUNS_CODE, NO_DICTIONARY = "code is never run here; expected tensors", "does not hold a plain dictionary of names and"
PICKLES = {
    "empty": (b"", f"{NO_PICKLE}{DAMAGED}EOFError)"),
    "text": (b"hello\n", f"{NO_PICKLE}{DAMAGED}"),
    "zeros": (b"\x00" * 50, f"{NO_PICKLE}is damaged, or holds code, which is never run here"),
    "code of protocol 4": (pickle.dumps({"a": Code()}, 4), "damaged, or holds code, which is never run here"),
    "half an archive": (b"PK\x03\x04" + b"\x00" * 50, f"{NO_PICKLE}{DAMAGED}"),
    "code": ({"weight": Code()}, f"{NO_PICKLE}holds posix.mkdir, and {RUNS_CODE}"),
    "an object": ({"dtype": VAES["2.1"], "model": {}}, f"holds model.config.VAEConfig, and {RUNS_CODE}"),
    "numbered": ({1: torch.zeros(2)}, NO_DICTIONARY),
    "numbered inside": ({"state_dict": {1: 2}}, NO_DICTIONARY),
    "sparse": ({"a": torch.eye(2).to_sparse()}, NO_DICTIONARY),
    "without data": ({"a": torch.zeros(2, device="meta")}, NO_DICTIONARY),
    "a number": (5, NO_DICTIONARY),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_of_anything_else_are_refused(kind, tmp_path, monkeypatch, refused):
    """Anything but a dictionary of tensors is refused, and no code in it runs."""
    content, message = PICKLES[kind]
    file = tmp_path / f"t.{'pt' if 'a' in kind else 'pth'}"
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    refused(file, 2, message, str(file))
    assert os.listdir(tmp_path) == [file.name]


IN_ITS_FOLDER = "expected names of files in its own folder"
INDICES = {
    "a number": ({"a": 1}, f"names 1; {IN_ITS_FOLDER}"),
    "a folder above": ({"a": "../x.safetensors"}, f"names '../x.safetensors'; {IN_ITS_FOLDER}"),
    "two kinds": ({"a": 1, "b": "x.safetensors"}, "is not a readable index of shards"),
    "a list": ({"a": ["x"]}, "is not a readable index of shards"),
    "Windows' folder above": ({"a": "..\\x.safetensors"}, IN_ITS_FOLDER),
    "a drive": ({"a": "C:x.safetensors"}, IN_ITS_FOLDER),
    "a root": ({"a": "/x.safetensors"}, IN_ITS_FOLDER),
    "no name": ({"a": ""}, f"names ''; {IN_ITS_FOLDER}"),
    "nothing": ({}, "names no shards"),
    "a folder": ({"a": "folder"}, "lacks the shards folder"),
    "too long a name": ({"a": "x" * 5000}, "cannot be read"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_names_files_in_its_own_folder(kind, state, tmp_path, refused, inspected):
    """An index that names a shard above its folder is refused, though the shard exists and would load."""
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    weight_map, message = INDICES[kind]
    saved(tmp_path / "x.safetensors", state)
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(index, 2, message, named=folder if message.startswith("lacks") else index)
    saved(folder / "other.safetensors", {"a": torch.zeros(1)})
    code, printed = inspected(folder)
    problems = {report["path"]: report["problem"] for report in printed["checkpoints"]}
    assert code == 2
    assert message in problems[str(folder)]
    assert "unknown" in problems[str(folder / "other.safetensors")]


def test_json_too_deep_to_read_or_that_gives_a_key_twice_is_refused(wan, tmp_path, refused):
    index, file, config = tmp_path / "m.safetensors.index.json", wan(), tmp_path / "config.json"
    index.write_text("[" * 100_000)
    refused(index, 2, "is not a readable index of shards")
    for text, message in (("[" * 100_000, "is not readable JSON"), ('{"a": 1, "a": 2}', "it gives 'a' twice")):
        config.write_text(text)
        refused(file, 2, message, named=config)


def test_paths_that_are_neither_files_nor_directories(tmp_path, inspected, refused):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for path, message in (
        (tmp_path / "pipe.safetensors", "is neither a file nor a directory"),
        (tmp_path / ("x" * 5000), "cannot be read"),
    ):
        for load in (load_dit, load_vae):
            with pytest.raises(InputError, match=message):
                load(path)
    with pytest.raises(InputError, match="/dev/null is neither a file nor a directory"):
        open_weights(type(tmp_path)("/dev/null"))
    refused(tmp_path / "pipe.safetensors", 2, "is neither a file nor a directory")
    with pytest.raises(SystemExit) as exited:
        inspected(tmp_path / ("x" * 5000))
    assert exited.value.code == 2
    code, printed = inspected(tmp_path)
    assert (code, len(printed["checkpoints"])) == (2, 2)
    with pytest.raises(InputError, match="cannot be read"):
        merge_loras(random_weights(WanDiT, TINY_DIT, 0), [LoRA(tmp_path / ("x" * 5000))])


def test_only_files_are_opened(state, tmp_path):
    """A folder, a pipe or a link that leads nowhere in a file's place is refused at once."""
    makers = {"a folder": os.mkdir, "a pipe": os.mkfifo, "a loop": lambda path: path.symlink_to(path.name)}
    for name, make in makers.items():
        for place in ("diffusion_pytorch_model.safetensors", "m.safetensors.index.json", "config.json"):
            folder = tmp_path / name / place.replace(".", "_")
            folder.mkdir(parents=True)
            if place == "config.json":
                saved(folder / "wan.safetensors", state)
            make(folder / place)
            with pytest.raises(InputError, match=r"expected a file|no safetensors") as error:
                load_dit(folder)
            assert str(folder) in str(error.value)


SHAPES = {
    "one number": torch.zeros(()),
    "nothing": torch.zeros(0),
    "a row": torch.zeros(3),
    "a matrix": torch.zeros(2, 2),
    "a cube": torch.zeros(2, 2, 2),
    "ones": torch.zeros(1, 1, 1, 1, 1),
    "empty": torch.zeros(4, 0, 1),
    "complex": torch.zeros(2, 2, dtype=torch.complex64),
    "an integer": torch.zeros((), dtype=torch.int64),
}


DECIDING = {
    "DiT": (
        "patch_embedding.weight",
        "proj_out.weight",
        *(f"condition_embedder.{name}_embedder.linear_1.weight" for name in ("text", "time")),
        *(f"condition_embedder.image_embedder.{name}" for name in ("norm1.weight", "pos_embed")),
        "blocks.0.ffn.net.0.proj.weight",
        "blocks.1.attn2.to_q.bias",
    )
}
for version, first in (("2.1", "conv1"), ("2.2", "resnets.0.conv1")):
    ends = "encoder.conv_in", "decoder.conv_out", "post_quant_conv"
    DECIDING[version] = tuple(f"{name}.weight" for name in (*ends, f"encoder.down_blocks.0.{first}"))


@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["DiT", *(pytest.param(version, marks=pytest.mark.slow) for version in VAES)])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_of_any_shape_in_the_place_of_others(shape, model, turn, tmp_path, refused):
    """Tensors of any shape are refused in place of those that the configuration is inferred from, and of another.

    In either turn every second tensor is replaced by each shape.
    """
    kind, config, load = (WanDiT, CLIP_DIT, load_dit) if model == "DiT" else (WanVAE, VAES[model], load_vae)
    state = random_weights(kind, config, 0).state_dict()
    for key in DECIDING[model][(list(SHAPES).index(shape) + turn) % 2 :: 2]:
        refused(saved(tmp_path / "model.safetensors", state | {key: SHAPES[shape]}), 1, load=load)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (
            {"patch_embedding.weight": torch.zeros(2, 2)},
            1,
            ["tensor 'patch_embedding.weight' has the shape [2, 2], expected 5 sizes above 0"],
        ),
        (
            {"blocks.0.self_attn.q.bias": torch.zeros(128, dtype=torch.complex64)},
            1,
            ["blocks.0.self_attn.q.bias is complex64, expected floats"],
        ),
        # Nobody can know which of two was meant.
        (
            {"blocks.1.attn1.to_q.weight": torch.zeros(128, 128)},
            1,
            ["twice", "blocks.1.self_attn.q.weight", "blocks.1.attn1.to_q.weight"],
        ),
        ({"blocks.0.ffn.0.comfy_quant": torch.zeros(2)}, 2, ["blocks.0.ffn.0.comfy_quant is float32, expected uint8"]),
        ({"blocks.0.ffn.0.weight": torch.zeros(()), "blocks.0.ffn.0.scale_weight": torch.ones(2)}, 1, []),
        ({"a\x1b[2J": torch.ones(1)}, 2, [r"has a tensor called 'a\x1b[2J'; expected printable characters"]),
    ],
    ids=["shape", "dtype", "two names", "format", "scalar with scales", "terminal"],
)
def test_a_message_names_the_tensor_and_what_is_wrong_with_it(changes, code, words, wan, refused):
    refused(wan(changes), code, *words)


@pytest.mark.parametrize("version", VAES)
def test_a_vae_without_its_blocks(version, tmp_path, refused):
    state = random_weights(WanVAE, VAES[version], 0).state_dict()
    without = {key: tensor for key, tensor in state.items() if "down_blocks" not in key}
    file = saved(tmp_path / "vae.safetensors", without)
    refused(file, 1, "tensor 'encoder.down_blocks.0.conv1.weight' is missing", load=load_vae)
    for name in ("decoder.odd.resample.1.weight", "decoder.resample", f"decoder.upsamples.{'9' * 5000}.time_conv.a"):
        marked = {"x.residual.0": torch.zeros(1), name: torch.zeros(1)}
        refused(saved(file, state | marked), 1, name, load=load_vae)


@pytest.mark.parametrize("number", ["99999", "9" * 5000])
def test_a_block_with_a_huge_number_is_surplus(number, wan, tmp_path, refused):
    """A layer with a huge number is surplus; so many would take minutes to build, and Python refuses 5000 digits."""
    start = time.perf_counter()
    file = wan({f"blocks.{number}.x": torch.zeros(1)})
    refused(file, 1, "missing blocks.2.attn1.to_q.weight")
    with pytest.raises(InputError, match=rf"surplus blocks\.{number}\.x"):
        load_dit(file)
    state = random_weights(WanVAE, VAES["2.2"], 0).state_dict()
    file = saved(tmp_path / "vae.safetensors", state | {f"encoder.down_blocks.{number}.x": torch.zeros(1)})
    refused(file, 1, "tensor 'encoder.down_blocks.4.resnets.0.conv1.weight' is missing", load=load_vae)
    assert time.perf_counter() - start < 120


WRONG = [0, -1, "x", [], ["a"], {}, True, 1.5, math.nan, math.inf, 10**30, 10**400, 99_999_999]
#: Of these keys, values of the list that are sensible; of others all are wrong.
SENSIBLE = {"cross_attn_norm": [True], "is_residual": [True], "eps": [1.5, 10**30, 99_999_999]}


@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("index", range(len(WRONG)), ids=[str(value)[:12] for value in WRONG])
def test_values_of_a_diffusers_config_are_checked(index, turn, tmp_path, refused):
    """No key takes a value that makes no sense; in either turn every second key is given each value."""
    value = WRONG[index]
    saved_diffusers_dit(tmp_path / "dit", in_channels=36, image_dim=20, added_kv_proj_dim=48)
    saved_diffusers_vae(tmp_path / "vae", base_dim=3, z_dim=4, num_res_blocks=1)
    keys = {
        "dit": (
            *("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "in_channels", "text_dim"),
            *("freq_dim", "patch_size", "eps", "cross_attn_norm", "image_dim", "pos_embed_seq_len"),
            "added_kv_proj_dim",
        ),
        "vae": (
            *("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "latents_mean", "latents_std"),
            *("in_channels", "is_residual"),
        ),
    }
    for name, load in (("dit", load_dit), ("vae", load_vae)):
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text())
        for key in keys[name][(index + turn) % 2 :: 2]:
            if any(type(value) is type(sensible) and value == sensible for sensible in SENSIBLE.get(key, ())):
                continue
            file.write_text(json.dumps({**config, key: value}))
            refused(tmp_path / name, 1, load=load)


def test_a_message_names_the_key_of_the_config_and_its_value(wan, tmp_path, refused):
    saved_diffusers_dit(tmp_path / "dit")
    file = tmp_path / "dit" / "config.json"
    config = json.loads(file.read_text())
    for key, value, code, message in (
        ("num_attention_heads", "x", 1, "num_attention_heads: expected an integer of at least 1, got 'x'"),
        ("patch_size", 2, 1, "patch_size: expected a list, got 2"),
        ("eps", math.nan, 1, "eps: expected a finite number (of float32), got nan"),
        ("num_layers", 10_000, 1, "its configuration has 10000 layers, and it holds "),
        ("ffn_dim", 10**30, 1, "sizes beyond what torch can count"),
        *(
            ("_class_name", value, 2, f"_class_name: expected a string, got {value!r}")
            for value in (["a"], {"a": 1}, 5)
        ),
    ):
        file.write_text(json.dumps({**config, key: value}))
        refused(tmp_path / "dit", code, message)
    with pytest.raises(InputError, match="its configuration has 4000 layers, and it holds "):
        load_dit(wan(), config=replace(DIT, num_layers=4000))


@pytest.mark.parametrize("heads", [0, -1, "a", [1], 3, 1.0, True])
def test_heads_of_an_original_config_are_checked(heads, wan, tmp_path, refused):
    wan()
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": heads}))
    refused(tmp_path, 1, "num_heads: expected ", f"got {heads!r}")


def test_the_config_of_an_encoder_may_say_anything(tmp_path, inspected):
    state = {
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4),
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(4, 4),
        "encoder.final_layer_norm.weight": torch.zeros(()),
    }
    saved(tmp_path / "model.safetensors", state)
    for width in ([1], {"a": 1}, "x", None):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "umt5", "num_layers": 2, "d_model": width}))
        code, printed = inspected(tmp_path)
        assert (code, printed["checkpoints"][0]["kind"]) == (1, "UMT5 text encoder")
        assert printed["checkpoints"][0]["problem"].endswith("the tensors are 2 layers of width unknown")


STAGES = {"dim_mult": [4, 2, 1], "temperal_downsample": [False, True]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (STAGES, "dim_mult: the decoder's stage 1 goes from 4 to 8 channels"),
        (
            {"dim_mult": [1, 3, 3], "temperal_downsample": [True, True]},
            "dim_mult: the encoder's stage 1 goes from 4 to 12",
        ),
        ({"dim_mult": [2], "temperal_downsample": []}, "dim_mult: expected at least two stages, got 1"),
        (STAGES | {"is_residual": False, "base_dim": 1}, "expected stages of 2 channels or more, got [1, 2]"),
        ({"latents_std": [1e-300] * 4}, "latents_std: expected a number above 0"),
        ({"latents_mean": [1e300] * 4}, "latents_mean: expected a finite number"),
    ],
)
def test_vaes_that_cannot_run_are_refused_as_they_are_loaded(config, words, tmp_path, refused):
    """A VAE of Wan2.2 whose stages no shortcut can follow is refused, and others that would fail in the first clip."""
    base = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 4, "is_residual": True}
    base |= {"latents_mean": [0] * 4, "latents_std": [1] * 4}
    (tmp_path / "config.json").write_text(json.dumps(base | config))
    saved(tmp_path / "x.safetensors", random_weights(WanVAE, VAES["2.2"], 0).state_dict())
    refused(tmp_path, 1, words, load=load_vae)


def test_a_vae_of_wan21_whose_decoder_widens_equals_diffusers(tmp_path):
    theirs = saved_diffusers_vae(tmp_path, base_dim=4, z_dim=4, num_res_blocks=1, **STAGES)
    latents = torch.randn(1, 4, 2, 2, 3)
    mean, std = (torch.tensor(theirs.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = theirs.decode(latents * std + mean).sample
        assert relative_error(load_vae(tmp_path).decode(latents), expected) < PARITY


def test_a_set_of_shards_is_whole(state, tmp_path):
    """Shards without an index are all there: those that are missing may hold whole layers, which nobody would miss."""
    names = sorted(state)
    for i in range(3):
        saved(tmp_path / f"wan-0000{i + 1}-of-00003.safetensors", {name: state[name] for name in names[i::3]})
    load_dit(tmp_path)
    (tmp_path / "wan-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds 2 shards of 3: wan-00001-of-00003\.safetensors, wan-00003"):
        load_dit(tmp_path)


def test_json_is_printed_where_nothing_can_be_inspected(wan, tmp_path, capsys):
    empty, lora, dit = tmp_path / "empty", saved(tmp_path / "lora.safetensors", pair()), wan()
    empty.mkdir()
    other = saved(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    for arguments in (
        [empty],
        [dit, "--for", dit],
        [lora, "--for", other],
        [lora, "--for", tmp_path / "nowhere"],
        [lora, "--for", empty],
        [tmp_path, "--for", other],
    ):
        assert main([*map(str, arguments), "--json"]) == 2
        printed = capsys.readouterr()
        result = json.loads(printed.out)
        assert result.keys() == {"path", "error"}
        assert result["path"] == str(arguments[0])
        assert printed.err == f"error: {result['error']}\n"


def test_one_bad_file_does_not_keep_the_others_from_being_reported(state, wan, tmp_path, inspected):
    """One bad file leaves the reports of the others, with and without a DiT to compare LoRAs with."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for name, tensors in {
        "good": pair(),
        "model": state,
        "scalar": pair() | {f"{MODULE}.lora_down.weight": torch.ones(())},
        "inf": pair() | {f"{MODULE}.alpha": torch.tensor(math.inf)},
        "shape": state | {"patch_embedding.weight": torch.zeros(())},
    }.items():
        saved(folder / f"{name}.safetensors", tensors)
    (folder / "empty.pth").write_bytes(b"")
    (folder / "hello.pt").write_bytes(b"hello\n")
    torch.save({1: torch.zeros(1)}, folder / "numbered.bin")
    expected = {"good": 0, "model": 0, "scalar": 1, "inf": 1, "shape": 1, "empty": 2, "hello": 2, "numbered": 2}
    for options, codes in (((), expected), (("--for", wan()), expected | {"model": 2, "shape": 2})):
        code, printed = inspected(folder, *options)
        assert code == 2
        reports = {os.path.basename(report["path"]).split(".")[0]: report for report in printed["checkpoints"]}
        assert {name: report["exit_code"] for name, report in reports.items()} == codes
        assert all((report["problem"] is None) == (report["exit_code"] == 0) for report in reports.values())
