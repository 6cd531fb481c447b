"""The library's norms, residuals and rotations against the plain formula in float64, in every dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import FP32LayerNorm, RMSNorm

from swifti2v_kernels import (
    explain,
    gated_residual,
    gated_residual_norm_modulate,
    norm_modulate,
    norm_rope,
    qk_norm_rope,
    rope_3d,
)
from swifti2v_kernels.common.checks import overlapping
from tests.support.tolerances import EXACT, OPERATOR, PARITY, relative_error

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


def test_a_block_map_chooses_rows_as_an_expanded_table_would():
    x, update = torch.randn(2, 2, 12, 10, dtype=torch.float64)
    shift, scale, gate = torch.randn(3, 2, 3, 10, dtype=torch.float64)
    block_map = torch.tensor([2, 0, 0, 1], dtype=torch.int32)
    expanded = [m[:, block_map.long()] for m in (shift, scale, gate)]
    actual = gated_residual_norm_modulate(x, update, gate, shift, scale, block_map=block_map)
    x_new = gated_residual(x, update, expanded[2])
    assert torch.equal(actual[0], x_new)
    assert torch.equal(actual[1], norm_modulate(x_new, *expanded[:2]))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_affine_norms_are_those_of_diffusers(norm):
    x, weight, bias = torch.randn(2, 7, 10), torch.randn(10), torch.randn(10)
    theirs = FP32LayerNorm(10, eps=1e-5) if norm == "layer" else RMSNorm(10, eps=1e-5, bias=True)
    theirs.load_state_dict({"weight": weight, "bias": bias})
    actual = norm_modulate(x, weight=weight, bias=bias, norm=norm, eps=1e-5)
    assert relative_error(actual, theirs(x)) < PARITY
    shift, scale = torch.randn(2, 2, 1, 10)
    actual = norm_modulate(x, shift, scale, weight=weight, bias=bias, norm=norm, eps=1e-5)
    assert relative_error(actual, theirs(x) * (1 + scale) + shift) < PARITY


def test_where_results_go():
    x, update, out = torch.randn(3, 1, 12, 10)
    expected = gated_residual_norm_modulate(x, update)
    results = gated_residual_norm_modulate(x, update, out=out, inplace=True)
    assert results[0] is x
    assert results[1] is out
    assert all(map(torch.equal, results, expected))
    normed = norm_modulate(x)
    assert norm_modulate(x, inplace=True) is x
    assert torch.equal(x, normed)


def test_adaln_names_the_argument_that_does_not_fit():
    x = torch.randn(1, 12, 10)
    row = torch.zeros(1, 1, 10)
    block_map = torch.zeros(3, dtype=torch.int32)
    for message, call in {
        "shift: 5 blocks do not divide 12 tokens": lambda: norm_modulate(x, *torch.zeros(2, 1, 5, 10)),
        r"scale: expected \[1, 1, 10\] on cpu, got \[1, 1, 9\]": lambda: norm_modulate(x, row, row[..., :9]),
        r"gate: expected \[1, R, 10\] on cpu, got \[1, 10\]": lambda: gated_residual(x, x, row[0]),
        "update: expected": lambda: gated_residual(x, x[:, :3], row),
        r"update: expected \[1, 12, 10\] torch.float32 on cpu, got .*float64": lambda: gated_residual(x, x.double()),
        r"x: expected \[B, L, C\]": lambda: norm_modulate(x[0], row, row),
        r"x: expected the channels to be contiguous \(stride 1\), got stride 2": lambda: norm_modulate(x[..., ::2]),
        "shift, scale: expected both or neither": lambda: norm_modulate(x, row),
        "norm: expected layer or rms, got 'group'": lambda: norm_modulate(x, norm="group"),
        r"weight: expected contiguous \[10\] on cpu, got \[9\]": lambda: norm_modulate(x, weight=torch.zeros(9)),
        r"out: expected \[1, 12, 10\] torch.float32": lambda: norm_modulate(x, out=x[:, :3]),
        r"block_map: expected contiguous \[T\] torch.int32 on cpu, got \[3\] torch.int64": lambda: norm_modulate(
            x, row, row, block_map=block_map.long()
        ),
        r"block_map: expected values in 0..0, got \[1, 1, 1\]": lambda: norm_modulate(
            x, row, row, block_map=block_map + 1
        ),
        "block_map: 5 blocks do not divide 12 tokens": lambda: norm_modulate(
            x, row, row, block_map=torch.zeros(5, dtype=torch.int32)
        ),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_views_of_other_dtypes_overlap_by_their_bytes():
    store = torch.zeros(4096)
    halves = store.view(torch.bfloat16)
    assert overlapping(store[:512], halves[520:776])  # bytes 0..2047 and 1040..1551
    assert overlapping(halves[520:776], store[:512])
    assert not overlapping(store[:512], halves[1024:1100])
    assert overlapping(store[:512], halves[1023:1100])
    nowhere = torch.empty(4, device="meta")
    assert not overlapping(nowhere, nowhere.clone())


def test_tensors_of_two_storages_overlap_by_their_addresses():
    memory = np.zeros((8, 16), dtype=np.float32)
    x, y = torch.from_numpy(memory).unsqueeze(0), torch.from_numpy(memory).unsqueeze(0)
    assert x.untyped_storage()._cdata != y.untyped_storage()._cdata
    assert overlapping(x[:, 2:5], y[:, 4:])
    assert not overlapping(x[:, :4], y[:, 4:])
    assert not overlapping(x[..., :8], y[..., 8:])
    assert overlapping(x, torch.from_numpy(memory.reshape(-1)[3:7]))
    assert overlapping(torch.from_dlpack(x), y)
    with pytest.raises(ValueError, match="out: expected x itself or memory of its own, but it overlaps x"):
        norm_modulate(x[:, :4], out=y[:, 2:6])
    assert norm_modulate(x, out=y) is y  # one and the same elements


def test_a_row_that_is_not_there_is_nan_where_values_are_not_checked():
    """A row that is not there gives NaN under torch.compile, as on a GPU."""
    x, shift, scale = torch.randn(1, 4, 8), *torch.randn(2, 1, 2, 8)
    compiled = torch.compile(norm_modulate, fullgraph=True, backend="aot_eager")
    y = compiled(x, shift, scale, block_map=torch.tensor([1, -1], dtype=torch.int32))
    assert y[:, 2:].isnan().all()
    assert torch.equal(y[:, :2], norm_modulate(x[:, :2], shift[:, 1:], scale[:, 1:]))


def _complex_rope(x, positions, head_dim):
    """Computes Wan's own formulation: interleaved pairs as complex numbers times exp(i * angle), in float64."""
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


