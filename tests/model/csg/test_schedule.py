"""Noise levels are those of diffusers' scheduler, and noise belongs to its block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from model import InputError
from model.csg.schedule import flow_sigmas
from swifti2v_kernels import block_noise


@pytest.mark.parametrize("num_steps", [1, 4, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_sampling_equals_diffusers_flow_match_euler(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    sigmas = flow_sigmas(num_steps, shift)
    assert np.allclose([1000 * sigma for sigma in sigmas[:-1]], scheduler.timesteps, rtol=1e-6)
    x = expected = torch.randn(2, 3)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(x) * (i + 1)
        expected = scheduler.step(torch.sin(expected) * (i + 1), timestep, expected).prev_sample
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    assert torch.allclose(x, expected, rtol=1e-5)


def test_noise_is_standard_normal_and_differs_by_seed_stage_and_block():
    drawn = [block_noise(seed, stage, (block,), (16, 30, 30)) for seed, stage, block in np.ndindex(2, 2, 2)]
    flat = torch.stack(drawn).flatten(1)
    assert flat.mean().abs() < 0.01
    assert abs(flat.std() - 1) < 0.01
    correlation = torch.corrcoef(flat) - torch.eye(8)
    assert correlation.abs().max() < 0.05


def test_bad_arguments_are_named():
    for steps in (0, 1001):
        with pytest.raises(InputError, match=f"steps: expected 1 to 1000, got {steps}"):
            flow_sigmas(steps, 5.0)
    for shift in (0.0, float("nan"), 1e308):
        with pytest.raises(InputError, match=r"shift: expected 0\.001 to 1000, got"):
            flow_sigmas(4, shift)


@pytest.mark.parametrize("shift", [0.001, 1.0, 5.0, 1000.0])
def test_noise_levels_within_the_bounds_fall_from_step_to_step_as_float32(shift: float) -> None:
    for steps in (1, 4, 50, 1000):
        assert (np.diff(np.array(flow_sigmas(steps, shift), np.float32)) < 0).all()


def test_seeds_of_any_size_are_taken():
    first, second = (block_noise(seed, 1, (0,), (1, 2, 2)) for seed in (2**70, 2**70 + 1))
    assert not torch.equal(first, second)
