"""Every command ends at bad options before work, in one line."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file

from model import generate, inspect, plan
from model.cli.options import run_command
from model.cli.request import _fingerprint_lora
from model.weights.lora import LoRA


@pytest.mark.parametrize("command", ["model.generate", "model.plan", "model.inspect", "bench.__main__"])
def test_a_backend_of_another_word_is_one_line_before_any_work(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SWIFTI2V_BACKEND", "cuda")
    monkeypatch.chdir(tmp_path)
    arguments = {"model.inspect": ["file"], "bench.__main__": ["cost"]}.get(command, [])
    assert importlib.import_module(command).main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: SWIFTI2V_BACKEND: expected one of auto, torch, triton, got 'cuda'\n"
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


#: More digits than Python reads as a number.
DIGITS = "9" * 5000
#: Options of model.generate, as text with spaces between or as a list, and words of the line that refuses them.
REFUSED = [
    ("--frames 4000000001", "--frames: expected an integer from 1 to 10001, got '4000000001'"),
    ("--frames \u0668\u0661", "--frames: expected an integer from 1 to 10001"),
    (["--seed", DIGITS], "--seed: expected an integer from 0 to 18446744073709551613"),
    ("--left -1", "--left: expected an integer from 0 to 1000000000, got '-1'"),
    (["--shift", f"1e{DIGITS}"], "--shift: expected a number from 0.001 to 1000"),
    ("--shift nan", "--shift: expected a number from 0.001 to 1000, got 'nan'"),
    ("--vram 8", "vram: expected a size from 1MB to 1000TB, such as 12GB, got '8', which is bytes; did you mean 8GB?"),
    ("--ram 16", "did you mean 16GB?"),
    ("--vae-memory 0.0000001GB", "vae-memory: expected a size from 1MB"),
    (["--size", f"{DIGITS}x16"], "size: expected WIDTHxHEIGHT"),
    ("--size 16400x16", "size: expected at most 16384 pixels a side and 35,651,584 a frame"),
    (["--preset", ""], "preset: unknown ''"),
    (["--device", ""], "device: expected auto, cpu or cuda, got ''"),
    (["--prompt", "x" * 100_001], "--prompt: expected at most 100000 characters, got 100001"),
    (["--prompt", "a\0"], "--prompt: expected text in UTF-8 without zero bytes, got 'a\\x00'"),
    (["--out", ""], "--out: expected a name in UTF-8 without control characters, got ''"),
    ("--out clip.mp4.", "out: expected a name that ends in .mp4"),
    ("--out new/" + "x" * 300 + "/clip.mp4", "--out: expected names of at most 255 and a path of at most 3800 bytes"),
    ("--out " + "/".join(["x" * 200] * 20) + ".mp4", "a path of at most 3800 bytes"),
    ("--out loop", "--out: expected a name that can be looked up (Too many levels of symbolic links)"),
    ("--out photo.mp4", "out: photo.mp4 is PHOTO, which the video would replace"),
    ("--out pipe.mp4", "out: pipe.mp4"),
    ("--state photo.mp4", "photo.mp4 is not a folder"),
    ("--state photo.mp4/run", "state: cannot write"),
    ("--state clip.mp4", "state: expected a folder of the run alone, got clip.mp4"),
    ("--state clip.partial.mp4", "state: expected a folder of the run alone, got clip.partial.mp4"),
    (["--stage1-lora", "\0", "--weights", "new"], "got '\\x00': expected a name in UTF-8"),
    (
        ["--stage1-lora", "x:\uff11", "--weights", "new"],
        "--stage1-lora: expected FILE or FILE:STRENGTH, got 'x:",
    ),
    (["--quantize", DIGITS], "--quantize: invalid choice"),
]
REFUSED_BY_PLAN = [
    ("--vram 8", "did you mean 8GB?"),
    (["--vram", ""], "vram: expected a size such as 12GB"),
    ("--vram 12x", "vram: expected a size such as 12GB, 12GiB or 500MB, got '12x'"),
    ("--vram auto", "vram: expected a size such as 12GB, since torch sees no GPU"),
    (["--vram", "8GB", "--gpu", ""], "gpu: unknown ''; choose one of H100"),
    (["--vram", "8GB", "--preset", ""], "preset: unknown ''"),
]


COMMANDS = (
    (generate, ["photo.mp4", "--out", "clip.mp4"], REFUSED),
    (plan, [], REFUSED_BY_PLAN),
    (inspect, ["photo.mp4"], [(["--for", ""], "--for: expected a name")]),
)


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        pytest.param(
            command, [*first, *(given.split(" ") if isinstance(given, str) else given)], words, id=ascii(words)
        )
        for command, first, cases in COMMANDS
        for given, words in cases
    ],
)
def test_bad_options_are_one_line_before_weights_are_opened_or_anything_is_written(
    command: ModuleType,
    options: list[str],
    words: str,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def opened(*given: object) -> NoReturn:
        raise AssertionError("weights were opened")

    monkeypatch.setattr("model.cli.request.build_components", opened)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(photo.parent)
    shutil.move(photo, "photo.mp4")
    os.symlink("loop", "loop")
    os.mkfifo("pipe.mp4")
    try:
        code = command.main(options)
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert len(err) < 4200
    assert sorted(os.listdir()) == ["loop", "photo.mp4", "pipe.mp4"]


def test_the_fingerprint_of_a_lora_is_that_of_its_scales_too(tmp_path: Path) -> None:
    """PEFT's alpha is in a file beside the LoRA: a run does not go on with another."""
    factors = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 8),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(8, 2),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    found = set()
    for alpha in (4, 64):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
        found |= {_fingerprint_lora(LoRA(path)) for path in (tmp_path, tmp_path / "adapter_model.safetensors")}
    assert len(found) == 2


def test_lack_of_memory_is_one_line_and_other_errors_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(message: str) -> NoReturn:
        raise RuntimeError(message)

    assert run_command(lambda: failing("CUDA error: out of memory")) == 1
    assert capsys.readouterr().err.startswith("error: out of memory; try a smaller --size")
    with pytest.raises(RuntimeError, match="mat1"):
        run_command(lambda: failing("mat1 and mat2 shapes cannot be multiplied"))
