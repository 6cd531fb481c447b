"""Seeds, tiny models and the rules for what runs where."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers are as many as the cores. Set before torch is imported, and for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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


def room() -> str:
    """Returns the folder of tests that this process is for: Triton decides at its first import what it is."""
    return "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "sanitizer" if "ttsem" in sys.modules else ""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out what needs another process: interpreter, sanitizer and all else are three, as :func:`room` says."""
    here = Path(__file__).parent
    if collection_path.parent != here or not (collection_path.is_dir() or collection_path.name.startswith("test_")):
        return None
    if room():
        return collection_path.name != room()
    return collection_path.name in ("interpreter", "sanitizer", "launcher")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds this project's only option."""
    parser.addoption("--compatibility", action="store_true", help="write what passes to docs/compatibility.md")


def pytest_configure(config: pytest.Config) -> None:
    """Times benchmarks and writes the table of compatibility only where that is asked for."""
    if config.getoption("--compatibility"):
        config.pluginmanager.register(compatibility.Recorder())
    if "benchmark" not in (config.option.markexpr or "") and hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out slow tests that were not asked for, and skips those marked ``gpu`` where there is no GPU.

    Slow tests are asked for by ``-m``, by ``--compatibility`` or by their own name, ``FILE::TEST``.

    Raises:
        UsageError: a test marked ``gpu`` is in a file that the campaign does not look into.
    """
    if not config.option.markexpr and not config.getoption("--compatibility"):
        arguments = [argument.partition("::") for argument in config.args]
        named = [((config.invocation_params.dir / file).resolve(), test) for file, _, test in arguments if test]
        slow = [
            item
            for item in items
            if item.get_closest_marker("slow")
            and not any(item.path == file and item.nodeid.partition("::")[2].startswith(test) for file, test in named)
        ]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if item not in set(slow)]
    config.stash[COMPATIBILITY] = {pair for item in items for pair in compatibility.pairs(item)}
    for item in items:
        if item.get_closest_marker("gpu") and not item.path.match(HARDWARE):
            raise pytest.UsageError(f"{item.nodeid}: marked gpu, so it belongs into a file tests/{HARDWARE}")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Leaves out what imports have made whenever garbage is collected, which takes longer than toy sizes do."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each of pytest-xdist's workers tests that follow one another, unless ``--dist`` says otherwise.

    What a fixture has made for a module is then seldom made twice.
    """
    if config.option.dist != "load":
        return None
    from xdist.scheduler.worksteal import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says in one line what was not run and which commands run it."""
    if config.option.markexpr or config.option.keyword:
        return
    everything, told = config.args in ([], ["tests"], ["tests/interpreter"]), []
    if everything or terminalreporter.stats.get("deselected"):
        command = "TRITON_INTERPRET=1 pytest -m slow tests/interpreter" if room() == "interpreter" else "pytest -m slow"
        told.append(f"slow tests ({command})")
    if everything and not room():
        told.append("the kernels in Triton's interpreter (TRITON_INTERPRET=1 pytest tests/interpreter)")
    if told:
        terminalreporter.write_line(f"left out: {' and '.join(told)}", yellow=True)


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