def test_half_layout_and_norm_per_head_are_those_of_diffusers():
    """The half layout equals diffusers' Cosmos: RMSNorm of every head, pairs (p, p + D / 2)."""
    q, k = torch.randn(2, 2, 18, 3 * 24)
    weights, rope = torch.randn(2, 24), rope_3d((5, 0, 9), 2, 3, 24)
    tables = torch.meshgrid(*(torch.arange(n) for n in (3, 2, 3)), indexing="ij")
    turns = torch.cat([table[i.flatten()] for table, i in zip(rope, tables, strict=True)], dim=1)
    cos, sin = (torch.cat((part, part), dim=-1) for part in turns.unbind(-1))
    for x, weight, actual in zip((q, k), weights, qk_norm_rope(q, k, *weights, rope, 3, layout="half"), strict=True):
        theirs = RMSNorm(24, eps=1e-6)
        theirs.load_state_dict({"weight": weight})
        heads = theirs(x.unflatten(2, (3, 24))).transpose(1, 2)
        expected = apply_rotary_emb(heads, (cos, sin), use_real_unbind_dim=-2).transpose(1, 2)
        assert relative_error(actual, expected) < PARITY


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_parts_of_a_window_are_rotated_where_they_stand(layout):
    x, weight = torch.randn(2, 18, 48, dtype=torch.float64), torch.rand(48, dtype=torch.float64)
    rope = rope_3d((5, 0, 9), 2, 3, 24)
    whole = norm_rope(x, weight, rope, 2, layout=layout)
    for start, stop in ((0, 18), (0, 7), (5, 18), (17, 18)):
        part = norm_rope(x[:, start:stop], weight, rope, 2, start=start, layout=layout)
        assert relative_error(part, whole[:, start:stop]) < EXACT
    results = qk_norm_rope(x, 2 * x, weight, weight, rope, 2, layout=layout)
    assert torch.equal(results[0], whole)
    inplace = x.clone()
    assert norm_rope(inplace, weight, rope, 2, layout=layout, inplace=True).data_ptr() == inplace.data_ptr()
    assert torch.equal(inplace.unflatten(2, (2, 24)), whole)


