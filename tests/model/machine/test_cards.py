"""The one table of cards: a new card is one entry, and a card is chosen by name, by device or by memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.__main__ import build_parser
from bench.cost.profiles import RATES
from bench.static.bounds import predict
from bench.static.cubin import Analysis, Loop
from model.machine.cards import chosen_gpu
from model.memory.plan import plan_memory
from swifti2v_kernels.common.cards import CARDS, by_capability, card_named, card_of_memory
from swifti2v_kernels.common.case import Work
from swifti2v_kernels.common.target import TARGETS
from tests.support.memory_requests import predict_nothing, request

GB = 10**9


@pytest.mark.parametrize(
    ("memory", "name"),
    [
        (6 * GB, "RTX 4060"), (8 * 2**30, "RTX 4060"), (12 * GB, "RTX 4070"), (16 * GB, "RTX 4080"),
        (24 * 2**30, "RTX 4090"), (32 * GB, "RTX 5090"), (80 * GB, "H100"), (141 * GB, "H200"), (180 * GB, "H200"),
    ],
)  # fmt: skip
def test_seconds_are_for_a_card_of_that_memory(memory: int, name: str) -> None:
    assert card_of_memory(memory) == CARDS[name]
    assert chosen_gpu("A100", memory) == CARDS["A100"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 2080", None),
    ],
)  # fmt: skip
def test_a_device_is_found_by_its_name(device: str, name: str | None) -> None:
    assert card_named(device) == (None if name is None else CARDS[name])


def test_peaks_are_multiply_adds_times_multiprocessors_times_clock() -> None:
    """The data sheets' peaks are those of the limits, and the rates of 8 bits too; the L40S's SM has twice as many."""
    for card in CARDS.values():
        fma = card.limits.bf16_fma * (2 if card.name == "L40S" else 1)
        assert card.bf16 == pytest.approx(2 * fma * card.sms * card.clock_ghz / 1000, rel=0.02)
        assert card.fp8 == pytest.approx(card.limits.float8 * card.bf16, rel=0.02)
    assert {number: card.name for number, card in TARGETS.items()} == {
        80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H200", 100: "B200", 120: "RTX 5090",
    }  # fmt: skip


def test_a_new_card_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of a new capability that is added to the table is a target, has bounds, is planned for and predicted."""
    new = replace(
        CARDS["RTX 5090"], name="RTX 6090", limits=replace(CARDS["RTX 5090"].limits, capability=130), memory=48
    )
    monkeypatch.setitem(CARDS, new.name, new)
    predict_nothing(monkeypatch)
    assert by_capability()[130] == new
    bound = predict(Analysis(128, 0, 0, 200, {}, [Loop(200, 100, {"HMMA": 64}, False)]), Work(2**20, 0), 8, 1, new)
    assert bound is not None
    assert card_named("NVIDIA GeForce RTX 6090") == chosen_gpu("RTX 6090", GB) == card_of_memory(40 * GB) == new
    wanted = request("tiny", capability=None)
    same, faster = (
        plan_memory(replace(wanted, gpu=card)) for card in (CARDS["RTX 5090"], replace(new, bf16=2 * new.bf16))
    )
    assert faster.seconds == pytest.approx(same.seconds / 2)
    assert "RTX 6090" in build_parser().parse_args(["cost"]).gpus
    assert new.architecture in RATES
