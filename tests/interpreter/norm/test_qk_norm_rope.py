"""The kernel of RMSNorm and 3D RoPE against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import Rope3D, explain, norm_rope, qk_norm_rope, rope_3d, rope_from_tokens
from swifti2v_kernels.norm.qk_norm_rope import norm_rope_reference
from tests.support.tolerances import OPERATOR, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: (heads, head_dim): model widths 96, 1536, 3072, 5120, one head, and odd numbers of heads and pairs.
HEADS = [(1, 6), (4, 24), (3, 64), (5, 10), (12, 128), (24, 128), (40, 128)]
BLOCKS, HEIGHT, WIDTH = (4000, 0), 2, 3  # not sorted


def fused(heads: int, head_dim: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Returns a fused projection's output among NaN, and q, k, v in it."""
    length, width = len(BLOCKS) * HEIGHT * WIDTH, heads * head_dim
    buffer = torch.full((batch, length + 1, 3 * width + 16), float("nan"), dtype=dtype)
    qkv = buffer[:, 1:, 8:-8]
    qkv.copy_(torch.randn(qkv.shape))
    return buffer, list(qkv.chunk(3, dim=2))


def close(actual: Tensor, x: Tensor, weight: Tensor, rope: Rope3D | None, heads: int, layout: str) -> bool:
    """Checks a result against float64: two roundings where the norm is rounded before the rotation."""
    expected = norm_rope_reference(x.double(), weight.double(), rope, heads, 0, 1e-6, layout)
    assert actual.dtype == x.dtype
    return relative_error(actual, expected) < 2 * OPERATOR[str(x.dtype).removeprefix("torch.")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
@pytest.mark.parametrize(
    ("layout", "per_head"), [("interleaved", False), ("half", True)], ids=["interleaved, width", "half, per head"]
)
def test_against_float64(heads: int, head_dim: int, dtype: torch.dtype, layout: str, per_head: bool) -> None:
    """Slices of a fused buffer with blocks out of order are rotated right; in place is the same and touches no more."""
    buffer, (q, k, v) = fused(heads, head_dim, dtype, batch=1 if heads != 4 else 2)
    weights = list((1 + 0.1 * torch.randn(2, head_dim if per_head else heads * head_dim)).to(dtype))
    rope = rope_3d(BLOCKS, HEIGHT, WIDTH, head_dim)
    results = qk_norm_rope(q, k, *weights, rope, heads, layout=layout)
    for x, weight, actual in zip((q, k), weights, results, strict=True):
        assert close(actual, x, weight, rope, heads, layout)
    before, values = buffer.clone(), v.clone()
    in_place = qk_norm_rope(q, k, *weights, rope, heads, layout=layout, inplace=True)
    for x, result, expected in zip((q, k), in_place, results, strict=True):
        assert result.data_ptr() == x.data_ptr()
        assert torch.equal(result, expected)
    assert torch.equal(v, values)
    assert torch.equal(buffer.isnan(), before.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_attention_has_no_rope_and_two_lengths(dtype: torch.dtype) -> None:
    _, (q, k, _) = fused(4, 24, dtype)
    k = k[:, :5]
    weights = torch.randn(2, 96).to(dtype)
    for x, weight, actual in zip((q, k), weights, qk_norm_rope(q, k, *weights, None, 4), strict=True):
        assert actual.shape == (2, x.shape[1], 4, 24)
        assert close(actual, x, weight, None, 4, "interleaved")


@pytest.mark.parametrize(("layout", "width"), [("interleaved", 24), ("half", 96)])
def test_parts_of_a_window_are_rotated_where_they_stand(layout: str, width: int) -> None:
    """A part of a window is rotated as within the whole, in the two combinations of layout and norm not yet tested."""
    _, (q, _, _) = fused(4, 24, torch.float32)
    weight, rope = torch.rand(width), rope_3d(BLOCKS, HEIGHT, WIDTH, 24)
    whole = norm_rope(q, weight, rope, 4, layout=layout)
    for start, stop in ((0, 1), (0, 7), (5, 12), (11, 12)):
        part = norm_rope(q[:, start:stop], weight, rope, 4, start=start, layout=layout)
        assert torch.equal(part, whole[:, start:stop])
        reference = norm_rope(q[:, start:stop], weight, rope, 4, start=start, layout=layout, backend="torch")
        assert relative_error(part, reference) < OPERATOR["float32"]


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("heads", [4, 1])
def test_angles_per_token_are_those_of_the_axes(heads: int, layout: str) -> None:
    """A window's tables, written out per token as other models give them, give the same result.

    With one head the pairs are those of the whole width.
    """
    _, (q, k, _) = fused(4, 24, torch.float32)
    weights, head_dim = torch.rand(2, 96), 96 // heads
    axes = rope_3d(BLOCKS, HEIGHT, WIDTH, head_dim)
    place = torch.cartesian_prod(*(torch.arange(n) for n in (len(BLOCKS), HEIGHT, WIDTH)))
    table = torch.cat([axis[place[:, i]] for i, axis in enumerate(axes)], dim=1)
    tokens = rope_from_tokens(*table.unbind(-1))
    expected = qk_norm_rope(q, k, *weights, axes, heads, layout=layout)
    for backend in ("triton", "torch"):
        results = qk_norm_rope(q, k, *weights, tokens, heads, layout=layout, backend=backend)
        for actual, same in zip(results, expected, strict=True):
            assert relative_error(actual, same) < OPERATOR["float32"]
    part = norm_rope(q[:, 5:9], weights[0], tokens, heads, start=5, layout=layout)
    assert relative_error(part, expected[0][:, 5:9]) < OPERATOR["float32"]


def test_weights_in_float32_under_half_inputs() -> None:
    _, (q, k, _) = fused(4, 24, torch.bfloat16)
    weights, rope = 1 + torch.rand(2, 96), rope_3d(BLOCKS, HEIGHT, WIDTH, 24)
    for x, weight, actual in zip((q, k), weights, qk_norm_rope(q, k, *weights, rope, 4), strict=True):
        assert close(actual, x, weight, rope, 4, "interleaved")


def test_offsets_beyond_32_bits() -> None:
    apart = 2**31 + 16
    x = torch.empty(apart + 96, dtype=torch.float16).as_strided((1, 2, 96), (0, apart, 1))
    x.copy_(torch.randn(1, 2, 96))
    weight, rope = torch.rand(96).half(), rope_3d([3], 1, 2, 24)
    expected = norm_rope(x.clone(), weight, rope, 4)
    assert torch.equal(norm_rope(x, weight, rope, 4, inplace=True), expected)


def test_what_has_no_kernel_takes_the_reference() -> None:
    x, weight = torch.randn(1, 18, 96), torch.rand(96)
    assert explain(norm_rope, x, weight, None, 4).implementation == "fused kernel"
    assert "gradients" in explain(norm_rope, x, weight.requires_grad_(), None, 4).reason
    assert "float64" in explain(qk_norm_rope, *(2 * [x.double()] + 2 * [weight.detach().double()]), None, 4).reason
    odd = torch.randn(1, 5, 27)
    for heads in (27, 9, 3):  # head_dim 1, 3, 9
        assert "even head_dim" in explain(norm_rope, odd, odd[0, 0], None, heads).reason
        expected = norm_rope_reference(odd, odd[0, 0], None, heads, 0, 1e-6, "half")
        assert torch.equal(norm_rope(odd, odd[0, 0], None, heads, layout="half"), expected)
    wide = torch.empty(1, 1, 2 * 16384)
    assert "up to 16384 channels" in explain(norm_rope, wide, wide[0, 0], None, 1).reason
    assert norm_rope(x[:, :0], weight.detach(), None, 4).shape == (1, 0, 4, 24)
