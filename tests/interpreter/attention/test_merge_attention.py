"""The merging kernel, run by the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels import explain, merge_attention
from tests.support.tolerances import LSE, OPERATOR, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("parts", "head_dim", "length"), [(1, 64, 1), (2, 96, 33), (5, 128, 16), (3, 40, 17)])
def test_against_float64(parts: int, head_dim: int, length: int, dtype: torch.dtype) -> None:
    """Strided parts merge to the float64 result; one row has no keys in one part, and one has none in any."""
    outputs = [torch.randn(2, 3, length, head_dim).transpose(1, 2).to(dtype) for _ in range(parts)]
    lses = [100 * torch.randn(2, length, 3).transpose(1, 2) for _ in range(parts)]
    lses[0][0, 0, 0] = float("-inf")
    for lse in lses:
        lse[1, 2, -1] = float("-inf")
    out, lse = merge_attention(outputs, lses)
    assert explain(merge_attention, outputs, lses).implementation == "fused kernel"
    expected, expected_lse = merge_attention([x.double() for x in outputs], [x.double() for x in lses])
    name = str(dtype).removeprefix("torch.")
    assert out.dtype == dtype
    assert (out[1, -1, 2] == 0).all()
    assert lse[1, 2, -1].isneginf()
    # exp(lse - top) of logits near 100 carries their float32 rounding, 100 * 2**-24.
    assert relative_error(out, expected) < max(OPERATOR[name], 2e-5)
    finite = expected_lse.isfinite()
    assert (lse[finite] - expected_lse[finite]).abs().max() < 2 * LSE["float32"]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_a_part_without_keys_holds_does_not_count(backend: str) -> None:
    """The output of such a part may be NaN, as unwritten memory is; where no part has keys the result is 0."""
    (full, empty), nothing = torch.randn(2, 1, 5, 2, 16), torch.full((1, 2, 5), float("-inf"))
    empty[:] = float("nan")
    lse = torch.randn(1, 2, 5)
    for parts in ([(full, lse), (empty, nothing)], [(empty, nothing), (full, lse)]):
        merged, total = merge_attention(*zip(*parts, strict=True), backend=backend)
        assert relative_error(merged, full) < OPERATOR["float32"]
        assert relative_error(total, lse) < OPERATOR["float32"]
    merged, total = merge_attention([empty, empty], [nothing, nothing], backend=backend)
    assert (merged == 0).all()
    assert total.isneginf().all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_infinite_sum_of_exponentials_is_no_part_without_keys(backend: str) -> None:
    """Logits that have overflowed are not hidden: the result is NaN, and so is that of a NaN in a part that counts."""
    parts, lse = torch.randn(2, 1, 5, 2, 16), torch.zeros(1, 2, 5)
    infinite, unknown = torch.full_like(lse, float("inf")), torch.full_like(lse, float("nan"))
    for lses in ([infinite, lse], [infinite, infinite], [lse, unknown]):
        merged, total = merge_attention(list(parts), lses, backend=backend)
        assert merged.isnan().all()
        assert not (total.isfinite() | total.isneginf()).any()
    parts[1] = float("nan")
    assert merge_attention(list(parts), [lse, lse - 200], backend=backend)[0].isnan().all()


def test_gradients_of_merging_nothing_are_zero() -> None:
    lses = [torch.full((1, 2, 5), float("-inf"), requires_grad=True) for _ in range(2)]
    out, _ = merge_attention([torch.randn(1, 5, 2, 16)] * 2, lses)
    gradients = torch.autograd.grad(out.sum(), lses)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
