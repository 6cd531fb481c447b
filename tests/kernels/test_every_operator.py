"""Every operator on its PyTorch path: no global state matters, it is in one graph, and errors are one line."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bench.operators.check import randomised
from swifti2v_kernels import (
    SegmentPlan,
    assemble_window,
    block_noise,
    fold_upsample_weight,
    norm_modulate,
    rope_3d,
    rope_from_tokens,
    sample_segments,
)
from swifti2v_kernels.common.case import Case, all_cases
from swifti2v_kernels.common.target import constant_when_traced
from tests.support.global_states import unusual_state
from tests.support.tolerances import OPERATOR, relative_error


def size(case: Case) -> int:
    """Returns the number of elements that a case is given."""
    return sum(x.numel() for x in tree_flatten(case.inputs(torch.device("meta")))[0] if isinstance(x, Tensor))


#: The least case of every operator.
LEAST = list({case.operator: case for case in sorted(all_cases(), key=lambda case: -size(case))}.values())
of_every_operator = pytest.mark.parametrize("case", LEAST, ids=lambda case: case.name)


def same(found: Any, expected: Any) -> None:
    """Asserts that both hold tensors of the same dtypes, devices and bits."""
    pairs = list(zip(tree_flatten(found)[0], tree_flatten(expected)[0], strict=True))
    assert pairs
    for a, b in pairs:
        assert (a.dtype, a.device) == (b.dtype, b.device)
        # As NumPy sees them, so that the state in which this runs has no say.
        assert np.array_equal(*(np.ascontiguousarray(x.view(torch.uint8).numpy()) for x in (a, b)))


@of_every_operator
def test_an_operator_has_the_same_bits_in_every_global_state_at_once(case: Case) -> None:
    """Results depend on arguments alone: not on torch's default dtype and device, on autocast, or on its modes."""
    results = []
    for state in (nullcontext, unusual_state):
        args, kwargs = randomised(case, torch.device("cpu"))
        with state():
            results.append(case.operator(*args, **kwargs | {"backend": "torch"}))
    same(*results)


def _helpers() -> dict[str, Any]:
    """Returns what the library's other functions give for fixed arguments."""
    cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    angle = torch.linspace(0, 3, 24, **cpu).view(8, 3)
    reference, noise = (torch.linspace(-i, i, 2 * 5 * 12, **cpu).view(1, 2, 5, 3, 4) for i in (1, 2))
    plan = SegmentPlan(num_blocks=5)
    window = next(iter(plan))

    def model(latents: Tensor, sigma: float, window: Any) -> Tensor:
        return latents[:, :2].sin() * sigma

    return {
        "rope_3d": rope_3d([0, 5, 9], 3, 4, 24, device="cpu"),
        "rope_3d from a tensor": rope_3d(torch.tensor([0, 5, 9], device="cpu"), 3, 4, 24),
        "rope_from_tokens": rope_from_tokens(angle.cos(), angle.sin()),
        "block_noise": block_noise(3, 2, [1, 4], (2, 3, 4)),
        "fold_upsample_weight": fold_upsample_weight(torch.linspace(-1, 1, 8 * 16 * 9, **cpu).view(8, 16, 3, 3)),
        "assemble_window": assemble_window(reference, noise[:, :, : len(window.noisy)], window, mask_channels=4),
        "sample_segments": list(sample_segments(model, reference, plan=plan, sigmas=[1.0, 0.0], seed=1)),
    }


def test_helpers_have_the_same_bits_in_every_global_state_at_once() -> None:
    expected = _helpers()
    with unusual_state():
        found = _helpers()
    for name, value in expected.items():
        same(found[name], value)


# Tracing


def test_the_mark_is_torch_s_own() -> None:
    """The mark is private to torch: should a release change it, this fails before a graph breaks."""

    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert constant_when_traced(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


@pytest.mark.parametrize("around", [True, False], ids=["around the graph", "inside it"])
def test_autocast_breaks_no_graph_and_changes_no_dtype(around: bool) -> None:
    x = torch.randn(1, 6, 32)

    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with nullcontext() if around else torch.autocast("cpu", torch.bfloat16):
            y = norm_modulate(x)
            return y, y @ y.transpose(1, 2)

    with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
        y, product = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, norm_modulate(x))
    assert product.dtype == torch.bfloat16  # the caller's own code goes on under autocast


@of_every_operator
def test_an_operator_is_part_of_one_graph(case: Case) -> None:
    """The layouts are those of models; tests/interpreter does the same on the kernels."""
    results = []
    torch.compiler.reset()
    for operator in (torch.compile(case.operator, fullgraph=True, backend="aot_eager"), case.operator):
        args, kwargs = randomised(case, torch.device("cpu"))
        # Views of inputs that a graph overwrites are more than torch's own functionalisation takes.
        changes = {"backend": "torch"} | ({"inplace": False} if "inplace" in kwargs else {})
        results.append(tree_flatten(operator(*args, **kwargs | changes))[0])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a.double(), b.double()) < OPERATOR["bfloat16"]


# Errors

NAME = r"[\w.]+(\[\d+\])?(\.\w+)?(, \w+)*"
MESSAGE = re.compile(rf"{NAME}: (expected .+, got .+|.*\b(do not|but|has|have|differ|leave)\b.*)")


@of_every_operator
def test_an_argument_that_does_not_fit_is_named_with_what_is_allowed(case: Case) -> None:
    """No tensor at all is always refused; another device or two axes more where anything else must fit the tensor."""
    leaves, spec = tree_flatten(case.inputs(torch.device("cpu")))
    for i, x in enumerate(leaves):
        for bad in ("text", x.to("meta"), x[None, None]) if isinstance(x, Tensor) else ():
            args, kwargs = tree_unflatten([*leaves[:i], bad, *leaves[i + 1 :]], spec)
            said = None
            try:
                case.operator(*args, **kwargs | {"backend": "torch"})
            except (TypeError, ValueError) as error:
                said = str(error)
            assert MESSAGE.fullmatch(said) if said is not None else isinstance(bad, Tensor)
