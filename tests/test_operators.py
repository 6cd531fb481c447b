"""The library's norms, residuals and rotations against the plain formula in float64, in every dtype."""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels import gated_residual, norm_modulate, qk_norm_rope, rope_3d
from tests.tolerances import OPERATOR, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_norm_modulate_is_layer_norm_with_a_modulation_per_block(dtype, num_blocks):
    x = (torch.randn(2, 12, 10) * 3 + 1).to(dtype)
    shift, scale = torch.randn(2, 2, num_blocks, 10)
    y = x.double()
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    tokens = 12 // num_blocks
    expected = y * (1 + scale.repeat_interleave(tokens, 1)) + shift.repeat_interleave(tokens, 1)
    actual = norm_modulate(x, shift, scale)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < OPERATOR[_name(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_gated_residual_adds_the_update_gated_per_block(dtype):
    x, update = torch.randn(2, 2, 12, 10).to(dtype)
    gate = torch.randn(2, 4, 10)
    expected = x.double() + update.double() * gate.double().repeat_interleave(3, 1)
    assert relative_error(gated_residual(x, update, gate), expected) < OPERATOR[_name(dtype)]


def test_adaln_names_the_argument_that_does_not_fit():
    x = torch.randn(1, 12, 10)
    with pytest.raises(ValueError, match="shift: 5 blocks do not divide 12 tokens"):
        norm_modulate(x, torch.zeros(1, 5, 10), torch.zeros(1, 5, 10))
    with pytest.raises(ValueError, match=r"scale: expected \[1, T, 10\]"):
        norm_modulate(x, torch.zeros(1, 1, 10), torch.zeros(1, 1, 9))
    with pytest.raises(ValueError, match="update: expected"):
        gated_residual(x, x[:, :3], torch.zeros(1, 1, 10))
    with pytest.raises(ValueError, match="x: expected"):
        norm_modulate(x[0], torch.zeros(1, 1, 10), torch.zeros(1, 1, 10))


def _complex_rope(x, positions, head_dim):
    """Wan's own formulation: interleaved pairs as complex numbers times exp(i * angle), in float64."""
    spatial = 2 * (head_dim // 6)
    angles = []
    for axis, channels in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        frequency = 1.0 / 10000 ** (torch.arange(0, channels, 2).double() / channels)
        angles.append(positions[:, axis, None].double() * frequency)
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, -1))[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 128), (3, 64), (5, 24), (1, 6)])
def test_qk_norm_rope_normalises_over_all_heads_and_rotates_at_true_block_indices(dtype, heads, head_dim):
    blocks, height, width = (0, 9, 4000), 2, 3
    q, k = torch.randn(2, 2, 18, heads * head_dim).to(dtype)
    weights = (1 + 0.1 * torch.randn(2, heads * head_dim)).to(dtype)
    grid = torch.cartesian_prod(torch.tensor(blocks), torch.arange(height), torch.arange(width))
    rope = rope_3d(blocks, height, width, head_dim)
    results = qk_norm_rope(q, k, *weights, rope, heads)
    for x, weight, actual in zip((q, k), weights, results, strict=True):
        y = x.double()
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        expected = _complex_rope(y.unflatten(2, (heads, -1)), grid, head_dim)
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < OPERATOR[_name(dtype)]


def test_operators_are_differentiable():
    x, update, qk = (torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True) for _ in range(3))
    shift, scale = (torch.randn(1, 2, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(12, dtype=torch.float64, requires_grad=True)
    rope = rope_3d(range(1), 2, 2, 6)
    assert torch.autograd.gradcheck(norm_modulate, (x, shift, scale))
    assert torch.autograd.gradcheck(gated_residual, (x, update, shift))
    assert torch.autograd.gradcheck(lambda q, w: qk_norm_rope(q, q, w, w, rope, 2), (qk, weight))


def test_rope_tables_stay_per_axis():
    rope = rope_3d(range(5), 8, 9, 128)
    assert [tuple(table.shape) for table in rope] == [(5, 22, 2), (8, 21, 2), (9, 21, 2)]


def test_qk_norm_rope_names_the_argument_that_does_not_fit():
    q, weight = torch.randn(1, 6, 24), torch.ones(24)
    with pytest.raises(ValueError, match="tables for 2 x 2 x 2 tokens, but q has 6"):
        qk_norm_rope(q, q, weight, weight, rope_3d(range(2), 2, 2, 12), 2)
    with pytest.raises(ValueError, match="tables for head_dim 24, but q has 12"):
        qk_norm_rope(q, q, weight, weight, rope_3d(range(1), 2, 3, 24), 2)
    with pytest.raises(ValueError, match=r"q: expected \[B, L, 5 \* D\]"):
        qk_norm_rope(q, q, weight, weight, None, 5)
    with pytest.raises(ValueError, match=r"k_weight: expected \[24\]"):
        qk_norm_rope(q, q, weight, weight[1:], None, 2)
    with pytest.raises(ValueError, match="head_dim"):
        rope_3d(range(2), 2, 2, 7)
