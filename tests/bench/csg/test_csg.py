"""Times from few layers, steps and latent frames: what is scaled, and that scaling is exact where the work is.

The clock of these tests runs by what is computed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from bench.csg import vae_time, window
from bench.csg.extrapolated import END_TO_END, FLASH_2, TWO_STAGE, short, verdicts
from bench.csg.setups import MODELS, SIZES, Setup, setups, variants
from bench.csg.vae_time import VAEClock, extrapolated, file_seconds, plan_vaes, segments
from bench.csg.window import WindowClock, WindowTime, plan_seconds, shortened
from bench.vae.shapes import SIZES as VAE_SIZES
from model import plan
from model.csg.denoiser import Denoiser
from model.csg.sampler import SegmentPlan, Window
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT
from model.machine.counted import TensorMemory
from model.memory.vae_places import Card, PipelinePlans
from model.pipeline.encoders import empty_text
from model.pipeline.stages import make_reference
from model.vae.tiles import VAEPlan
from model.weights.load import random_weights
from tests.support.bench_session import CPU
from tests.support.operation_clock import OperationClock

SMALL: Setup = setups(["1.3b"], ["720p"], 81, 4)[0].reduced()
DIT = replace(SMALL.dit, num_layers=5)
WINDOWS = [Window((0,), (1, 2, 3)), Window((0, 3), (4, 5)), Window((0,), (1,))]
EXACT = {"rel": 1e-9, "abs": 0.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> OperationClock:
    return OperationClock().install(monkeypatch, window, vae_time)


def window_clock(layers: tuple[int, int] = (1, 3), num_blocks: int = 9) -> WindowClock:
    return WindowClock(DIT, (4, 8), num_blocks, CPU, torch.float32, layers=layers)


# A window from few layers


@pytest.mark.parametrize(
    "layers", [(1, 3), *(pytest.param(n, marks=pytest.mark.slow) for n in ((1, 2), (2, 4)))], ids=str
)
@pytest.mark.parametrize("mode", ["bidirectional", pytest.param("causal", marks=pytest.mark.slow)])
def test_a_window_from_few_layers_is_the_window_of_all_layers(
    mode: str, layers: tuple[int, int], clock: OperationClock
) -> None:
    """The reference is measured whole: both numbers of layers are those of the DiT."""
    with clock:
        few, whole = window_clock(layers), window_clock((5, 5))
        for given in WINDOWS:
            scaled, exact = (found.measure(given, mode, split=False) for found in (few, whole))
            assert scaled.step_seconds == pytest.approx(exact.step_seconds, **EXACT)
            assert scaled.open_seconds == pytest.approx(exact.open_seconds, **EXACT)
            assert scaled.tokens == exact.tokens == 8 * len(given.blocks)
            assert (scaled.layers, scaled.of, exact.layers, exact.of) == (layers[1], 5, 5, 5)
    assert scaled.step_seconds > 0
    assert scaled.note == f"from {layers[1]} of 5 layers"


def test_opening_a_window_takes_longer_with_every_layer_only_in_the_causal_mode(clock: OperationClock) -> None:
    """The causal mode computes keys and values when a window is opened."""
    with clock:
        opened = {
            mode: [window_clock((n, n)).measure(WINDOWS[1], mode, split=False).open_seconds for n in (2, 3, 4)]
            for mode in ("bidirectional", "causal")
        }
    assert len(set(opened["bidirectional"])) == 1
    two, three, four = opened["causal"]
    assert two < three < four
    assert four - three == pytest.approx(three - two, **EXACT)


def test_large_windows_are_run_once_and_come_out_the_same(
    clock: OperationClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with clock:
        expected = window_clock().measure(WINDOWS[0], split=False)
        monkeypatch.setattr(window, "LARGE", 0)
        steps, run = [], Denoiser.step
        monkeypatch.setattr(Denoiser, "step", lambda self, i: steps.append(i) or run(self, i))
        found = window_clock().measure(WINDOWS[0], split=False)
    assert replace(found, open_seconds=expected.open_seconds) == expected
    assert found.open_seconds > expected.open_seconds  # the first opening of its kind, which a clip has once
    assert len(steps) == 4  # of both numbers of layers a small window to compile, and the window itself


def test_times_that_noise_has_turned_over_are_not_scaled_below_the_measured() -> None:
    found = window_clock((1, 3))
    assert found._extrapolated([2.0, 3.0]) == pytest.approx(2.0 + 4 * 0.5)
    assert found._extrapolated([2.0, 1.9]) == 2.0


@pytest.mark.parametrize("layers", [(1, 5), (1, 8), (5, 5)], ids=str)
def test_a_dit_without_more_layers_is_run_whole(layers: tuple[int, int]) -> None:
    found = window_clock(layers)
    assert found.layers == (5, 5)
    assert len(found.dit.blocks) == 5
    assert found._extrapolated([7.0]) == 7.0


def test_a_step_is_shared_by_attention_linear_and_other_only_where_that_is_asked_for() -> None:
    found = window_clock().measure(WINDOWS[1])
    assert set(found.shares) == {"attention", "linear", "other"}
    assert sum(found.shares.values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in found.shares.values())
    assert found.peak_bytes is None  # a CPU keeps no count
    assert window_clock().measure(WINDOWS[1], split=False).shares == {}


def test_a_segment_is_opened_once_and_stepped() -> None:
    assert WindowTime(10, 0.5, 2.0, {}, None, 1, 3).seconds(4) == 8.5


@pytest.mark.parametrize(
    "plan",
    [
        SegmentPlan(9, anchor=False),
        *(pytest.param(p, marks=pytest.mark.slow) for p in (SegmentPlan(12), SegmentPlan(10, 2, 2, 1))),
    ],
    ids=str,
)
def test_a_plan_takes_as_long_as_all_of_its_windows(plan: SegmentPlan, clock: OperationClock) -> None:
    """Windows of one kind are measured once: there are fewer kinds than windows, and the sum is that of all."""
    with clock:
        found = window_clock(num_blocks=plan.num_blocks)
        each = [found.measure(given, split=False).seconds(4) for given in plan]
        total, times = plan_seconds(found, plan, 4, split=False)
    assert total == pytest.approx(sum(each), **EXACT)
    assert sum(count for count, _ in times) == len(plan)
    assert len(times) == len({(len(given.conditioning), len(given.noisy)) for given in plan}) < len(plan)


def test_a_shortened_model_shares_its_weights_and_leaves_the_whole_one_alone() -> None:
    dit = random_weights(WanDiT, DIT, 0)
    short_dit = shortened(dit, 2)
    whole = dict(dit.named_parameters())
    kept = dict(short_dit.named_parameters())
    assert all(value is whole[name] for name, value in kept.items())
    assert set(whole) - set(kept) == {name for name in whole if name.split(".")[:2] in [["blocks", c] for c in "234"]}
    assert (len(short_dit.blocks), short_dit.config.num_layers) == (2, 2)
    assert (len(dit.blocks), dit.config) == (5, DIT)


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_missing_of_a_peak_is_what_a_denoiser_of_all_layers_holds_more(count: int) -> None:
    """A peak lacks what a model and its denoiser keep between windows for the layers that were not run, by counting."""
    found, held = window_clock((1, 3)), []
    for loaded, layers in ((5, 5), (3, count)):
        dit = random_weights(WanDiT, replace(DIT, num_layers=loaded), 0)
        latents, reference = (torch.zeros(1, 16, n, 4, 8) for n in (3, 9))
        with TensorMemory(dit.parameters()) as memory:
            denoiser = Denoiser(
                shortened(dit, layers), found.text, None, latents=latents, reference=reference,
                sigmas=flow_sigmas(4, 5.0), max_blocks=4,
            )  # fmt: skip
            held.append(memory.live)
        del denoiser
    assert found._missing_bytes(count) == held[0] - held[1]
    assert torch.equal(found.text, empty_text(DIT.text_dim))


# The VAE from few latent frames


def test_the_time_of_many_from_that_of_two_numbers() -> None:
    assert extrapolated((4, 7), (1.0, 2.5), 21) == pytest.approx(2.5 + 14 * 0.5)
    assert extrapolated((4, 7), (1.0, 2.5), 7) == 2.5
    for later in (1.0, 0.9):
        with pytest.raises(RuntimeError, match=f"^7 took {later:.3g} s and 4 1 s: too short to scale$"):
            extrapolated((4, 7), (1.0, later), 21)


@pytest.mark.parametrize("num_blocks", [2, 9, 12])
def test_segments_are_the_anchor_and_then_those_of_the_papers_plan(num_blocks: int) -> None:
    latents = torch.arange(float(num_blocks)).view(1, 1, -1, 1, 1)
    found = [piece.flatten().tolist() for piece in segments(latents)]
    assert found == [[0.0], *([*map(float, given.noisy)] for given in SegmentPlan(num_blocks))]


@pytest.mark.slow
def test_reference_and_decode_from_few_latent_frames_are_those_of_the_clip(clock: OperationClock) -> None:
    setup = replace(SMALL, num_frames=49)  # 13 latent frames, of which 4 and 7 are run
    rows, columns = setup.latent_size
    with clock, torch.no_grad():
        found = VAEClock(setup, plan_vaes(setup, CPU, torch.float32), CPU)
        scaled, peak = found.reference()
        motion = torch.randn(1, 16, 13, *found.plans.motion.request.latent_size)
        picture = torch.zeros(1, 3, 1, setup.height, setup.width)
        start = clock.seconds()
        make_reference(motion, found.vae, found.vae, picture)
        assert scaled == pytest.approx(clock.seconds() - start, rel=1e-3)  # motion's own making is in it
        decoded, _ = found.decode()
        latents = torch.randn(1, 16, 13, rows, columns)
        start = clock.seconds()
        assert sum(frames.shape[1] for frames in found.vae.decode_frames(segments(latents))) == 49
        assert decoded == pytest.approx(clock.seconds() - start, rel=1e-3)
    assert peak is None
    assert found.note == "from 7 of 13 latent frames"
    assert found.vae.encoder is None  # the pipeline has none either while it decodes


@pytest.mark.slow
def test_the_vae_works_as_it_does_beside_both_stages_on_that_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE is untiled on a large card, whatever the model; on a small one a larger model leaves it less memory."""

    def planned(memory: int) -> list[PipelinePlans]:
        monkeypatch.setattr(plan.Card, "of", lambda device: Card(90, memory))
        found = setups(["1.3b", "14b"], ["2K"], 81, 4)
        return [plan_vaes(setup, torch.device("cuda"), torch.bfloat16) for setup in found]

    large, same = planned(141 * 10**9)
    assert large == same
    assert {place.plan for place in vars(large).values()} == {VAEPlan()}
    small, large_model = planned(24 * 10**9)
    assert small.encode_dtype == torch.float32
    assert large_model.decode.peak.total < small.decode.peak.total < large.decode.peak.total


