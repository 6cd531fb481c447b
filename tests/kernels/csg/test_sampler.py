"""Segment-wise generation with DiTs of other makes: the assembly of windows, and the sampler around any model."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from model.csg.schedule import flow_sigmas
from swifti2v_kernels import SegmentPlan, Window, assemble_window, block_noise, sample_segments
from tests.support.tolerances import EXACT, PARITY, relative_error

SIGMAS = flow_sigmas(3, 5.0)
PLANS = [
    SegmentPlan(8),  # the last segment is a short one
    SegmentPlan(8, 2, 2, 1),
    SegmentPlan(7, 3, 1, 0, anchor=False),
    SegmentPlan(5, 2, 0, anchor=False),  # windows with nothing given
    SegmentPlan.end_to_end(5),
]


def run(model, reference, **options):
    """Returns the sampled clip; ``reference`` is left as it is."""
    clip = reference.clone()
    given = {"plan": PLANS[0], "sigmas": SIGMAS, "mask_channels": getattr(model, "mask_channels", None), "seed": 5}
    segments = list(sample_segments(model, clip, **given | options))
    assert torch.equal(torch.cat(segments, dim=2), clip[:, :, 1:])
    return clip


# Assembly

REFERENCE, LATENTS = torch.zeros(1, 3, 9, 4, 6), torch.zeros(1, 3, 2, 4, 6)


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
    ("reference", "latents", "message"),
    [
        (torch.zeros(3, 9, 4, 6), LATENTS, r"reference: expected \[B, z, N, h, w\], got \(3, 9"),
        (REFERENCE, torch.zeros(1, 3, 3, 4, 6), r"latents: expected \(1, 3, 2, 4, 6\) .* 3, 3, 4"),
        (REFERENCE[:, :, :5], LATENTS, r"window: expected blocks in 0..4, got \(0, 4, 5\)"),
        (REFERENCE.to("meta"), LATENTS, "latents: expected the reference's device meta, got cpu"),
    ],
)
def test_what_does_not_fit_a_window_is_named(reference, latents, message):
    with pytest.raises(ValueError, match=message):
        assemble_window(reference, latents, Window((0,), (4, 5)))


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


def wave(latents, sigma, window):
    """Computes a cheap model for tests of what is around it."""
    return torch.sin(latents + sigma)[:, :, len(window.conditioning) :]


def test_each_batch_entry_has_a_seed_of_its_own():
    reference = torch.randn(2, 3, 8, 4, 6)
    clip = run(wave, reference, seed=[5, 9])
    alone = [run(wave, part, seed=seed) for part, seed in zip(reference.split(1), (5, 9), strict=True)]
    assert torch.equal(clip, torch.cat(alone))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_blocks_stay_in_float32_between_the_steps(plan):
    """The sampler equals its formulas written out, with a reference and a velocity in 16 bits and no gradients."""
    reference = torch.randn(1, 3, plan.num_blocks, 4, 6, dtype=torch.bfloat16)
    factor = torch.ones((), requires_grad=True)
    clip = run(lambda *window: (wave(*window) * factor).half(), reference, plan=plan)
    expected = reference.float()
    for window in plan:
        x = block_noise(5, 2, window.noisy, (3, 4, 6))
        for sigma, after in itertools.pairwise(SIGMAS):
            x = x + (after - sigma) * torch.sin(x + sigma).half().float()
        expected[:, :, list(window.noisy)] = x
    assert torch.equal(clip, expected.bfloat16())
    assert not clip.requires_grad


def test_a_scheduler_of_diffusers_is_a_step():
    """UniPC, which remembers steps, is started anew at every segment, and is another solver than the default."""
    reference = torch.randn(1, 3, 8, 4, 6)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)

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
    assert relative_error(clip, run(wave, reference, sigmas=scheduler.sigmas)) > PARITY


def test_segments_come_one_by_one():
    """Nothing is computed before the first segment is asked for, and each is in the reference when it comes."""
    reference = torch.randn(1, 3, 5, 4, 6)
    before = reference.clone()
    segments = sample_segments(wave, reference, plan=SegmentPlan(5), sigmas=[1.0, 0.5, 0.0], seed=5)
    assert torch.equal(reference, before)
    first = next(segments)
    assert torch.is_grad_enabled()
    assert torch.equal(reference[:, :, 1:4], first)
    assert torch.equal(reference[:, :, 4], before[:, :, 4])
    assert len(list(segments)) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"plan": SegmentPlan(9)}, ValueError, r"reference: expected \[B, z, 9, h, w\], got \(1, 3, 8, 4, 6\)"),
        ({"reference": torch.zeros(1, 3, 8, 4, 6).int()}, TypeError, "reference: expected a floating-point dtype"),
        ({"sigmas": [1000, 500, 0]}, ValueError, r"sigmas: .* \(not timesteps\), got \[1000.0, 500.0, 0.0\]"),
        ({"seed": (1, 2)}, ValueError, r"seed: expected 1 \(one a batch entry\), none negative, got \(1, 2\)"),
        ({"seed": -1}, ValueError, "seed: .* got -1"),
        ({"seed": None}, ValueError, "seed: .* got None"),
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
