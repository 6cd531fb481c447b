"""Fingerprints tell the inputs of a run apart: by samples of weights, and by all bytes of other files."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.errors import InputError
from model.resume.job import fingerprint, fingerprint_file

WEIGHTS = {
    "blocks.0.weight": torch.randn(300, 200, generator=torch.Generator().manual_seed(2)),
    "blocks.0.bias": torch.randn(300, generator=torch.Generator().manual_seed(3)).bfloat16(),
    "scale": torch.tensor(2.0),
}


def weights_at(path: Path, **changes):
    save_file({**WEIGHTS, **changes}, path)
    return fingerprint(path)


def test_the_fingerprint_of_weights_is_that_of_their_content(tmp_path):
    """The fingerprint does not depend on the file's name, its format, or its division into shards."""
    first = weights_at(tmp_path / "a.safetensors")
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert weights_at(tmp_path / "b.safetensors") == first
    turned = {key: WEIGHTS[key] for key in reversed(WEIGHTS)}
    turned["blocks.0.weight"] = WEIGHTS["blocks.0.weight"].t().contiguous().t()  # other strides
    torch.save(turned, tmp_path / "a.pth")
    torch.save({"state_dict": turned}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert fingerprint(tmp_path / "a.pth") == fingerprint(str(tmp_path / "old.pt")) == first
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, key in enumerate(WEIGHTS, start=1):
        save_file({key: WEIGHTS[key]}, shards / f"model-{number}-of-3.safetensors")
    assert fingerprint(shards) == first
    (shards / "config.json").write_text('{"num_heads": 3}')
    assert fingerprint(shards) != first


def test_other_weights_have_another_fingerprint(tmp_path):
    matrix = WEIGHTS["blocks.0.weight"]

    def with_other(row, column):
        other = matrix.clone()
        other[row, column] += 1
        return {"blocks.0.weight": other}

    first = weights_at(tmp_path / "w.safetensors")
    different = [
        with_other(0, 7),
        with_other(-1, 7),
        {"blocks.0.weight": matrix.half()},
        {"blocks.0.weight": matrix.reshape(200, 300)},
        {"blocks.0.bias": WEIGHTS["blocks.0.bias"] * torch.where(torch.arange(300) == 150, 2, 1)},
        {"scale": torch.tensor(2.5)},
        {"more": torch.zeros(1)},
    ]
    found = {weights_at(tmp_path / "w.safetensors", **changes) for changes in different}
    assert len(found | {first}) == len(different) + 1
    # Of large matrices only the outer rows are read.
    assert weights_at(tmp_path / "w.safetensors", **with_other(150, 7)) == first


def test_float8_weights_have_fingerprints_and_unknown_dtypes_are_explained(tmp_path):
    eight = WEIGHTS["blocks.0.weight"].repeat(2, 1).to(torch.float8_e4m3fn)
    found = {weights_at(tmp_path / "w.safetensors", eight=given) for given in (eight, eight[1:], eight.float())}
    assert len(found) == 3
    with pytest.raises(InputError, match=r"w\.safetensors: eight holds NaN or infinity"):
        weights_at(tmp_path / "w.safetensors", eight=torch.full((2, 2), torch.nan))
    header = json.dumps({"odd": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(InputError, match=r"odd\.safetensors: odd \(f6_e2m3\) cannot be read"):
        fingerprint(tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        fingerprint(tmp_path / "nowhere")


def test_other_files_are_read_whole(tmp_path):
    (tmp_path / "photo").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-2
    assert fingerprint_file(tmp_path / "photo") == expected
    os.mkfifo(tmp_path / "pipe")
    for name, told in (("nowhere", "does not exist"), ("pipe", "is not a file"), (".", "is not a file")):
        with pytest.raises(InputError, match=rf"lora: .* {told}"):
            fingerprint_file(tmp_path / name, "lora")
