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
names = [f"{p.resident}-{p.pinned}-{p.quantize}" for p in PLACEMENTS]


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


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, TINY_DIT.in_channels, 3, 4, 6, generator=draw)
    return latents, torch.tensor([[0.0, 500.0, 500.0]]), torch.randn(1, 5, TINY_DIT.text_dim, generator=draw)


def model(placement: Placement | None) -> WanDiT:
    return random_weights(WanDiT, replace(TINY_DIT, num_layers=LAYERS), 1, placement=placement)


def with_engine(dit: WanDiT, engine: type[WorstCopies]) -> WorstCopies:
    """Puts an engine in place of the model's own."""
    stream = dit.stream
    assert isinstance(stream, LayerStream)
    assert isinstance(stream._engine, DirectCopies)
    stream._engine = engine(stream._engine.slots)
    stream._held = [None] * SLOTS
    return stream._engine


@pytest.mark.parametrize("placement", PLACEMENTS, ids=names)
def test_blocks_are_read_after_their_copy_and_before_the_next_one(placement: Placement) -> None:
    """The worst engine gives in two passes, bit for bit, what the same weights give when they stay."""
    kept, streamed = model(replace(placement, resident=None)), model(placement)
    with_engine(streamed, WorstCopies)
    with torch.no_grad():
        expected = kept(*inputs())
        assert torch.isfinite(expected).all()
        for _ in range(2):
            assert torch.equal(streamed(*inputs()), expected)


def test_the_next_block_is_on_its_way_while_one_runs() -> None:
    """Each copy is asked for one layer before it is waited for, in every pass, and no copy twice."""
    dit = model(Placement(resident=1))
    engine = with_engine(dit, WorstCopies)
    with torch.no_grad():
        dit(*inputs())
        engine.told.clear()
        dit.context(inputs()[2])
    slots = [place % SLOTS for place in range(6)]
    expected = []
    for place, slot in enumerate(slots):
        expected += [("wait", slot), ("release", slot), ("fetch", slots[(place + SLOTS) % 6])]
    assert engine.told == expected


def test_blocks_that_fill_the_slots_are_copied_once() -> None:
    dit = model(Placement(resident=LAYERS - SLOTS))
    engine = with_engine(dit, WorstCopies)
    with torch.no_grad():
        for _ in range(3):
            dit(*inputs())
    assert [told for told in engine.told if told[0] == "fetch"] == [("fetch", 0), ("fetch", 1)]
    assert dit.stream is not None
    assert dit.stream.copies


def test_a_pass_that_was_broken_off_leaves_nothing_behind() -> None:
    """A pass after one that ended in an error is right."""
    dit, expected = model(Placement(resident=0, pinned=3)), model(None)
    with_engine(dit, WorstCopies)
    run = dit.blocks[2].forward

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of luck")

    with torch.no_grad():
        dit(*inputs())
        dit.blocks[2].forward = broken
        with pytest.raises(RuntimeError, match="out of luck"):
            dit(*inputs())
        dit.blocks[2].forward = run
        assert torch.equal(dit(*inputs()), expected(*inputs()))


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
    with torch.no_grad():
        with pytest.raises(OSError, match="the disk is gone"):
            dit(*inputs())
        failing = False
        assert torch.equal(dit(*inputs()), expected(*inputs()))


def test_a_model_that_is_settled_can_go_on() -> None:
    """A settled model asks again for the copies that were under way for its next pass, and is right."""
    dit, expected = model(Placement(resident=0, pinned=3)), model(None)
    with_engine(dit, WorstCopies)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(dit(*inputs()), expected(*inputs()))
            assert dit.stream is not None
            dit.stream.settle()