def test_rope_tables_stay_per_axis():
    rope = rope_3d(range(5), 8, 9, 128)
    assert [tuple(table.shape) for table in rope] == [(5, 22, 2), (8, 21, 2), (9, 21, 2)]
    hunyuan = rope_3d(range(5), 8, 9, 128, axis_dims=(16, 56, 56))
    assert [table.shape[1] for table in hunyuan] == [8, 28, 28]
    with pytest.raises(ValueError, match=r"axis_dims: expected three even numbers with sum 128, got \(16, 56, 57\)"):
        rope_3d(range(5), 8, 9, 128, axis_dims=(16, 56, 57))


def test_qk_norm_rope_names_the_argument_that_does_not_fit():
    q, weight = torch.randn(1, 6, 24), torch.ones(24)
    with pytest.raises(ValueError, match="tables for 2 x 2 x 2 tokens, but q has 6"):
        qk_norm_rope(q, q, weight, weight, rope_3d(range(2), 2, 2, 12), 2)
    with pytest.raises(ValueError, match="tables for head_dim 24, but q has 12"):
        qk_norm_rope(q, q, weight, weight, rope_3d(range(1), 2, 3, 24), 2)
    with pytest.raises(ValueError, match=r"q: expected \[B, L, 5 \* D\]"):
        qk_norm_rope(q, q, weight, weight, None, 5)
    with pytest.raises(ValueError, match=r"k_weight: expected \[24\] or \[12\]"):
        qk_norm_rope(q, q, weight, weight[1:], None, 2)
    with pytest.raises(ValueError, match=r"k_weight: expected contiguous \[24\] torch.float32 on cpu, got \[12\]"):
        qk_norm_rope(q, q, weight, weight[:12], None, 2)
    for call in (qk_norm_rope, lambda *args: explain(qk_norm_rope, *args)):
        with pytest.raises(ValueError, match=r"k: expected \[1, L, 24\] torch.float32 on cpu, got .*float64"):
            call(q, q.double(), weight, weight, None, 2)
    with pytest.raises(ValueError, match=r"q: expected the channels to be contiguous \(stride 1\), got stride 2"):
        qk_norm_rope(torch.randn(1, 6, 48)[..., ::2], q, weight, weight, None, 2)
    with pytest.raises(ValueError, match="layout: expected interleaved or half, got 'pairs'"):
        qk_norm_rope(q, q, weight, weight, None, 2, layout="pairs")
    rope = rope_3d(range(1), 2, 3, 12)
    with pytest.raises(ValueError, match="rope: tables for 1 x 2 x 3 tokens, but x has 6, from 1 on"):
        norm_rope(q, weight, rope, 2, start=1)
    with pytest.raises(
        ValueError, match=r"rope.h: expected contiguous \[n, pairs, 2\] .*float32 on cpu, got .*float64"
    ):
        norm_rope(q, weight, rope._replace(h=rope.h.double()), 2)
    with pytest.raises(ValueError, match="head_dim"):
        rope_3d(range(2), 2, 2, 7)
