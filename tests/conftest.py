"""Seeds, tiny models and the rules for what runs where."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from bench.hardware.tests import HARDWARE
from bench.static.compile_only import quiet_exit
from model import DiTConfig, VAEConfig, WanDiT, WanVAE
from model.weights.load import random_weights
from tests.support import compatibility

TINY_DIT = DiTConfig(
    num_heads=2, head_dim=24, num_layers=2, ffn_dim=64, in_channels=12, out_channels=4, text_dim=16, freq_dim=32
)
TINY_VAE = VAEConfig(
    base_dim=4,
    decoder_base_dim=4,
    z_dim=4,
    num_res_blocks=1,
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1, 2, 3, 1),
)
#: What the tests of this session speak for.
COMPATIBILITY = pytest.StashKey[set[compatibility.Pair]]()

quiet_exit()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Three processes: interpreter, sanitizer, and all else, because Triton is set up once for each.

    Plain ``pytest`` runs all of them: tests/test_processes.py starts the first two.
    """
    here = Path(__file__).parent
    if collection_path.parent != here or not (collection_path.is_dir() or collection_path.name.startswith("test_")):
        return None
    room = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "sanitizer" if "ttsem" in sys.modules else ""
    if room:
        return collection_path.name != room
    return collection_path.name in ("interpreter", "sanitizer", "launcher")


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option of this project's own."""
    parser.addoption("--compatibility", action="store_true", help="write what passes to docs/compatibility.md")


def pytest_configure(config: pytest.Config) -> None:
    """Benchmarks are timed, and the table of compatibility is written, where they are asked for."""
    if config.getoption("--compatibility"):
        config.pluginmanager.register(compatibility.Recorder())
    if "benchmark" not in (config.option.markexpr or "") and hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run where there is one, and say so where there is none.

    Raises:
        UsageError: one is in a file that the campaign does not look into.
    """
    config.stash[COMPATIBILITY] = {pair for item in items for pair in compatibility.pairs(item)}
    for item in items:
        if item.get_closest_marker("gpu") and not item.path.match(HARDWARE):
            raise pytest.UsageError(f"{item.nodeid}: marked gpu, so it belongs into a file tests/{HARDWARE}")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_dit() -> WanDiT:
    """A Stage II DiT for latents of 4 channels."""
    return random_weights(WanDiT, TINY_DIT, 1)


@pytest.fixture
def tiny_vae() -> WanVAE:
    """A Wan2.1-shaped VAE with 4 latent channels."""
    return random_weights(WanVAE, TINY_VAE, 2)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photograph-like JPEG, not square."""
    # Hardware tests run where Pillow may be missing; only those that want a photograph need it.
    pytest.importorskip("PIL")
    from PIL import Image, ImageDraw

    image = Image.linear_gradient("L").resize((150, 100)).convert("RGB")
    ImageDraw.Draw(image).ellipse((40, 20, 110, 90), fill=(200, 80, 40))
    path = tmp_path / "photo.jpg"
    image.save(path)
    return path


@pytest.fixture
def inspected(capsys):
    """Runs the command twice, as text and as JSON; returns the exit code and what the JSON says."""

    def run(path, *options):
        from model.inspect import main

        code = main([str(path), *map(str, options)])
        capsys.readouterr()
        assert main([str(path), *map(str, options), "--json"]) == code
        printed = capsys.readouterr()
        assert printed.err.count("\n") <= 1
        return code, json.loads(printed.out, parse_constant=pytest.fail)

    return run
