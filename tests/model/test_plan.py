"""``python -m model.plan`` and the options that it shares with ``model.generate``: what is asked for is planned, and
bad input gives one line that names its option."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import plan
from model.cli.request import TEXT_ENCODER_BYTES, ClipSettings, request_for
from model.config import PRESETS
from model.csg.sampler import plan_segments
from model.machine.cards import CARDS, chosen_gpu, device_options
from model.memory import plan as plan_module
from model.memory.plan import SLOW, plan_memory
from model.memory.request import MemoryRequest
from model.pipeline.components import Components
from model.plan import main

GB = 10**9
SMALL = ("--preset", "1.3b", "--size", "256x128", "--frames", "17", "--ram", "64GB")


def told(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Returns what the command prints."""
    assert main(list(options)) == 0
    out, err = capsys.readouterr()
    assert err in ("", f"{SLOW}\n")  # on a slow machine it says what takes so long
    return out


def test_a_plan_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, *SMALL, "--vram", "8GB")
    assert out.startswith("memory plan: 256x128, 17 frames, Stage I at 128x64\n")
    assert re.search(r"about \d+ seconds on an RTX 4060, predicted", out)
    assert "text encoder on the CPU" in out
    starts = [line[2:11].strip() for line in out.splitlines()[9:15]]
    assert starts == ["text", "condition", "Stage I", "reference", "Stage II", "decode"]
    assert "Stage II  all 30 layers on the device; as they are" in out


def test_what_takes_longer_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that takes longer than two seconds says on stderr what it does meanwhile."""
    monkeypatch.setattr(plan_module, "PATIENCE", 0.0)
    assert main([*SMALL, "--vram", "8GB"]) == 0
    assert capsys.readouterr().err == f"{SLOW}\n"


def asked(*options: str) -> MemoryRequest:
    """Returns the request of a command line."""
    return plan.request_of(plan.PlanSettings(**vars(plan.build_parser().parse_args(options))))


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    read = json.loads(told(capsys, *SMALL, "--vram", "8GB", "--json"))
    assert read == plan_memory(asked(*SMALL, "--vram", "8GB")).to_json()
    assert (read["vram_bytes"], read["ram_bytes"], read["gpu"]) == (8 * GB, 64 * GB, "RTX 4060")


def test_every_option_is_in_the_request() -> None:
    options = (
        "--preset 1.3b --size 1280x704 --frames 33 --mode causal --steps 8 --stage1-steps 6 --quantize int8"
        " --matmul 8bit --gpu H200 --ram 24GiB --vae-memory 4GB --dtype float16 --no-text-encoder --from-files"
        " --blocks 2 --left 2 --right 1 --no-anchor"
    )
    expected = {
        "size": (1280, 704), "motion_size": (640, 352), "num_frames": 33, "mode": "causal", "steps": 8,
        "stage_one_steps": 6, "quantize": "int8", "matmul": "8bit", "gpu": CARDS["H200"], "capability": 90,
        "vram": 12 * GB, "ram": 24 * 2**30, "vae_limit": 4 * GB, "dtype": torch.float16, "text_encoder_bytes": 0,
        "from_files": True, "plan": plan_segments(9, 2, 2, 1, anchor=False),
    }  # fmt: skip
    found = asked("--vram", "12GB", *options.split())
    assert {name: getattr(found, name) for name in expected} == expected
    expected = {
        "size": (2560, 1408), "num_frames": 81, "gpu": CARDS["RTX 4070"], "capability": 89, "ram": None,
        "dtype": torch.bfloat16, "text_encoder_bytes": TEXT_ENCODER_BYTES, "from_files": False,
    }  # fmt: skip
    found = asked("--vram", "12GB", "--ram", "none")
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.stage_one.config == PRESETS["14b-1.3b"].stage_one


def test_components_say_what_is_in_8_bits_and_in_files() -> None:
    """A second expert, another VAE and 8-bit tensors are taken from the models of a command."""
    base = Components.from_preset("1.3b", 0, torch.bfloat16, torch.device("cpu"))
    small = replace(base.vae_config, base_dim=48, decoder_base_dim=48)
    stored = {"stage1": {"blocks.0.ffn.net.2.weight": "float8_e4m3fn"}, "stage1_low_noise": {}}
    components = replace(
        base, parts=dict.fromkeys(("stage1_low_noise", "stage1_vae")), stage_one_vae_config=small, weights=Path("."),
        stored=stored,
    )  # fmt: skip
    options = {"size": (640, 352), "num_frames": 17, "plan": plan_segments(5), "gpu": CARDS["RTX 4090"]}
    found = request_for(components, **options, text_encoder=True, vram=8 * GB)
    assert found.stage_one.stored == stored["stage1"]
    assert found.low_noise is not None
    assert dict(found.low_noise.stored) == dict(found.stage_two.stored) == {}
    assert found.motion_vae == small
    assert found.from_files
    assert found.text_encoder_bytes == TEXT_ENCODER_BYTES
    plain = request_for(base, **options)
    assert (plain.low_noise, plain.motion_vae, plain.from_files, plain.text_encoder_bytes) == (None, None, False, 0)


def test_a_gpu_that_is_there_is_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default is the memory and speed of the GPU that is there; a larger limit than it has is another card's."""
    card = type("Properties", (), {"total_memory": 24 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *given: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *given: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *given: (8, 9))
    assert device_options(torch.device("cuda")) == {"vram": 24 * 2**30, "capability": 89, "gpu": CARDS["RTX 4090"]}
    assert device_options(torch.device("cpu")).items() >= {"vram": None, "capability": None}.items()
    # What others hold of the card is not there for a clip.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11 * 2**30, 24 * 2**30))
    found = ClipSettings(size="64x64", frames=5).memory()
    assert (found.usable, found.capability, found.gpu) == (pytest.approx(11 * 2**30), 89, CARDS["RTX 4090"])
    assert ClipSettings(size="64x64", frames=5, vram="8GB").memory().vram == 8 * GB
    read = json.loads(told(capsys, *SMALL, "--json"))
    assert (read["vram_bytes"], read["gpu"]) == (24 * 2**30, "RTX 4090")
    assert chosen_gpu(None, 8 * GB) == CARDS["RTX 4090"]
    assert chosen_gpu(None, 80 * GB) == CARDS["H100"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--size 100x100", "size: width and height must be multiples of 16"),
        ("--frames 80", "frames: expected 1 + 4n"),
        ("--quantize none --matmul 8bit", "matmul: 8bit goes with quantize auto"),
        ("--stage1-lora x.safetensors", "lora: expected --weights too"),
    ],
)
def test_what_does_not_fit_the_models_is_one_line(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--vram", "8GB", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
