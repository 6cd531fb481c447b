"""DiTs whose layers are streamed or in 8 bits, on the kernels: against the PyTorch path, and what a step allocates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.dit.model import WanDiT
from model.streaming.placement import Placement
from model.weights.load import random_weights
from tests.interpreter.model import test_dit as test_model
from tests.interpreter.model.test_dit import allocated, denoiser
from tests.support.tolerances import KERNEL_PARITY, relative_error

#: One block more than there are slots.
CONFIG = replace(test_model.CONFIG, num_layers=3)
PLACEMENTS = [
    Placement(resident=0),
    pytest.param(Placement(resident=1, quantize="float8"), marks=pytest.mark.slow),
    pytest.param(Placement(resident=0, quantize="int8", matmul="8bit"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_a_step_is_that_of_the_torch_path_and_allocates_nothing(
    placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step equals the torch path.

    Quantised activations may round to the other neighbour where the norms before them differ in the last bit.
    """
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SWIFTI2V_BACKEND", backend)
        with torch.no_grad():
            steps, latents = denoiser(random_weights(WanDiT, CONFIG, 1, placement=placement))
            sizes = allocated(lambda: steps.step(0))  # noqa: B023
        found[backend] = latents.clone()
    # Of the kernels, which ran last: scalars that torch makes of Python numbers on the CPU. The interpreter needs
    # memory for products of float8, which NumPy does not have.
    assert sum(sizes) <= 64 or placement.matmul_dtype == torch.float8_e4m3fn
    assert torch.isfinite(found["torch"]).all()
    limit = KERNEL_PARITY if placement.matmul == "plain" else 5e-3
    assert relative_error(found["triton"], found["torch"]) < limit
