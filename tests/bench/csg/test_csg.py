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
from bench.csg.vae_time import VAEClock, extrapolated, plan_vaes
from bench.csg.window import WindowClock, plan_seconds, shortened
from model.csg.denoiser import Denoiser
from model.csg.sampler import SegmentPlan, Window
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT
from model.machine.counted import TensorMemory
from model.pipeline.encoders import empty_text
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
    ("mode", "layers"), [("bidirectional", (1, 3)), pytest.param("causal", (2, 4), marks=pytest.mark.slow)]
)
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


def test_times_that_noise_has_turned_over_are_not_scaled_below_the_measured_nor_a_dit_that_is_run_whole() -> None:
    found = window_clock((1, 3))
    assert found._extrapolated([2.0, 3.0]) == pytest.approx(2.0 + 4 * 0.5)
    assert found._extrapolated([2.0, 1.9]) == 2.0
    whole = window_clock((1, 5))
    assert (whole.layers, len(whole.dit.blocks), whole._extrapolated([7.0])) == ((5, 5), 5, 7.0)


def test_a_step_is_shared_by_attention_linear_and_other_only_where_that_is_asked_for() -> None:
    found = window_clock().measure(WINDOWS[1])
    assert set(found.shares) == {"attention", "linear", "other"}
    assert sum(found.shares.values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in found.shares.values())
    assert found.peak_bytes is None  # a CPU keeps no count
    assert window_clock().measure(WINDOWS[1], split=False).shares == {}


def test_a_plan_takes_as_long_as_all_of_its_windows(clock: OperationClock) -> None:
    """Windows of one kind are measured once: there are fewer kinds than windows, and the sum is that of all."""
    plan = SegmentPlan(9, anchor=False)
    with clock:
        found = window_clock(num_blocks=plan.num_blocks)
        each = [found.measure(given, split=False).seconds(4) for given in plan]
        total, times = plan_seconds(found, plan, 4, split=False)
    assert total == pytest.approx(sum(each), **EXACT)
    assert sum(count for count, _ in times) == len(plan) > len(times)


def test_what_is_missing_of_a_peak_is_what_a_denoiser_of_all_layers_holds_more() -> None:
    """A peak lacks what a model and its denoiser keep between windows for the layers that were not run, by counting."""
    found, held = window_clock((1, 3)), []
    for loaded, layers in ((5, 5), (3, 1)):
        dit = random_weights(WanDiT, replace(DIT, num_layers=loaded), 0)
        latents, reference = (torch.zeros(1, 16, n, 4, 8) for n in (3, 9))
        with TensorMemory(dit.parameters()) as memory:
            denoiser = Denoiser(
                shortened(dit, layers), found.text, None, latents=latents, reference=reference,
                sigmas=flow_sigmas(4, 5.0), max_blocks=4,
            )  # fmt: skip
            held.append(memory.live)
        del denoiser
    assert found._missing_bytes(1) == held[0] - held[1]
    assert torch.equal(found.text, empty_text(DIT.text_dim))


# The VAE from few latent frames


def test_the_time_of_many_from_that_of_two_numbers() -> None:
    assert extrapolated((4, 7), (1.0, 2.5), 21) == pytest.approx(2.5 + 14 * 0.5)
    assert extrapolated((4, 7), (1.0, 2.5), 7) == 2.5
    for later in (1.0, 0.9):
        with pytest.raises(RuntimeError, match=f"^7 took {later:.3g} s and 4 1 s: too short to scale$"):
            extrapolated((4, 7), (1.0, later), 21)


@pytest.mark.slow
def test_reference_and_decode_from_few_latent_frames_are_those_of_the_clip(clock: OperationClock) -> None:
    setup = replace(SMALL, num_frames=49)  # 13 latent frames, of which 4 and 7 are run
    with clock:
        found = VAEClock(setup, plan_vaes(setup, CPU, torch.float32), CPU)
        for run in (found.reference, found.decode):
            scaled, peak = found.extrapolated(run)
            assert scaled == pytest.approx(found.seconds(run, 13), rel=1e-3)
            assert peak is None
    assert found.note == "from 7 of 13 latent frames"
    assert found.vae.encoder is None  # the pipeline has none either while it decodes


