"""The memory planner: what it chooses is the first in its order that fits, its bytes are those of tensors, and what
cannot fit is explained.

Of monotony this much holds, and is tested. In the limit: the peak of the plan. In the number of frames: the
peak of the plan without a limit, and that of the smallest plan; within one limit a longer clip may take leaner tiles,
and so have a lower peak.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from bench.memory.clip import ClipSetup, run_clip
from model.config import PRESETS
from model.dit.model import WanDiT
from model.errors import InputError
from model.memory import vae_plan
from model.memory.plan import plan_memory, smallest_plan
from model.memory.request import HOST_USABLE, USABLE, DiTRequest
from model.memory.search import PROCESS_BYTES, Search
from model.memory.vae_plan import FRAMES, Peak, Request
from model.streaming.placement import Placement
from model.vae.tiles import VAEPlan
from swifti2v_kernels.common.cards import CARDS
from tests.support.memory_requests import GB, TEXT, planned, request

LIMITS = (6, 8, 12, 16, 24, 48, 80, 141)
LENGTHS = (17, 81, 241)


@pytest.mark.slow
@pytest.mark.parametrize("frames", LENGTHS)
@pytest.mark.parametrize("preset", ["1.3b", "14b-1.3b", "5b"])
def test_plans_for_every_card_fit_and_more_memory_is_never_used_less(preset: str, frames: int) -> None:
    """Every phase fits, and of more memory no less is used, on every usual card and with every length."""
    plans = [planned(preset, limit, frames) for limit in LIMITS]
    for plan in plans:
        assert all(phase.device <= plan.request.usable for phase in plan.phases)
        assert plan.peak == max(sum(phase.held.values()) for phase in plan.phases)
        assert all(size >= 0 for phase in plan.phases for size in phase.held.values())
    for smaller, larger in pairwise([*plans, planned(preset, None, frames)]):
        assert smaller.peak <= larger.peak
    if frames == LENGTHS[-1]:  # of a longer clip too, without a limit and at the least
        for peaks in (
            [planned(preset, None, n).peak for n in LENGTHS],
            [smallest_plan(request(preset, None, n)).peak for n in LENGTHS],
        ):
            assert peaks == sorted(set(peaks))


def test_the_tensors_of_a_clip_are_counted_by_hand() -> None:
    """A phase counts picture, latents, the motion's frames that wait and the last frames beside the models."""
    held = {phase.name: phase.held for phase in planned("tiny", None).phases}
    picture, low, high = 3 * 4 * 256 * 144, 4 * 16 * 21 * 16 * 8, 4 * 16 * 21 * 32 * 18
    # The reference's blocks are there beside the whole that they become.
    assert held["reference"]["clip"] == picture + low + 2 * high
    assert held["reference"]["motion's frames"] == 2 * 4 * 3 * 128 * 64
    assert held["decode"]["clip"] == 3 * high // 21 + 4 * 3 * 256 * 144


def test_a_reference_that_fits_beside_the_waiting_decoder_is_one_stream() -> None:
    """Nothing is parked where the encoder fits with fewer frames at once beside the decoder that waits meanwhile."""
    plans = planned("tiny", 0.030).vae_plans
    assert plans.reference.plan == VAEPlan(frames=1)
    assert not plans.motion.plan.park


@pytest.mark.slow
def test_the_smallest_plan_is_the_smallest() -> None:
    """The smallest plan fits a card of just its bytes, and a card of one byte less is refused."""
    least = smallest_plan(request("1.3b")).peak
    vram = next(v for v in range(math.floor(least / USABLE), math.ceil(least / USABLE) + 3) if int(USABLE * v) == least)
    assert plan_memory(replace(request("1.3b"), vram=vram)).peak == least
    below = next(v for v in range(vram, 0, -1) if int(USABLE * v) < least)
    with pytest.raises(InputError, match=r"^vram: "):
        plan_memory(replace(request("1.3b"), vram=below))


