"""A small DiT under the names of the Wan repositories."""

from __future__ import annotations

import pytest

from model import DiTConfig, WanDiT
from model.weights.load import random_weights
from tests.support.lora_spellings import saved
from tests.support.original_names import original_dit

DIT = DiTConfig(num_heads=1, num_layers=2, ffn_dim=8, in_channels=36, text_dim=8, freq_dim=8)


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