# What is compared


def test_setups_are_every_model_at_every_size_size_by_size() -> None:
    found = setups(["1.3b", "14b"], ["2K", "720p"], 81, 4)
    assert [s.name for s in found] == ["1.3b, 2K", "14b, 2K", "1.3b, 720p", "14b, 720p"]
    assert [(s.width, s.height) for s in found[::2]] == [(2560, 1408), (1280, 704)]
    assert (found[0].num_blocks, found[0].latent_size) == (21, (176, 320))
    assert [s.dit.dim for s in found[:2]] == [1536, 5120]
    # End to end and Stage II are one DiT, which reads the reference beside the latents.
    assert all(s.dit.in_channels == 2 * s.vae.z_dim + 4 for s in setups(MODELS, SIZES, 81, 4))
    assert short(found[0]).num_frames == 33
    assert short(replace(found[0], num_frames=17)).num_frames == 17


def test_variants_are_the_papers_setting_and_one_change_each_and_generate_every_block_once() -> None:
    first, *others = found = variants(21)
    paper = SegmentPlan(21)
    assert (first.name, first.plan, first.mode) == ("M=3, N=1", paper, "bidirectional")
    fields = ("blocks_per_segment", "neighbours_left", "neighbours_right", "anchor")
    for variant in others:
        differing = [name for name in fields if getattr(variant.plan, name) != getattr(paper, name)]
        assert len(differing) + (variant.mode != first.mode) == 1, variant.name
        assert f"M={variant.plan.blocks_per_segment}, N={variant.plan.neighbours_left}" in variant.name
    for variant in found:
        assert Counter(block for given in variant.plan for block in given.noisy) == Counter(range(1, 21)), variant.name
    assert len({variant.name for variant in found}) == len(found) == 9


# What the figures say


def test_verdicts_are_the_largest_model_end_to_end_over_the_smaller_ones_in_two_stages() -> None:
    times = [
        ("14b", "2K", END_TO_END, 8080.0), ("14b", "2K", FLASH_2, 8040.0), ("14b", "2K", TWO_STAGE, 100.0),
        ("1.3b", "2K", TWO_STAGE, 20.0), ("1.3b", "2K", END_TO_END, 999.0), ("5b", "2K", TWO_STAGE, 19.9),
        ("14b", "720p", END_TO_END, 50.0), ("1.3b", "720p", TWO_STAGE, 1.0), ("5b", "1080p", TWO_STAGE, 1.0),
    ]  # fmt: skip
    found = verdicts([dict(zip(("model", "size", "method", "total_seconds"), t, strict=True)) for t in times], [])
    assert [(v["shape"], v["what"].split(" ")[-4], v["value"], v["met"]) for v in found] == [
        ("2K", "1.3b", 404.0, True), ("2K", "5b", 8080 / 19.9, True), ("2K", "1.3b", 402.0, False),
        ("2K", "5b", 8040 / 19.9, True), ("720p", "1.3b", 50.0, None),
    ]  # fmt: skip
    assert found[2]["what"] == f"14b {FLASH_2} over 1.3b {TWO_STAGE}"
    assert {v["basis"] for v in found} == {"extrapolated"}


def test_an_extrapolation_holds_within_a_twentieth_and_one_that_failed_is_not_judged() -> None:
    rows = [
        {"model": "1.3b", "size": "720p", "what": what, "status": status, "difference": difference}
        for what, status, difference in (("decode", "ok", 0.05), ("Stage II", "ok", 0.051), ("file", "failed", None))
    ]
    assert [(v["value"], v["met"]) for v in verdicts([], rows)] == [(0.05, True), (0.051, False)]