def test_short_runs_are_repeated_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    OperationClock().install(monkeypatch)  # no memory is predicted
    found = VAEClock(SMALL, plan_vaes(SMALL, CPU, torch.float32), CPU)
    for marks, least in (([0.0, 1.0, 5.0, 5.5], 0.5), ([0.0, 2.5], 2.5)):
        times = iter(marks)
        monkeypatch.setattr(vae_time.time, "perf_counter", lambda times=times: next(times))
        assert found._least(lambda: None) == least
        assert next(times, None) is None


def test_without_pyav_a_file_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_time.importlib.util, "find_spec", lambda name: None)
    assert file_seconds(SMALL) is None


# What is compared


def test_setups_are_every_model_at_every_size_size_by_size() -> None:
    found = setups(["1.3b", "14b"], ["2K", "720p"], 81, 4)
    assert [s.name for s in found] == ["1.3b, 2K", "14b, 2K", "1.3b, 720p", "14b, 720p"]
    assert [(s.width, s.height) for s in found[::2]] == [VAE_SIZES["2K"], VAE_SIZES["720p"]]
    assert (found[0].num_blocks, found[0].latent_size, found[0].tokens_per_block) == (21, (176, 320), 88 * 160)
    assert [s.dit.dim for s in found[:2]] == [1536, 5120]
    # End to end and Stage II are one DiT, which reads the reference beside the latents.
    assert all(s.dit.in_channels == 2 * s.vae.z_dim + 4 for s in setups(MODELS, SIZES, 81, 4))
    assert short(found[0]).num_frames == 33
    assert short(replace(found[0], num_frames=17)).num_frames == 17


