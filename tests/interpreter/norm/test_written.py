"""Writing over what is read, a race on a GPU, is refused by the kernels' path and by PyTorch's, in the same words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from swifti2v_kernels import (
    gated_residual,
    gated_residual_norm_modulate,
    norm_modulate,
    norm_rope,
    qk_norm_rope,
    rope_3d,
    use_backend,
)

X, UPDATE = torch.randn(2, 1, 12, 96)
WEIGHT, ROPE = torch.rand(96), rope_3d([5, 0], 2, 3, 24)
FLOATS = torch.zeros(1, 4, 96)
HALVES = FLOATS.view(torch.bfloat16).view(1, 8, 96)  # the same bytes
OWN = "expected memory of its own, but it overlaps"
REFUSED: dict[str, Callable[[], object]] = {
    f"q: {OWN} k": lambda: qk_norm_rope(X, X, WEIGHT, WEIGHT, ROPE, 4, inplace=True),
    "x: expected distinct": lambda: norm_rope(X[:, :1].expand(1, 12, 96), WEIGHT, ROPE, 4, inplace=True),
    "x: expected distinct elements": lambda: gated_residual(UPDATE[:, :1].expand(1, 12, 96), UPDATE, inplace=True),
    f"x: {OWN} out, which is written too": lambda: gated_residual_norm_modulate(X, UPDATE, out=X, inplace=True),
    f"out: {OWN} shift": lambda: norm_modulate(X[:, :6], X[:, 6:7], X[:, 7:8], out=X[:, 6:]),
    f"x: {OWN} weight": lambda: norm_modulate(X, weight=X[0, 3], out=X),
    f"out: {OWN} bias": lambda: norm_modulate(HALVES[:, 2:4], bias=FLOATS[0, 3], out=HALVES[:, 6:]),
    "out: expected x itself or memory of its own, but it overlaps x": lambda: norm_modulate(X[:, :6], out=X[:, 3:9]),
    "out: expected update itself or memory of its own, but it overlaps update": lambda: gated_residual_norm_modulate(
        UPDATE[:, :6], X[:, :6], out=X[:, 3:9]
    ),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("message", REFUSED)
def test_writing_over_what_is_read_is_refused(message: str, backend: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=f"^{message}"):
        REFUSED[message]()


def test_an_input_may_be_overwritten_whole_by_another_view_of_it() -> None:
    x = torch.randn(1, 6, 96)
    assert norm_modulate(x, out=x.squeeze(0).unsqueeze(0)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("rotated", [False, True])
def test_tokens_may_lie_beyond_32_bits_apart(rotated: bool) -> None:
    """Two tokens may lie 2**31 elements apart, in memory of which only their pages exist."""
    apart, rest = 2**31 + 16, (WEIGHT.half(), rope_3d([3], 1, 2, 24), 4) if rotated else ()
    x = torch.empty(apart + 96, dtype=torch.float16).as_strided((1, 2, 96), (0, apart, 1))
    x.copy_(torch.randn(1, 2, 96))
    operator, into = (norm_rope, {"inplace": True}) if rotated else (norm_modulate, {"out": x})
    expected = operator(x.clone(), *rest)
    assert torch.equal(operator(x, *rest, **into), expected)
