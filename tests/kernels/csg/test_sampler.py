"""Segment-wise generation with DiTs of other makes: the assembly of windows, and the sampler around any model."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import nn

from model.csg.schedule import flow_sigmas
from swifti2v_kernels import SegmentPlan, Window, assemble_window, block_noise, sample_segments
from tests.support.tolerances import EXACT, PARITY, relative_error

SIGMAS = flow_sigmas(3, 5.0)
PLANS = [
    SegmentPlan(8),  # the last segment is a short one
    SegmentPlan(8, 2, 2, 1),
    SegmentPlan(7, 3, 1, 0, anchor=False),
    SegmentPlan(5, 2, 0, anchor=False),  # windows with nothing given
]


def run(model, reference, **options):
    """Returns the sampled clip; ``reference`` is left as it is."""
    clip = reference.clone()
    given = {"plan": PLANS[0], "sigmas": SIGMAS, "mask_channels": getattr(model, "mask_channels", None)}
    given |= {} if "noise" in options else {"seed": 5}
    segments = list(sample_segments(model, clip, **given | options))
    assert torch.equal(torch.cat(segments, dim=2), clip[:, :, 1:])
    return clip


# Assembly


@pytest.mark.parametrize("mask_channels", [None, 0, 4])
def test_a_window_is_its_blocks_joined(mask_channels):
    reference, latents = torch.randn(2, 3, 9, 4, 6), torch.randn(2, 3, 2, 4, 6)
    given = torch.stack((reference[:, :, 0], reference[:, :, 3], reference[:, :, 6]), dim=2)
    expected = torch.cat((given, latents), dim=2)
    if mask_channels is not None:
        mask = torch.cat((torch.ones(2, mask_channels, 3, 4, 6), torch.zeros(2, mask_channels, 2, 4, 6)), dim=2)
        known = torch.stack([reference[:, :, block] for block in (0, 3, 6, 4, 5)], dim=2)
        expected = torch.cat((expected, mask, known), dim=1)
    window = Window((0, 3, 6), (4, 5))
    actual = assemble_window(reference, latents, window, mask_channels=mask_channels)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()
    half = assemble_window(reference.double(), latents.half(), window, mask_channels=mask_channels)
    assert torch.equal(half, expected.half())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 9, 4, 6), torch.zeros(1, 3, 2, 4, 6)), r"reference: expected \[B, z, N, h, w\], got \(3, 9"),
        ((torch.zeros(1, 3, 9, 4, 6), torch.zeros(1, 3, 3, 4, 6)), r"latents: expected \(1, 3, 2, 4, 6\) .* 3, 3, 4"),
        ((torch.zeros(1, 3, 9, 4, 6), torch.zeros(1, 4, 2, 4, 6)), r"latents: expected \(1, 3, 2, 4, 6\)"),
        ((torch.zeros(1, 3, 5, 4, 6), torch.zeros(1, 3, 2, 4, 6)), r"window: expected blocks in 0..4, got \(0, 4, 5\)"),
    ],
)
def test_what_does_not_fit_a_window_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        assemble_window(*arguments, Window((0,), (4, 5)))
    with pytest.raises(ValueError, match="mask_channels: expected None or at least 0, got -1"):
        assemble_window(torch.zeros(1, 3, 9, 4, 6), torch.zeros(1, 3, 2, 4, 6), Window((0,), (4, 5)), mask_channels=-1)
    with pytest.raises(ValueError, match="latents: expected the reference's device meta, got cpu"):
        assemble_window(torch.zeros(1, 3, 9, 4, 6, device="meta"), torch.zeros(1, 3, 2, 4, 6), Window((0,), (4, 5)))


# The sampler, on models that are not Wan


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["noisy blocks", "whole window"])
def test_a_model_that_knows_the_clip_is_led_to_it(plan, whole):
    """The exact velocity towards known blocks, looked up by the indices given, ends there whatever the schedule.

    A block given before a segment is therefore what was generated, and one given after it is still rough.
    """
    known, seen = torch.randn(2, 3, plan.num_blocks, 4, 6, dtype=torch.float64), []
    rough = known + torch.tensor([0.0] + [1.0] * (plan.num_blocks - 1)).view(-1, 1, 1)

    def model(latents, sigma, window):
        seen.append(window)
        for place, block in enumerate(window.conditioning):
            sequence = rough if block > window.noisy[-1] else known
            assert relative_error(latents[:, :, place], sequence[:, :, block]) < EXACT
        velocity = (latents - known[:, :, list(window.blocks)]) / sigma
        return velocity if whole else velocity[:, :, len(window.conditioning) :]

    clip = run(model, rough, plan=plan, sigmas=[1.0, 0.7, 0.1, 0.0], seed=(5, 6))
    assert relative_error(clip, known) < EXACT
    assert seen == [window for window in plan for _ in range(3)]


class GlobalTimestep(nn.Module):
    """The outside of a DiT with one timestep for all frames and frames counted from 0, as Mochi has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 3, padding=1)
        self.places = nn.Parameter(torch.randn(3, 16, 1, 1))

    def forward(self, x, timestep):
        assert timestep.shape == (len(x),)
        return self.conv(x + self.places[:, : x.shape[2]]) * torch.cos(timestep / 300)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_model_with_one_timestep_runs_by_a_function(plan):
    """The whole sampler equals its formulas written out; conditioning blocks are the generated ones, in this order."""
    dit, reference = GlobalTimestep().double(), torch.randn(1, 3, plan.num_blocks, 4, 6, dtype=torch.float64)
    clip = run(
        lambda latents, sigma, window: dit(latents, torch.tensor([1000 * sigma])), reference, plan=plan, sigmas=SIGMAS
    )
    expected = reference.clone()
    for window in plan:
        x = block_noise(5, 2, window.noisy, (3, 4, 6)).double()
        for sigma, after in itertools.pairwise(SIGMAS):
            joined = torch.cat((expected[:, :, list(window.conditioning)], x), dim=2)
            with torch.no_grad():
                velocity = dit(joined, torch.tensor([1000 * sigma]))
            x = x + (after - sigma) * velocity[:, :, len(window.conditioning) :]
        expected[:, :, list(window.noisy)] = x
    assert relative_error(clip, expected) < EXACT
    assert torch.equal(clip[:, :, 0], reference[:, :, 0])
    assert not clip.requires_grad