@pytest.mark.parametrize("setup", setups(MODELS, SIZES, 81, 4), ids=lambda setup: setup.name)
def test_toy_sizes_keep_the_structure_and_fit_the_models(setup: Setup) -> None:
    small = setup.reduced()
    assert small.size == f"small {setup.size}"
    assert small.dit.dim <= 512
    assert small.width * small.height <= setup.width * setup.height / 100
    assert small.width % (2 * small.vae.spatial_stride) == small.height % (2 * small.vae.spatial_stride) == 0
    for kept in ("in_channels", "out_channels", "patch_size"):
        assert getattr(small.dit, kept) == getattr(setup.dit, kept)
        assert getattr(small.stage_one, kept) == getattr(setup.stage_one, kept)
    assert (small.vae.z_dim, small.vae.residual, small.steps) == (setup.vae.z_dim, setup.vae.residual, setup.steps)


@pytest.mark.parametrize("num_blocks", [9, 21])
def test_every_variant_generates_every_block_once(num_blocks: int) -> None:
    found = variants(num_blocks)
    for variant in found:
        made = Counter(block for given in variant.plan for block in given.noisy)
        assert made == Counter(range(1, num_blocks)), variant.name
    assert len({variant.name for variant in found}) == len(found)


def test_variants_are_the_papers_setting_and_one_change_each() -> None:
    first, *others = variants(21)
    paper = SegmentPlan(21)
    assert (first.name, first.plan, first.mode) == ("M=3, N=1", paper, "bidirectional")
    fields = ("blocks_per_segment", "neighbours_left", "neighbours_right", "anchor")
    changed = Counter[str]()
    for variant in others:
        differing = [name for name in fields if getattr(variant.plan, name) != getattr(paper, name)]
        differing += ["mode"] * (variant.mode != first.mode)
        assert len(differing) == 1, variant.name
        changed[differing[0]] += 1
        assert f"M={variant.plan.blocks_per_segment}, N={variant.plan.neighbours_left}" in variant.name
    assert changed == {
        "blocks_per_segment": 3, "neighbours_left": 2, "neighbours_right": 1, "anchor": 1, "mode": 1,
    }  # fmt: skip


