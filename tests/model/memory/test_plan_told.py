"""A memory plan as text and JSON: refusals and what would do, bad requests, and what follows a shortage."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from model.errors import InputError
from model.machine.measure import format_enough
from model.memory.plan import find_plan, plan_memory, smallest_plan
from model.memory.report import MemoryPlan
from model.memory.request import HOST_USABLE, USABLE
from model.resume.clip import with_less
from model.streaming.placement import Placement
from model.vae.tiles import VAEPlan
from tests.support.memory_requests import GB, TEXT, planned, request


@pytest.mark.slow
def test_too_little_host_memory_is_refused_with_what_would_do() -> None:
    wanted = request("1.3b", 12, ram=8 * GB, text_encoder_bytes=TEXT)
    with pytest.raises(InputError) as refused:
        plan_memory(wanted)
    said = str(refused.value)
    assert said.startswith("ram: 8.00 GB are too little, since 90% of it are planned with and the smallest plan takes ")
    assert "--text-embeddings" not in said  # it is not the encoder that takes most
    with pytest.raises(InputError, match="--text-embeddings in place of a text encoder"):
        plan_memory(request("1.3b", 80, ram=8 * GB, text_encoder_bytes=TEXT))
    assert "memory plan: 2560x1408, 81 frames" in said
    enough = float(said.split(" GB would do")[0].rsplit(" ", 1)[1])
    assert plan_memory(replace(wanted, ram=round((enough + 0.05) * GB))).host_peak <= HOST_USABLE * (enough + 0.05) * GB
    with pytest.raises(InputError, match=r"^ram: "):
        plan_memory(replace(wanted, ram=round((enough - 0.1) * GB)))


@pytest.mark.slow
def test_too_small_a_card_is_refused_with_the_smallest_plan() -> None:
    with pytest.raises(InputError) as refused:
        plan_memory(request("14b-1.3b", 2))
    first, *plan = str(refused.value).splitlines()
    least = smallest_plan(request("14b-1.3b"))
    assert first.startswith("vram: 2.00 GB are too little")
    assert f"{least.peak / GB:.2f} GB in {least.limiting.name}" in first
    assert f"{format_enough(least.peak / USABLE)} would do" in first
    assert "a smaller --size, fewer --frames" in first
    assert f"predicted peak         {least.peak / GB:.2f} GB" in "\n".join(plan)


@pytest.mark.slow
def test_a_limit_of_the_vae_alone() -> None:
    limit = 4 * GB
    plan = plan_memory(request("1.3b", 24, vae_limit=limit))
    assert all(used.peak.total <= limit for used in plan.vae_plans)
    assert plan.vae_plans.decode.plan.park
    assert planned("1.3b", 24).vae_plans.decode.peak.total > limit
    with pytest.raises(InputError, match=r"^vae-memory: 0\.50 GB are too little"):
        plan_memory(request("1.3b", 24, vae_limit=GB // 2))


@pytest.mark.slow
def test_halves_of_the_vae_that_work_beside_each_other_share_its_limit() -> None:
    """The reference's encoder and the motion's decoder share the limit on a CPU, where nothing waits elsewhere."""

    def taken(plan: MemoryPlan) -> int:
        return sum(size for name, size in plan.phase("reference").held.items() if name not in ("other weights", "clip"))

    free = plan_memory(request("tiny", capability=None))
    assert {used.plan for used in free.vae_plans} == {VAEPlan()}
    limit = taken(free) - 1
    assert limit > free.vae_plans.reference.peak.total
    tight = plan_memory(request("tiny", capability=None, vae_limit=limit))
    assert taken(tight) <= limit
    assert tight.vae_plans.reference.plan != VAEPlan()
    assert tight.vae_plans.encode_dtype == torch.float32


@pytest.mark.parametrize("vram", [None, 12])
def test_json_says_all_that_was_decided(vram: int | None) -> None:
    """The JSON passes through text unchanged, and placements and tiles can be made of it again."""
    plan = planned("14b-1.3b", vram)
    data = plan.to_json()
    read = json.loads(json.dumps(data))
    assert read == data
    assert (read["schema"], read["basis"]) == (3, "predicted")
    for name in ("stage_one", "stage_two"):
        stage = getattr(plan, name)
        assert Placement(**read[name]["placement"]) == stage.placement
        assert sum(read[name]["layers"].values()) == stage.config.num_layers
    for place, used in plan.vae_plans._asdict().items():
        assert {**asdict(used.plan), **read["vae"][place]} == read["vae"][place]
    assert read["peak_bytes"] == max(phase["device_bytes"] for phase in read["phases"])
    assert read["seconds"] == plan.seconds


def test_every_number_that_is_told_is_said_to_be_predicted() -> None:
    told = str(planned("14b-1.3b", 24))
    assert re.search(r"predicted time         about \d+ minutes on an RTX 4090, predicted", told)
    assert all("predicted" in line for line in told.splitlines()[1:4])
    assert "(all predicted)" in told


@pytest.mark.parametrize("phase", ["condition", "Stage I", "reference", "Stage II", "decode"])
def test_a_phase_that_ran_out_of_memory_is_planned_with_less_and_the_others_as_before(phase: str) -> None:
    """The phase gets smaller with every shortage, as ``model.resume.clip`` plans, whatever the other phases take."""
    plan = planned("14b-1.3b", 16)
    for _ in range(1 if phase == "Stage II" else 2):
        smaller = find_plan(with_less(plan, "device", plan.phase(phase))[0])
        assert smaller is not None
        assert smaller.phase(phase).device < plan.phase(phase).device
        together = {"Stage II", "decode"} if phase in ("Stage II", "decode") else {phase}
        for before, after in zip(plan.phases, smaller.phases, strict=True):
            assert before.name in together or before.device == after.device
        plan = smaller
