"""The bytes and operations of a DiT in closed form are those of live tensors, and of the detailed cost model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.cost import dit
from model.config import PRESETS, DiTConfig
from model.csg.sampler import SegmentPlan
from model.machine.counted import TensorMemory
from model.memory.dit_bytes import dit_memory
from model.memory.estimate import dit_operations
from swifti2v_kernels import pretend_gpu
from tests.support.denoisers import denoiser, meta_dit, open_window

MEMORY = 0.05
_1B, _5B, _14B = PRESETS["1.3b"].stage_two, PRESETS["5b"].stage_two, PRESETS["14b-1.3b"].stage_one


@pytest.mark.parametrize("config", [_1B, _5B, _14B], ids=["1.3B", "5B", "14B"])
@pytest.mark.parametrize(("targets", "remembered"), [(300, 0), (200, 0), (0, 0), (300, 500)])
def test_operations_are_those_of_the_detailed_model(config: DiTConfig, targets: int, remembered: int) -> None:
    work = dit.forward(config, 300, targets=targets, remembered=remembered)
    # There cross-attention has its own kind; here text and remembered tokens are keys like others.
    assert dit_operations(config, 300, targets, remembered) == work.total_flops


@pytest.mark.parametrize(
    ("config", "latent_size", "window", "noisy", "remembered"),
    [
        pytest.param(replace(_1B, num_layers=4), (176, 320), 5, 3, 0, id="1.3B window at 2K"),
        pytest.param(replace(_5B, num_layers=4), (88, 160), 5, 3, 0, id="5B window at 2K"),
        pytest.param(replace(_14B, num_layers=4), (44, 80), 21, 21, 0, id="14B Stage I"),
        pytest.param(
            replace(_14B, num_layers=2), (176, 320), 21, 21, 0, id="14B end to end at 2K", marks=pytest.mark.slow
        ),
        pytest.param(replace(_1B, num_layers=4), (176, 320), 3, 3, 2, id="1.3B, causal"),
        pytest.param(PRESETS["tiny"].stage_two, (18, 32), 5, 3, 0, id="tiny"),
    ],
)
def test_the_peak_of_the_dit_is_that_of_live_tensors(
    config: DiTConfig, latent_size: tuple[int, int], window: int, noisy: int, remembered: int
) -> None:
    """The peak is that of live tensors, from the first of a clip to the end of a step."""
    model = meta_dit(config)
    with torch.no_grad(), pretend_gpu(90), TensorMemory(model.parameters()) as memory:
        denoise = denoiser(model, latent_size, window, noisy)
        if remembered:
            denoise.open((4, 5, 6), (0, 1, 2), [0.0] * 3, remembered=(0, 3))
        else:
            open_window(denoise, window, noisy)
        denoise.step(0)
    predicted = dit_memory(
        config, SegmentPlan(21), latent_size, steps=4, dtype=torch.bfloat16, causal=remembered > 0, whole=window == 21
    )
    weights = sum(p.nbytes for p in model.parameters())
    assert sum(predicted.values()) + weights == pytest.approx(memory.peak, rel=MEMORY)