# What the figures say


def clip(model: str, size: str, method: str, seconds: float) -> dict[str, object]:
    return {"model": model, "size": size, "method": method, "total_seconds": seconds}


def test_verdicts_are_the_largest_model_end_to_end_over_the_smaller_ones_in_two_stages() -> None:
    clips = [
        clip("14b", "2K", END_TO_END, 8080.0), clip("14b", "2K", FLASH_2, 8040.0), clip("14b", "2K", TWO_STAGE, 100.0),
        clip("1.3b", "2K", TWO_STAGE, 20.0), clip("1.3b", "2K", END_TO_END, 999.0), clip("5b", "2K", TWO_STAGE, 19.9),
        clip("14b", "720p", END_TO_END, 50.0), clip("1.3b", "720p", TWO_STAGE, 1.0),
        clip("5b", "1080p", TWO_STAGE, 1.0),
    ]  # fmt: skip
    found = verdicts(clips, [])
    assert [(v["shape"], v["what"].split(" ")[-4], v["wanted"], v["met"]) for v in found] == [
        ("2K", "1.3b", 404.0, True), ("2K", "5b", 404.0, True), ("2K", "1.3b", 404.0, False), ("2K", "5b", 404.0, True),
        ("720p", "1.3b", None, None),
    ]  # fmt: skip
    values = [v["value"] for v in found]
    assert values == pytest.approx([404.0, 8080 / 19.9, 402.0, 8040 / 19.9, 50.0])
    assert found[2]["what"] == f"14b {FLASH_2} over 1.3b {TWO_STAGE}"
    assert {v["basis"] for v in found} == {"extrapolated"}


def test_an_extrapolation_holds_within_a_twentieth_and_one_that_failed_is_not_judged() -> None:
    rows = [
        {"model": "1.3b", "size": "720p", "what": what, "status": status, "difference": difference}
        for what, status, difference in (("decode", "ok", 0.05), ("Stage II", "ok", 0.051), ("file", "failed", None))
    ]
    assert [(v["what"], v["value"], v["met"]) for v in verdicts([], rows)] == [
        ("extrapolation of decode, deviation", 0.05, True),
        ("extrapolation of Stage II, deviation", 0.051, False),
    ]