@pytest.mark.parametrize("vram", [10, 24, 48])
def test_of_all_that_fit_the_first_in_order_is_chosen(vram: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pair of Stage II and decoder that fits has less parked, fewer tiles, or as many and fewer streamed layers.

    What the VAE takes is made up, since only the order is at stake: tiles take less, and parked ones no state.
    """

    def made_up(request: Request, plan: VAEPlan) -> Peak:
        state = 0 if plan.park else 4 * GB + plan.tiles * GB // 8
        working = 24 * GB // plan.tiles // (1 if plan.frames > 1 else 2)
        return Peak(GB // 4 + state + working, GB // 4, state, 0)

    monkeypatch.setattr(vae_plan, "predict", made_up)
    wanted = request("14b-1.3b", vram)
    search, plan = Search(wanted), plan_memory(wanted)
    fitting = []
    for park in (False, True):
        for grid in search.decode.grids(park):
            for frames in FRAMES:
                peak = search.decode.planned(grid, frames, park).peak.total
                for streamed in search.two.counts:
                    taken = search.two.placed("none", streamed).device + peak + search.clip_bytes(park)
                    if taken <= wanted.usable:
                        fitting.append((park, math.prod(grid), -frames, streamed))
    decode, two = plan.vae_plans.decode.plan, plan.stage_two.placement
    streamed = 0 if two.resident is None else 30 - two.resident
    assert (decode.park, decode.tiles, -decode.frames, streamed) == min(fitting)
    assert len({key[:2] for key in fitting}) > 1


@pytest.mark.parametrize(("vram", "runs"), [(1000, 4), (10, 20), (1, 4)], ids=["all fits", "tiles", "refused"])
def test_few_runs_of_the_vae_are_enough_for_a_tiny_plan(vram: float, runs: int) -> None:
    """A plan of the tiny preset runs the VAE four times where all fits, and no more than that to be refused."""
    vae_plan.predict.cache_clear()
    vae_plan._dry_run.cache_clear()
    with suppress(InputError):
        plan_memory(request("tiny", vram / 1000))
    assert vae_plan._dry_run.cache_info().misses <= runs


def test_copies_are_told_against_work() -> None:
    """The copies of 36 layers of 14B, 12.7 GB in 8 bits at 25 GB/s a pass, take a small share of its work at 360P."""
    plan = plan_memory(request("14b-1.3b", 8, quantize="float8"))
    found = plan.estimate
    copied = 4 * plan.stage_one.placed.copied
    assert plan.phase("Stage I").copied == copied > 4e10
    assert found.copies["Stage I"] == copied / 25e9
    assert found.ratio("Stage I") == pytest.approx(copied / 25e9 / found.work["Stage I"])
    assert 0 < found.ratio("Stage I") < 0.2
    assert plan.seconds == pytest.approx(sum(found.work.values()) + found.copies["reference"] + found.copies["decode"])


def test_host_memory_limits_what_is_pinned_and_the_rest_comes_from_files() -> None:
    wanted = request("14b-1.3b", 12, from_files=True)
    for ram in (24, 32, 64):
        plan = plan_memory(replace(wanted, ram=ram * GB))
        homes = plan.stage_one.placement.homes(40)
        assert plan.host_peak <= HOST_USABLE * ram * GB
        assert ("file" in homes) == (ram == 24) == bool(plan.stage_one.placed.read)
        assert plan.stage_one.placement.quantize == "none"
    told = str(plan_memory(replace(wanted, ram=24 * GB)))
    assert "from pinned host memory" in told
    assert "files are assumed to be read at 3 GB/s" in told


@pytest.mark.slow
def test_only_where_nothing_else_can_be_numbers_change() -> None:
    """Random weights cannot be read again: where pinned memory is too little, they are in float8, and it is said."""
    plan = plan_memory(request("14b-1.3b", 12, ram=24 * GB))
    assert plan.stage_one.placement.quantize == "float8"
    assert plan.stage_two.placement.quantize == "none"
    assert any("float8" in note and note.startswith("Stage I:") for note in plan.notes)
    assert "float8, which changes numbers" in str(plan)
    for vram, ram in ((12, 64), (48, 24)):
        plan = plan_memory(request("14b-1.3b", vram, ram=ram * GB))
        assert {plan.stage_one.placement.quantize, plan.stage_two.placement.quantize} == {"none"}


@pytest.mark.parametrize(("vram", "on_device"), [(24, True), (12, False)])
def test_the_text_encoder_is_on_the_card_if_it_fits_alone(vram: int, on_device: bool) -> None:
    plan = plan_memory(request("1.3b", vram, text_encoder_bytes=TEXT))
    text = plan.phases[0]
    assert (text.name, plan.text_on_device, text.copied) == ("text", on_device, 0)
    assert text.device == (text.held["text encoder"] + text.held["its activations"] if on_device else 0)
    assert text.host == PROCESS_BYTES + TEXT
    assert ("seconds of the text encoder" in " ".join(plan.notes)) == (not on_device)
    assert planned("1.3b", vram).phases[0].name == "condition"


def stored_in_8_bits(config: Any) -> dict[str, str]:
    with torch.device("meta"):
        names = [n for n, p in WanDiT(config).named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    return dict.fromkeys(names, "float8_e4m3fn")


def test_what_a_checkpoint_has_in_8_bits_stays_so() -> None:
    config = PRESETS["14b-1.3b"].stage_one
    one = DiTRequest(config, stored_in_8_bits(config))
    plan = plan_memory(request("14b-1.3b", 24, from_files=True, stage_one=one))
    assert plan.stage_one.placement == Placement(quantize="file")  # all of it fits, as it does not in 16 bits
    assert planned("14b-1.3b", 24).stage_one.placement.resident is not None
    held, plain = plan.phase("Stage I").held, planned("14b-1.3b", 24).phase("Stage I").held
    assert held["unpacked layer"] == pytest.approx(plain["slots"] / 2, rel=1e-3)
    assert held["weights"] == pytest.approx(planned("14b-1.3b", 80).phase("Stage I").held["weights"] / 2, rel=0.02)
    assert plan.stage_two.placement.quantize == "none"
    # The expert that is not in 8 bits takes more, and both are placed alike.
    two = plan_memory(request("14b-1.3b", 24, from_files=True, stage_one=one, low_noise=DiTRequest(config)))
    assert two.stage_one.placement.quantize == "file"
    assert two.stage_one.placed.device > plan.stage_one.placed.device


def test_8_bit_products_have_a_smaller_workspace() -> None:
    plan, plain = (plan_memory(request("14b-1.3b", 24, matmul=matmul)) for matmul in ("8bit", "plain"))
    assert plan.stage_one.placement.quantize == plan.stage_two.placement.quantize == "float8"
    assert plan.phase("Stage I").held["workspace"] < plain.phase("Stage I").held["workspace"]
    assert "unpacked layer" not in plan.phase("Stage I").held
    assert any("8-bit matmuls" in note for note in plan.notes)
    old = plan_memory(request("1.3b", 80, matmul="8bit", gpu=CARDS["A100"], capability=80))
    assert old.stage_one.placement.quantize == "int8"
    with pytest.raises(InputError, match=r"matmul: 8bit of float8 needs compute capability 8\.9, this card has 8\.0"):
        request("1.3b", 80, matmul="8bit", quantize="float8", capability=80)


def test_another_vae_for_stage_one_is_there_too() -> None:
    small = PRESETS["1.3b"].vae
    plan = plan_memory(request("1.3b", 24, motion_vae=replace(small, base_dim=48, decoder_base_dim=48)))
    assert plan.vae_plans.condition.request.config.base_dim == 48
    assert plan.vae_plans.decode.request.config.base_dim == 96
    assert plan.phase("condition").held["other weights"] > planned("1.3b", 24).phase("condition").held["other weights"]
    assert plan.phase("Stage I").host > planned("1.3b", 24).phase("Stage I").host


@pytest.mark.parametrize("mode", ["end_to_end", "causal"])
def test_modes_hold_what_their_windows_hold(mode: str) -> None:
    plan, usual = plan_memory(request("1.3b", None, mode=mode)), planned("1.3b", None)
    held, other = plan.phase("Stage II").held, usual.phase("Stage II").held
    if mode == "end_to_end":
        assert held["workspace"] > 3 * other["workspace"]
        assert plan.estimate.work["Stage II"] > usual.estimate.work["Stage II"]
    else:
        tokens = 2 * (2560 // 16) * (1408 // 16)  # the anchor and a neighbour
        assert held["remembered keys and values"] == 30 * 2 * tokens * 1536 * 2


@pytest.mark.slow
def test_a_clip_takes_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase of a clip takes what is predicted for it, to 5 %. (At 2K the two differ by less than 1 %.)

    The clip is made on tensors without memory, on a card of 6.5 MB: layers are streamed, tiles wait in host memory."""
    preset = PRESETS["tiny"]
    one, two = (replace(config, num_layers=6, ffn_dim=1024) for config in (preset.stage_one, preset.stage_two))
    monkeypatch.setitem(PRESETS, "tiny", replace(preset, stage_one=one, stage_two=two))
    setup = ClipSetup("tiny", 128, 64, 17, steps=1, limit=6_500_000, capability=89)
    run = run_clip(setup, torch.device("meta"))
    plan, counted = run.plan, {}
    assert (plan.stage_one.placement.resident, plan.stage_two.placement.resident) == (2, 0)
    assert plan.vae_plans.decode.plan.park
    for mark, peak in run.course.peaks().items():
        name = "Stage II" if mark.startswith("Stage II") else mark
        counted[name] = max(counted.get(name, 0), peak)
    for name in ("reference", "Stage II", "decode"):
        assert plan.phase(name).device == pytest.approx(counted[name], rel=0.05), name
    # The stage's mark is also that of its condition, for which the VAEs are there; for the DiT they wait.
    assert plan.vae_waits
    larger = max(plan.phase(name).device for name in ("condition", "Stage I"))
    assert larger == pytest.approx(counted["Stage I"], rel=0.05)
