"""Seconds of a pass with copied layers: the bounds that any order has, closed forms where there are some, and as many
copies as the stream itself makes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.memory.stream_time import FILE_RATE, pass_time
from model.streaming.placement import Placement
from model.streaming.stream import SLOTS, LayerStream

MB = 10**6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    layers=st.integers(3, 24),
    resident=st.integers(0, 24),
    pinned=st.integers(0, 24),
    compute=st.floats(0.01, 10),
    size=st.integers(1, 800),
)
def test_a_pass_takes_at_least_its_longest_part_and_at_most_all(
    layers: int, resident: int, pinned: int, compute: float, size: int
) -> None:
    homes = Placement(min(resident, layers), pinned).homes(layers)
    found = pass_time(homes, [size * MB] * layers, compute, 25e9)
    assert found.compute == compute
    assert found.total >= max(found.compute, found.copy, found.read) * (1 - 1e-9)
    assert found.total <= (found.compute + found.copy + found.read) * (1 + 1e-9)
    assert found.exposed >= 0


@pytest.mark.parametrize("layers", [4, 30, 40])
@pytest.mark.parametrize("ratio", [0.2, 0.9, 1.5, 4.0])
def test_all_blocks_streamed_take_turns(layers: int, ratio: float) -> None:
    """A pass is the longer of work and copies, since the next layer is copied while one runs in the other slot."""
    compute = 1.0
    size = round(ratio * compute / layers * 25e9)
    found = pass_time(["host"] * layers, [size] * layers, compute, 25e9)
    assert found.total == pytest.approx(max(compute, ratio * compute), rel=1e-6)
    assert found.copy == pytest.approx(ratio, rel=1e-6)
    assert (found.exposed == 0) == (ratio < 1)


def test_blocks_in_between_hide_copies() -> None:
    """Copies of half of the layers, each as long as a layer and a half, are hidden; those of all are not."""
    size = round(1.5 * 0.1 * 25e9)
    half = Placement(20).homes(40)
    assert pass_time(half, [size] * 40, 4.0, 25e9).exposed == 0
    assert pass_time(["host"] * 40, [size] * 40, 4.0, 25e9).exposed == pytest.approx(2.0)


def test_files_are_as_slow_as_the_disk() -> None:
    size = round(0.1 * FILE_RATE)
    found = pass_time(["file"] * 10, [size] * 10, 0.5, 25e9)
    assert found.read == pytest.approx(1.0)
    assert 1.0 <= found.total < 1.2
    assert "reading files (1.00 s beside 0.50 s of compute a pass" in found.limit


def test_what_has_a_slot_of_its_own_is_not_copied() -> None:
    found = pass_time(["host"] * SLOTS + ["device"] * 8, [MB] * 10, 1.0, 1.0)
    assert (found.copy, found.read, found.exposed, found.total) == (0, 0, 0, 1.0)
    assert found.limit == "compute; weights are on the device"


class Counting:
    """A copy engine that counts."""

    def __init__(self) -> None:
        self.fetched = 0

    def fetch(self, slot: int, source: object) -> None:
        self.fetched += 1

    def wait(self, slot: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass


@pytest.mark.parametrize("streamed", [3, 4, 5, 6, 9, 10])
def test_as_many_blocks_are_copied_as_the_stream_copies(streamed: int) -> None:
    homes = Placement(10 - streamed).homes(10)
    engine = Counting()
    sources = {i: (lambda target: None) for i, home in enumerate(homes) if home != "device"}
    stream = LayerStream([nn.Identity() for _ in homes], sources, {}, engine)
    for _ in range(3):
        list(stream.walk())
    before = engine.fetched
    for _ in range(3):
        list(stream.walk())
    found = pass_time(homes, [25 * MB] * 10, 1.0, 25e9)
    assert found.copy == pytest.approx((engine.fetched - before) / 3 * 1e-3, rel=0.1)
