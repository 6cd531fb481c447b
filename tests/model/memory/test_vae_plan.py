"""The VAE's planner predicts what is used, chooses what fits, and explains what cannot fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

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
GB = 10**9


@pytest.mark.parametrize("call", [
    lambda x: F.conv3d(x, x[:, :, :1, :3, :3].repeat(1, 1, 2, 1, 1), None, (1, 2, 1), (0, 1, 1)),
    lambda x: x.permute(0, 2, 3, 4, 1)[..., :3] * x.new_ones(1), lambda x: x[:1, 0, 0, 0].expand(4, -1).sub(1),
    lambda x: F.rms_norm(x, x.shape[4:]), lambda x: x.mean((1, -1)), lambda x: (x > 0).sum(dim=1, dtype=torch.int32),
    lambda x: torch.stack((x, x), -1), lambda x: torch.cat((x[:, 1:], x), 1), lambda x: F.linear(x, x[0, 0, 0]),
])  # fmt: skip
def test_tensors_without_memory_are_what_real_ones_are(call) -> None:  # type: ignore[no-untyped-def]
    real = torch.randn(2, 5, 4, 6, 8)
    with TensorMemory():
        made = call(real.to("meta"))
    assert (made.shape, made.dtype, made.stride()) == (call(real).shape, call(real).dtype, call(real).stride())


def request(version: str, part: str, piece: int) -> Request:
    config = SMALL[version]
    stride = config.spatial_stride
    return Request(config, part, 4 * stride, 3 * stride, torch.float32, None, piece)


def run(vae: WanVAE, wanted: Request, plan: VAEPlan) -> None:
    """Runs three pieces of a clip and drops their results."""
    config, piece, rate = wanted.config, wanted.piece, wanted.config.temporal_stride
    if wanted.part == "decode":
        shape = (1, config.z_dim, piece, *wanted.latent_size)
        results = vae.decode_frames((torch.randn(shape) for _ in range(3)), plan)
    else:
        # One picture for all frames: a clip of pixels would count as the model's.
        picture = torch.rand(1, 3, 1, wanted.height, wanted.width)
        sizes = [rate * piece - (rate - 1), rate * piece, rate * piece]
        results = vae.encode_stream((picture.expand(-1, -1, n, -1, -1) for n in sizes), plan)
    for result in results:
        del result


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
    """The prediction is within 1 % of live tensors of a real run."""
    wanted = request(version, part, piece)
    vae = random_weights(WanVAE, wanted.config, 0)
    weights = vae.weights_of(part)
    with TensorMemory(weights) as memory:
        run(vae, wanted, plan)
    predicted = predict(wanted, plan)
    # The picture or the latents that are handed over are the caller's, and not predicted.
    given = 3 * wanted.height * wanted.width * 4 if part == "encode" else 0
    assert predicted.total == pytest.approx(memory.peak - given, rel=0.01)
    assert predicted.weights == sum(p.numel() * 4 for p in weights)
    assert min(predicted.state, predicted.waiting, predicted.total - sum(predicted[1:])) > 0


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


@pytest.mark.slow
def test_more_memory_is_used_for_fewer_tiles() -> None:
    limits = (None, 48 * GB, 24 * GB, 12 * GB, 6 * GB, 3 * GB)
    plans = [plan_vae(REAL["2.1"], "decode", 2560, 1408, limit=limit) for limit in limits]
    tiles = [planned.plan.tiles for planned in plans]
    assert tiles == sorted(tiles)
    sizes = ((2560, 1408), (1408, 2560))
    wide, tall = (plan_vae(REAL["2.1"], "decode", *size, limit=4 * GB).plan for size in sizes)
    assert (wide.rows, wide.columns) == (tall.columns, tall.rows)
    assert wide.rows < wide.columns
    assert plans[0].plan == VAEPlan()
    assert all(planned.peak.total <= limit for planned, limit in zip(plans[1:], limits[1:], strict=True))
    assert [planned.plan.park for planned in plans[:3]] == [False] * 3
    assert plans[0].redundancy == 1
    # The work of halos: 3 % for 2 x 2 tiles of 2K, as the areas of all layers say.
    two = PlannedVAE(VAEPlan(2, 2), plans[0].request)
    assert two.redundancy == pytest.approx(1.03, abs=0.01)


def test_a_cpu_has_no_other_memory() -> None:
    whole = predict(Request(SHORT, "decode", 96, 64, torch.float32, None, 3), VAEPlan()).total
    planned = plan_vae(SHORT, "decode", 96, 64, dtype=torch.float32, limit=whole - 1, capability=None)
    assert not planned.plan.park
    assert planned.peak.total < whole


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
                latents = torch.empty(1, wanted.config.z_dim, blocks, *wanted.latent_size, device="meta")
                list(vae.decode_frames([latents]))
        totals.append(counter.get_total_flops())
    rows, columns = wanted.latent_size
    assert rows * columns * sum(operations(wanted.config, part)) == pytest.approx(totals[1] - totals[0], rel=0.02)
    held = predict(wanted, VAEPlan()).state
    assert state_bytes(wanted) == pytest.approx(held, rel=0.1 if part == "decode" else 1e-6)  # and folded weights


def test_a_quick_run_of_single_frames_has_the_peak_of_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parked tile's peak is that of its last latent frame, before which more frames may be run at once."""
    wanted = replace(request("2.1", "decode", 1), dtype=torch.bfloat16, capability=90, width=256, height=128)
    found = []
    for quick in (True, False):
        monkeypatch.setattr(vae_plan, "_lean", lambda request, plan, quick=quick: quick)
        for cached in (predict, vae_plan._dry_run):
            cached.cache_clear()
        found.append(predict(wanted, VAEPlan(2, 2, 1, None, True)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    for cached in (predict, vae_plan._dry_run):
        cached.cache_clear()
