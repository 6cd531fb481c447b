"""The order in which streamed layers come and go, against an engine that does everything at the worst legal moment.

A copy may write as soon as the slot was released, and is not done before it is waited for. :class:`WorstCopies` writes
NaN into the slot the moment that the copy is asked for, and the weights the moment that it is waited for: whoever reads
too early, or asks for a copy into a slot that is still read, computes with NaN.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.dit.model import WanDiT
from model.streaming.placement import Placement
from model.streaming.stream import SLOTS, DirectCopies, LayerStream, Source
from model.weights.load import random_weights
from tests.conftest import TINY_DIT
from tests.model.streaming.test_placed import inputs, output

LAYERS = 7
PLACEMENTS = [
    Placement(resident=0),
    Placement(resident=0, pinned=3),
    Placement(resident=3, pinned=2),
    Placement(resident=5),
    Placement(resident=6),
    Placement(resident=0, quantize="float8"),
    Placement(resident=2, pinned=2, quantize="int8"),
]


class WorstCopies(DirectCopies):
    """A copy engine that does everything at the worst legal moment; ``told`` is all that it was asked."""

    def __init__(self, slots: list[Tensor]) -> None:
        super().__init__(slots)
        self.told: list[tuple[str, int]] = []
        self.coming: dict[int, Source] = {}

    def fetch(self, slot: int, source: Source) -> None:
        self.told.append(("fetch", slot))
        self.slots[slot].view(torch.float32).fill_(float("nan"))
        self.coming[slot] = source

    def wait(self, slot: int) -> None:
        self.told.append(("wait", slot))
        if slot in self.coming:
            super().fetch(slot, self.coming.pop(slot))

    def release(self, slot: int) -> None:
        self.told.append(("release", slot))


def model(placement: Placement | None) -> WanDiT:
    return random_weights(WanDiT, replace(TINY_DIT, num_layers=LAYERS), 1, placement=placement)


def with_worst_copies(dit: WanDiT) -> WorstCopies:
    """Puts the engine in place of the model's own."""
    stream = dit.stream
    assert isinstance(stream, LayerStream)
    assert isinstance(stream._engine, DirectCopies)
    stream._engine = WorstCopies(stream._engine.slots)
    stream._held = [None] * SLOTS
    return stream._engine


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_blocks_are_read_after_their_copy_and_before_the_next_one(placement: Placement) -> None:
    """The worst engine gives in two passes, bit for bit, what the same weights give when they stay."""
    kept, streamed = model(replace(placement, resident=None)), model(placement)
    with_worst_copies(streamed)
    expected = output(kept)
    assert torch.isfinite(expected).all()
    assert all(torch.equal(output(streamed), expected) for _ in range(2))


def test_the_next_block_is_on_its_way_while_one_runs() -> None:
    """Each copy is asked for one layer before it is waited for, in every pass, and no copy twice."""
    dit = model(Placement(resident=1))
    engine = with_worst_copies(dit)
    output(dit)
    engine.told.clear()
    with torch.no_grad():
        dit.context(inputs()[2])
    slots = [place % SLOTS for place in range(6)]
    expected = []
    for place, slot in enumerate(slots):
        expected += [("wait", slot), ("release", slot), ("fetch", slots[(place + SLOTS) % 6])]
    assert engine.told == expected


def test_blocks_that_fill_the_slots_are_copied_once() -> None:
    dit = model(Placement(resident=LAYERS - SLOTS))
    engine = with_worst_copies(dit)
    for _ in range(3):
        output(dit)
    assert [told for told in engine.told if told[0] == "fetch"] == [("fetch", 0), ("fetch", 1)]
    assert dit.stream is not None
    assert dit.stream.copies


def test_a_pass_that_was_broken_off_leaves_nothing_behind() -> None:
    """A pass after one that ended in an error is right."""
    dit, expected = model(Placement(resident=0, pinned=3)), model(None)
    with_worst_copies(dit)
    run = dit.blocks[2].forward

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of luck")

    output(dit)
    dit.blocks[2].forward = broken
    with pytest.raises(RuntimeError, match="out of luck"):
        output(dit)
    dit.blocks[2].forward = run
    assert torch.equal(output(dit), output(expected))


def test_a_file_that_cannot_be_read_ends_the_pass_and_can_be_tried_again() -> None:
    dit, expected = model(Placement(resident=0, pinned=0)), model(None)
    stream = dit.stream
    assert stream is not None
    source, failing = stream._sources[3], True

    def unreliable(target: Tensor) -> None:
        if failing:
            raise OSError("the disk is gone")
        source(target)  # type: ignore[operator]

    stream._sources[3] = unreliable
    with pytest.raises(OSError, match="the disk is gone"):
        output(dit)
    failing = False
    assert torch.equal(output(dit), output(expected))


def test_a_model_that_is_settled_can_go_on() -> None:
    """A settled model asks again for the copies that were under way for its next pass, and is right."""
    dit, expected = model(Placement(resident=0, pinned=3)), model(None)
    with_worst_copies(dit)
    for _ in range(2):
        assert torch.equal(output(dit), output(expected))
        assert dit.stream is not None
        dit.stream.settle()
