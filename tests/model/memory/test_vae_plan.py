"""The VAE's planner predicts what is used, chooses what fits, and explains what cannot fit."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.dit.count import peak_of_events
from bench.vae.layers import all_kernels
from model import InputError, VAEConfig, VAEPlan, WanVAE, plan_vae
from model.config import PRESETS
from model.machine.counted import TensorMemory
from model.memory import vae_plan
from model.memory.vae_plan import PlannedVAE, Request, meta_vae, operations, predict, state_bytes
from model.weights.load import random_weights
from swifti2v_kernels import pretend_gpu

SMALL = {
    "2.1": VAEConfig(base_dim=8, decoder_base_dim=8),
    "2.2": replace(PRESETS["5b"].vae, base_dim=8, decoder_base_dim=8),
}
#: Two stages, for plans on a CPU, where more operators are counted.
SHORT = VAEConfig(base_dim=8, decoder_base_dim=8, dim_mult=(1, 2), temporal_downsample=(True,))
REAL = {"2.1": VAEConfig(), "2.2": PRESETS["5b"].vae}
CPU = torch.device("cpu")
GB = 10**9


def request(version: str, part: str, piece: int) -> Request:
    config = SMALL[version]
    stride = config.spatial_stride
    return Request(config, part, 4 * stride, 3 * stride, torch.float32, None, piece, 1)


def run(vae: WanVAE, wanted: Request, plan: VAEPlan) -> None:
    """Runs three pieces of a clip and drops their results."""
    config, piece = wanted.config, wanted.piece
    if wanted.part == "decode":
        rows, columns = wanted.latent_size
        for frames in vae.decode_frames((torch.randn(1, config.z_dim, piece, rows, columns) for _ in range(3)), plan):
            del frames
        return
    rate = config.temporal_stride
    sizes = [rate * piece - (rate - 1), rate * piece, rate * piece]
    # One picture for all frames: a clip of pixels would count as the model's.
    picture = torch.rand(1, 3, 1, wanted.height, wanted.width)
    for latents in vae.encode_stream((picture.expand(-1, -1, n, -1, -1) for n in sizes), plan):
        del latents


@pytest.mark.parametrize(
    ("version", "part", "plan", "piece"),
    [
        ("2.1", "decode", VAEPlan(), 2),
        ("2.2", "encode", VAEPlan(), 1),
        pytest.param("2.1", "encode", VAEPlan(2, 2, frames=2), 2, marks=pytest.mark.slow),
        pytest.param("2.2", "decode", VAEPlan(2, 2, frames=2), 2, marks=pytest.mark.slow),
        pytest.param("2.1", "decode", VAEPlan(1, 3, frames=1, chunk=None), 2, marks=pytest.mark.slow),
        pytest.param("2.2", "encode", VAEPlan(1, 3, frames=1, chunk=None), 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_prediction_is_what_tensors_take(version: str, part: str, plan: VAEPlan, piece: int) -> None:
    """The prediction is within 1 % of live tensors of a real run, and within the promised 10 % of the allocator."""
    wanted = request(version, part, piece)
    vae = random_weights(WanVAE, wanted.config, 0)
    weights = vae.weights_of(part)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events, TensorMemory(weights) as memory:
        run(vae, wanted, plan)
    predicted = predict(wanted, plan)
    # The picture or the latents that are handed over are the caller's, and not predicted.
    given = 3 * wanted.height * wanted.width * 4 if part == "encode" else 0
    assert predicted.total == pytest.approx(memory.peak - given, rel=0.01)
    assert predicted.weights == sum(p.numel() * 4 for p in weights)
    assert min(predicted.state, predicted.features, predicted.result, predicted.working) > 0
    measured = peak_of_events(events.profiler.kineto_results.events())
    assert predicted.total - predicted.weights == pytest.approx(measured - given, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "piece"), [("2.1", 3), ("2.1", 21), ("2.2", 21)])
def test_2k_fits_in_4_gb(version: str, piece: int) -> None:
    """A clip of 81 frames at 2K fits, decoded in bfloat16 and encoded in float32, segment by segment and whole."""
    for part, dtype in (("decode", torch.bfloat16), ("encode", torch.float32)):
        options = {"dtype": dtype, "limit": 4 * GB, "piece": piece}
        planned = plan_vae(REAL[version], part, 2560, 1408, **options)
        assert planned.peak.total <= 4 * GB
        assert planned.plan.park
        assert "host memory" in str(planned)


@pytest.mark.parametrize("version", REAL)
def test_the_peak_does_not_depend_on_the_clip(version: str) -> None:
    """The peak does not grow with the length of a piece where tiles wait in host memory."""
    plan = VAEPlan(4, 4, frames=2, chunk=None, park=True)
    base = Request(REAL[version], "decode", 2560, 1408, torch.bfloat16, 90, 4, 1)
    peaks = {predict(replace(base, piece=piece), plan).total for piece in (4, 21, 161)}
    assert len(peaks) == 1


@pytest.mark.slow
def test_more_memory_is_used_for_fewer_tiles() -> None:
    limits = (None, 48 * GB, 24 * GB, 12 * GB, 6 * GB, 3 * GB)
    plans = [plan_vae(REAL["2.1"], "decode", 2560, 1408, limit=limit) for limit in limits]
    tiles = [planned.plan.tiles for planned in plans]
    assert tiles == sorted(tiles)
    assert plans[0].plan == VAEPlan()
    assert all(planned.limit is None or planned.peak.total <= planned.limit for planned in plans)
    assert [planned.plan.park for planned in plans[:3]] == [False] * 3
    redundancies = [planned.redundancy for planned in plans]
    assert redundancies[0] == 1
    assert redundancies == sorted(redundancies)
    # The work of halos: 3 % for 2 x 2 tiles of 2K, as the areas of all layers say.
    two = PlannedVAE(VAEPlan(2, 2), plans[0].request, None)
    assert two.redundancy == pytest.approx(1.03, abs=0.01)


@pytest.mark.slow
def test_portrait_is_cut_the_other_way() -> None:
    wide, tall = (
        plan_vae(REAL["2.1"], "decode", *size, limit=4 * GB, piece=21).plan for size in ((2560, 1408), (1408, 2560))
    )
    assert (wide.rows, wide.columns) == (tall.columns, tall.rows)
    assert wide.rows < wide.columns


def test_a_cpu_has_no_other_memory() -> None:
    config = SHORT
    whole = predict(Request(config, "decode", 96, 64, torch.float32, None, 3, 1), VAEPlan()).total
    planned = plan_vae(config, "decode", 96, 64, dtype=torch.float32, limit=whole - 1, capability=None)
    assert not planned.plan.park
    assert planned.plan != VAEPlan()
    assert planned.peak.total < whole
    with pytest.raises(InputError, match="park: expected False or None on a CPU"):
        plan_vae(config, "decode", 96, 64, capability=None, park=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "both"}, "part: expected decode or encode, got 'both'"),
        ({"width": 97}, "size: width and height must be multiples of 2, got 97x64"),
        ({"piece": 0}, "piece: expected at least 1, got 0"),
        ({"limit": 0}, "limit: expected at least 1 byte, got 0"),
        ({"limit": 10**5}, r"limit: 0.1 MB is too little to decode 96x64; the smallest plan needs \d+\.\d MB\n"),
    ],
)
def test_bad_requests_are_named(options: dict[str, object], message: str) -> None:
    given = {"part": "decode", "width": 96, "height": 64, "dtype": torch.float32, "capability": None, **options}
    part, width, height = (given.pop(name) for name in ("part", "width", "height"))
    with pytest.raises(InputError, match=message):
        plan_vae(SHORT, part, width, height, **given)


def test_the_smallest_plan_that_is_named_fits() -> None:
    config = SHORT
    with pytest.raises(InputError) as refused:
        plan_vae(config, "encode", 96, 64, limit=10**5, capability=90)
    needed = float(str(refused.value).split("needs ")[1].split(" MB")[0])
    assert plan_vae(config, "encode", 96, 64, limit=int((needed + 0.1) * 10**6), capability=90).plan.park


def test_plans_are_plain_data() -> None:
    assert dataclasses.astuple(VAEPlan(2, 3, 1, None, True)) == (2, 3, 1, None, True)


@pytest.mark.parametrize("version", SMALL)
@pytest.mark.parametrize("part", ["decode", "encode"])
def test_closed_forms_are_what_a_run_counts(version: str, part: str) -> None:
    """Operations and remembered bytes are those of one more latent frame on the GPU's operators, but for attention."""
    wanted = replace(request(version, part, 1), dtype=torch.bfloat16, capability=90, width=256, height=128)
    vae, totals = meta_vae(wanted.config, wanted.dtype), []
    for blocks in (4, 5):
        with torch.no_grad(), pretend_gpu(90), all_kernels(), FlopCounterMode(display=False) as counter:
            if part == "encode":
                vae.encode(torch.empty(1, 3, 4 * blocks - 3, 128, 256, device="meta"))
            else:
                for _ in vae.decode_frames(
                    [torch.empty(1, wanted.config.z_dim, blocks, *wanted.latent_size, device="meta")]
                ):
                    pass
        totals.append(counter.get_total_flops())
    rows, columns = wanted.latent_size
    assert rows * columns * sum(operations(wanted.config, part)) == pytest.approx(totals[1] - totals[0], rel=0.02)
    held = predict(wanted, VAEPlan()).state
    assert state_bytes(wanted) == pytest.approx(held, rel=0.1 if part == "decode" else 1e-6)  # and folded weights


@pytest.mark.parametrize("version", SMALL)
@pytest.mark.parametrize(("part", "park"), [("decode", False), ("decode", True), ("encode", False)])
def test_a_quick_run_of_single_frames_has_the_peak_of_a_whole_one(
    version: str, part: str, park: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(request(version, part, 1), dtype=torch.bfloat16, capability=90, width=256, height=128)
    plan = VAEPlan(2, 2, 1, None if park else 1, park)
    quick = predict(wanted, plan)
    monkeypatch.setattr(vae_plan, "_lean", lambda request, plan: False)
    vae_plan.predict.cache_clear()
    vae_plan._dry_run.cache_clear()
    # A whole run begins with a latent frame of one frame, and so has three of four frames less at once.
    fewer = 0.75 * quick.result if part == "decode" and not park else 0
    assert quick.total - fewer == pytest.approx(predict(wanted, plan).total, rel=1e-3)
    assert quick.state == predict(wanted, plan).state
    vae_plan.predict.cache_clear()
    vae_plan._dry_run.cache_clear()