def wave(latents, sigma, window):
    """Computes a cheap model for tests of what is around it."""
    return torch.sin(latents + sigma)[:, :, len(window.conditioning) :]


def test_noise_may_be_given_and_each_batch_entry_has_a_seed_of_its_own():
    reference = torch.randn(2, 3, 8, 4, 6)
    clip = run(wave, reference, seed=[5, 9])
    alone = [run(wave, part, seed=seed) for part, seed in zip(reference.split(1), (5, 9), strict=True)]
    assert torch.equal(clip, torch.cat(alone))
    noise = torch.cat([block_noise(seed, 2, range(8), (3, 4, 6)) for seed in (5, 9)])
    kept = noise.clone()
    in_place = run(wave, reference, noise=noise, step=lambda x, v, i: x.sub_(v))
    assert torch.equal(in_place, run(wave, reference, seed=[5, 9], step=lambda x, v, i: x - v))
    assert torch.equal(noise, kept)


def test_blocks_stay_in_float32_between_the_steps():
    reference = torch.randn(1, 3, 8, 4, 6, dtype=torch.bfloat16)
    clip = run(lambda *window: wave(*window).half(), reference)
    expected = reference.float()
    for window in PLANS[0]:
        x = block_noise(5, 2, window.noisy, (3, 4, 6))
        for sigma, after in itertools.pairwise(SIGMAS):
            x = x + (after - sigma) * torch.sin(x + sigma).half().float()
        expected[:, :, list(window.noisy)] = x
    assert torch.equal(clip, expected.bfloat16())


def test_end_to_end_is_one_window_of_all_blocks():
    reference, windows = torch.randn(1, 3, 8, 4, 6), []

    def model(latents, sigma, window):
        windows.append(window)
        return wave(latents, sigma, window)

    run(model, reference, mode="end_to_end", sigmas=[1.0, 0.0])
    assert windows == [Window((0,), (1, 2, 3, 4, 5, 6, 7))]


