"""The card of the table that predictions are for is chosen by name, by device or by memory."""

from __future__ import annotations

import pytest

from model.memory.cost.gpus import GPUS, chosen_gpu, gpu_named, gpu_of_class

GB = 10**9


@pytest.mark.parametrize(
    ("memory", "name"),
    [
        (6 * GB, "RTX 4060"), (8 * 2**30, "RTX 4060"), (12 * GB, "RTX 4070"), (16 * GB, "RTX 4080"),
        (24 * 2**30, "RTX 4090"), (32 * GB, "RTX 5090"), (80 * GB, "H100"), (141 * GB, "H200"),
    ],
)  # fmt: skip
def test_seconds_are_for_a_card_of_that_memory(memory: int, name: str) -> None:
    assert gpu_of_class(memory) == GPUS[name]
    assert chosen_gpu("A100", memory) == GPUS["A100"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 3090", None),
    ],
)  # fmt: skip
def test_a_device_is_found_by_its_name(device: str, name: str | None) -> None:
    assert gpu_named(device) == (None if name is None else GPUS[name])
