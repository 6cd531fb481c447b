"""The kernel of RMSNorm and 3D RoPE, and its reference, against Wan's own formulation in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import explain, norm_rope, qk_norm_rope, rope_3d, rope_from_tokens
from tests.support.tolerances import OPERATOR, relative_error

#: float64 has no kernel, and its tables are float32 as all are.
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LIMITS = OPERATOR | {"float64": OPERATOR["float32"]}
#: (heads, head_dim): model widths 96 and 1536, one head, and odd numbers of heads and pairs; the least and largest.
HEADS = [(1, 6), (4, 24), (3, 64), (5, 10), (12, 128), (40, 128)]
BLOCKS, HEIGHT, WIDTH = (4000, 0), 2, 3  # not sorted


def fused(heads: int, head_dim: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Returns a fused projection's output among NaN, and q, k, v in it."""
    length, width = len(BLOCKS) * HEIGHT * WIDTH, heads * head_dim
    buffer = torch.full((batch, length + 1, 3 * width + 16), float("nan"), dtype=dtype)
    qkv = buffer[:, 1:, 8:-8]
    qkv.copy_(torch.randn(qkv.shape))
    return buffer, list(qkv.chunk(3, dim=2))


def turned(x: Tensor, weight: Tensor, heads: int, layout: str, rotate: bool = True) -> Tensor:
    """Returns norm and rotation as Wan has it: pairs as complex numbers times exp(i * angle)."""
    y = x.double().unflatten(2, (heads, -1))
    head_dim = y.shape[-1]
    together = (2, 3) if len(weight) > head_dim else (3,)
    y = y / (y.square().mean(together, keepdim=True) + 1e-6).sqrt() * weight.double().view(-1, head_dim)
    if not rotate:
        return y
    places = torch.cartesian_prod(torch.tensor(BLOCKS), torch.arange(HEIGHT), torch.arange(WIDTH)).double()
    spatial, angles = 2 * (head_dim // 6), []
    for axis, channels in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        angles.append(places[:, axis, None] / 10000 ** (torch.arange(0, channels, 2).double() / channels))
    pairs = y.unflatten(-1, (2, -1)).mT if layout == "half" else y.unflatten(-1, (-1, 2))
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, -1)).unsqueeze(1)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (pairs.mT if layout == "half" else pairs).flatten(-2)


def close(actual: Tensor, x: Tensor, expected: Tensor) -> bool:
    """Checks a result against float64: two roundings where the norm is rounded before the rotation."""
    assert actual.dtype == x.dtype
    return relative_error(actual, expected) < 2 * LIMITS[str(x.dtype).removeprefix("torch.")]


@pytest.mark.parametrize(("layout", "width"), [("interleaved", 24), ("half", 96)])
def test_parts_of_a_window_are_rotated_where_they_stand(layout: str, width: int) -> None:
    """A part of a window is rotated as within the whole, in two combinations of layout and norm."""
    _, (q, _, _) = fused(4, 24, torch.float32)
    weight, rope = torch.rand(width), rope_3d(BLOCKS, HEIGHT, WIDTH, 24)
    whole = norm_rope(q, weight, rope, 4, layout=layout)
    for start, stop in ((0, 1), (0, 7), (5, 12), (11, 12)):
        part = norm_rope(q[:, start:stop], weight, rope, 4, start=start, layout=layout)
        assert torch.equal(part, whole[:, start:stop])
        reference = norm_rope(q[:, start:stop], weight, rope, 4, start=start, layout=layout, backend="torch")
        assert relative_error(part, reference) < OPERATOR["float32"]


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
    for backend in ("torch", "auto"):
        results = qk_norm_rope(q, k, *weights, rope, heads, layout=layout, backend=backend)
        for x, weight, actual in zip((q, k), weights, results, strict=True):
            assert close(actual, x, turned(x, weight, heads, layout))
    before, values = buffer.clone(), v.clone()
    in_place = qk_norm_rope(q, k, *weights, rope, heads, layout=layout, inplace=True)
    for x, result, expected in zip((q, k), in_place, results, strict=True):
        assert result.data_ptr() == x.data_ptr()
        assert torch.equal(result, expected)
    assert torch.equal(v, values)
    assert torch.equal(buffer.isnan(), before.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_attention_has_no_rope_and_two_lengths(dtype: torch.dtype) -> None:
    """The lengths of q and k may differ without rotation; the weights may be float32 whatever q and k are."""
    _, (q, k, _) = fused(4, 24, dtype)
    k, weights = k[:, :5], torch.randn(2, 96)
    for x, weight, actual in zip((q, k), weights, qk_norm_rope(q, k, *weights, None, 4), strict=True):
        assert actual.shape == (2, x.shape[1], 4, 24)
        assert close(actual, x, turned(x, weight, 4, "interleaved", rotate=False))


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


def test_what_has_no_kernel_takes_the_reference() -> None:
    x, weight = torch.randn(1, 18, 96), torch.rand(96)
    assert explain(norm_rope, x, weight, None, 4).implementation == "fused kernel"
    assert "gradients" in explain(norm_rope, x, weight.requires_grad_(), None, 4).reason
    assert "even head_dim" in explain(norm_rope, x[..., :27], weight.detach()[:27], None, 9).reason
    wide = torch.empty(1, 1, 2 * 16384)
    assert "up to 16384 channels" in explain(norm_rope, wide, wide[0, 0], None, 1).reason
    assert norm_rope(x[:, :0], weight.detach(), None, 4).shape == (1, 0, 4, 24)
