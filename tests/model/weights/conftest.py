"""A small DiT; and a check on all that a test loads: ``model.inspect`` says that it loads exactly if it does."""

from __future__ import annotations

import pytest

from model import DiTConfig, InputError, WanDiT
from model.weights.load import random_weights
from tests.support.lora_spellings import saved
from tests.support.original_names import original_dit

DIT = DiTConfig(num_heads=1, num_layers=2, ffn_dim=8, in_channels=36, text_dim=8, freq_dim=8)


@pytest.fixture(autouse=True)
def loaders_and_inspect_agree(request, monkeypatch):
    """``model.inspect`` says yes of a path exactly where a loader, asked for nothing but that path, loads it."""
    if "refused" in request.fixturenames:  # which asks both
        return
    from model.inspect import inspect_checkpoint
    from model.weights import load

    inspecting = False

    class Compared(load._Checkpoint):
        def __init__(self, path, kind, config=None):
            nonlocal inspecting
            if inspecting or config is not None:
                super().__init__(path, kind, config)
                return
            refusal, opened = None, False
            try:
                super().__init__(path, kind)
                opened = True
                self.check()
            except InputError as error:
                refusal = error
            inspecting = True
            try:
                parts = load.DIT_PARTS if kind is load.WanDiT else load.VAE_PARTS
                report = inspect_checkpoint(load.part_of_pipeline(path, parts))
            finally:
                inspecting = False
            said = report.loaded_by == ("load_dit" if kind is load.WanDiT else "load_vae")
            both = any("whole pipeline" in part for part in report.layout)
            assert said == (refusal is None) or (both and report.loads), f"{path}: {report.problem}, {refusal}"
            if not opened:
                raise refusal

    monkeypatch.setattr(load, "_Checkpoint", Compared)


@pytest.fixture(scope="session")
def state():
    """Returns the tensors of a small DiT under the names of the Wan repositories."""
    return original_dit(random_weights(WanDiT, DIT, 0).state_dict())


@pytest.fixture
def wan(state, tmp_path):
    """Returns a function that saves that DiT, with other tensors and a header, as ``wan.safetensors``."""

    def save(changes=None, metadata=None):
        return saved(tmp_path / "wan.safetensors", state | (changes or {}), metadata)

    return save
