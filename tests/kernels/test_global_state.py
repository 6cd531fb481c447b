"""Results depend on arguments alone: not on torch's default dtype and device, on autocast, or on its modes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from bench.operators.check import randomised
from swifti2v_kernels import (
    SegmentPlan,
    assemble_window,
    block_noise,
    fold_upsample_weight,
    rope_3d,
    rope_from_tokens,
    sample_segments,
)
from swifti2v_kernels.common.case import Case, all_cases
from tests.support.global_states import STATES, State


def size(case: Case) -> int:
    """Returns the number of elements that a case is given."""
    return sum(x.numel() for x in tree_flatten(case.inputs(torch.device("meta")))[0] if isinstance(x, Tensor))


CASES = list(all_cases())
#: One of every operator: the least one.
LEAST = list({case.operator: case for case in sorted(CASES, key=lambda case: -size(case))}.values())


def same(found: Any, expected: Any) -> None:
    """Asserts that both hold tensors of the same dtypes, devices and bits."""
    pairs = list(zip(tree_flatten(found)[0], tree_flatten(expected)[0], strict=True))
    assert pairs
    for a, b in pairs:
        assert (a.dtype, a.device) == (b.dtype, b.device)
        # As NumPy sees them, so that the state in which this runs has no say.
        assert np.array_equal(*(np.ascontiguousarray(x.view(torch.uint8).numpy()) for x in (a, b)))


def computed(case: Case, together: bool) -> Any:
    args, kwargs = randomised(case, torch.device("cpu"))
    with STATES["all at once"]() if together else nullcontext():
        return case.operator(*args, **kwargs | {"backend": "torch"})


@pytest.mark.parametrize(
    "case",
    [case if case in LEAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
def test_every_case_has_the_same_bits_in_every_state_at_once(case: Case) -> None:
    same(computed(case, together=True), computed(case, together=False))


def _helpers() -> dict[str, Any]:
    """Returns what the library's other functions give for fixed arguments."""
    cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    angle = torch.linspace(0, 3, 24, **cpu).view(8, 3)
    reference, noise = (torch.linspace(-i, i, 2 * 5 * 12, **cpu).view(1, 2, 5, 3, 4) for i in (1, 2))
    plan = SegmentPlan(num_blocks=5)
    window = next(iter(plan))

    def model(latents: Tensor, sigma: float, window: Any) -> Tensor:
        return latents[:, :2].sin() * sigma

    def clip(**options: Any) -> list[Tensor]:
        return list(sample_segments(model, reference.clone(), plan=plan, sigmas=[1.0, 0.4, 0.0], **options))

    return {
        "rope_3d": rope_3d([0, 5, 9], 3, 4, 24, device="cpu"),
        "rope_3d from a tensor": rope_3d(torch.tensor([0, 5, 9], device="cpu"), 3, 4, 24),
        "rope_from_tokens": rope_from_tokens(angle.cos(), angle.sin()),
        "block_noise": block_noise(3, 2, [1, 4], (2, 3, 4)),
        "fold_upsample_weight": fold_upsample_weight(torch.linspace(-1, 1, 8 * 16 * 9, **cpu).view(8, 16, 3, 3)),
        "assemble_window": assemble_window(reference, noise[:, :, : len(window.noisy)], window, mask_channels=4),
        "sample_segments by seed": clip(seed=1),
        "sample_segments by noise": clip(noise=noise, mask_channels=0),
    }


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_helpers_have_the_same_bits_in_each_state(state: State) -> None:
    expected = _helpers()
    with state():
        found = _helpers()
    for name, value in expected.items():
        same(found[name], value)