@pytest.mark.parametrize("multistep", [False, True], ids=["Euler", "UniPC"])
def test_a_scheduler_of_diffusers_is_a_step(multistep):
    """Euler is the default's own result; UniPC, which remembers steps, is started anew at every segment."""
    reference = torch.randn(1, 3, 8, 4, 6)
    if multistep:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)

    def step(x, velocity, i):
        if i == 0:
            scheduler.set_timesteps(4)
        return scheduler.step(velocity, scheduler.timesteps[i], x, return_dict=False)[0]

    scheduler.set_timesteps(4)
    clip = run(wave, reference, sigmas=scheduler.sigmas, step=step)
    expected = reference.clone()
    for window in PLANS[0]:
        scheduler.set_timesteps(4)
        x = block_noise(5, 2, window.noisy, (3, 4, 6))
        for sigma, t in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
            x = scheduler.step(torch.sin(x + sigma), t, x, return_dict=False)[0]
        expected[:, :, list(window.noisy)] = x
    assert relative_error(clip, expected) < PARITY
    by_euler = run(wave, reference, sigmas=scheduler.sigmas)
    assert (relative_error(clip, by_euler) < PARITY) != multistep


def test_segments_come_one_by_one_and_steps_are_reported():
    reference, seen = torch.randn(1, 3, 5, 4, 6), []
    before = reference.clone()
    segments = sample_segments(
        wave, reference, plan=SegmentPlan(5), sigmas=[1.0, 0.5, 0.0], seed=5, on_step=lambda *where: seen.append(where)
    )
    assert torch.equal(reference, before)
    first = next(segments)
    assert torch.is_grad_enabled()
    assert torch.equal(reference[:, :, 1:4], first)
    assert torch.equal(reference[:, :, 4], before[:, :, 4])
    assert seen == [(1, 2, 1, 2), (1, 2, 2, 2)]
    assert len(list(segments)) == 1
    assert seen[2:] == [(2, 2, 1, 2), (2, 2, 2, 2)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "causal"}, ValueError, r"mode: .* got 'causal' \(causal needs keys and values kept inside the model"),
        ({"mode": "both"}, ValueError, "mode: expected bidirectional or end_to_end, got 'both'$"),
        ({"plan": SegmentPlan(9)}, ValueError, r"reference: expected \[B, z, 9, h, w\], got \(1, 3, 8, 4, 6\)"),
        ({"reference": torch.zeros(1, 3, 8, 4, 6).int()}, TypeError, "reference: expected a floating-point dtype"),
        ({"sigmas": [1.0]}, ValueError, r"sigmas: expected two or more noise levels in 0..1 .*, got \[1.0\]"),
        ({"sigmas": [1000, 500, 0]}, ValueError, r"sigmas: .* \(not timesteps\), got \[1000.0, 500.0, 0.0\]"),
        ({"seed": None}, ValueError, "seed, noise: expected one of the two, got neither"),
        ({"noise": torch.zeros(1, 3, 8, 4, 6)}, ValueError, "seed, noise: expected one of the two, got both"),
        ({"seed": None, "noise": torch.zeros(1)}, ValueError, r"noise: expected \(1, 3, 8, 4, 6\) .*, got \(1,\)"),
        ({"seed": (1, 2)}, ValueError, r"seed: expected 1 \(one a batch entry\), none negative, got \(1, 2\)"),
        ({"seed": -1}, ValueError, "seed: .* got -1"),
        ({"mask_channels": -1}, ValueError, "mask_channels: expected None or at least 0, got -1"),
        ({"model": None}, TypeError, "model: expected a WindowModel, which is called, got NoneType"),
    ],
)
def test_bad_arguments_are_named_at_the_call(change, error, message):
    arguments = {"model": wave, "reference": torch.zeros(1, 3, 8, 4, 6), "plan": PLANS[0], "sigmas": SIGMAS, "seed": 5}
    with pytest.raises(error, match=message):
        sample_segments(**arguments | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": lambda *window: (wave(*window),)}, TypeError, "model: expected it to return a tensor, got tuple"),
        (
            {"model": lambda x, *_: x[:, :, :2]},
            ValueError,
            r"model: .* \(1, 3, 3, 4, 6\) .* or \(1, 3, 4, 4, 6\) of the",
        ),
        ({"step": lambda x, v, i: None}, TypeError, "step: expected it to return a tensor, got NoneType"),
        ({"step": lambda x, v, i: x[:, :1]}, ValueError, r"step: expected it to return \(1, 3, 3, 4, 6\), got \(1, 1"),
    ],
)
def test_what_a_model_or_a_solver_returns_wrong_is_named(change, error, message):
    with pytest.raises(error, match=message):
        run(**{"model": wave, "reference": torch.zeros(1, 3, 8, 4, 6), **change})
