"""The contract of norms, residuals and rotations: errors, memory, and rows that are not there.

Numbers: tests/interpreter/norm, which holds the reference against formulas of its own too.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swifti2v_kernels import gated_residual, norm_modulate, norm_rope, qk_norm_rope, rope_3d
from swifti2v_kernels.common.checks import overlapping


def test_adaln_names_the_argument_that_does_not_fit():
    x = torch.randn(1, 12, 10)
    row = torch.zeros(1, 1, 10)
    two, rows = torch.zeros(2, 1, 2, 10), {"block_map": torch.tensor([0, 1], dtype=torch.int32)}
    for message, call in {
        r"scale: expected \[1, 1, 10\] on cpu, got \[1, 1, 9\]": lambda: norm_modulate(x, row, row[..., :9]),
        r"update: expected \[1, 12, 10\] torch.float32 on cpu, got .*float64": lambda: gated_residual(x, x.double()),
        r"x: expected \[B, L, C\]": lambda: norm_modulate(x[0], row, row),
        r"x: expected the channels to be contiguous \(stride 1\), got stride 2": lambda: norm_modulate(x[..., ::2]),
        "shift, scale: expected both or neither": lambda: norm_modulate(x, row),
        "norm: expected layer or rms, got 'group'": lambda: norm_modulate(x, norm="group"),
        r"weight: expected contiguous \[10\] on cpu, got \[9\]": lambda: norm_modulate(x, weight=torch.zeros(9)),
        "block_map: expected None, since there is no gate, shift or scale": lambda: norm_modulate(x, **rows),
        r"block_map: expected values in 0..0, got \[0, 1\]": lambda: norm_modulate(x, row, row, **rows),
        "block_map: 2 blocks do not divide 11 tokens": lambda: norm_modulate(x[:, :11], *two, **rows),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_memory_is_told_apart_by_its_bytes():
    """Views of two dtypes or of two storages overlap where their bytes do; without memory nothing overlaps."""
    store = torch.zeros(4096)
    halves = store.view(torch.bfloat16)
    assert overlapping(store[:512], halves[520:776])  # bytes 0..2047 and 1040..1551
    assert overlapping(halves[1023:1100], store[:512])
    assert not overlapping(store[:512], halves[1024:1100])
    nowhere = torch.empty(4, device="meta")
    assert not overlapping(nowhere, nowhere.clone())
    memory = np.zeros((8, 16), dtype=np.float32)
    x, y = torch.from_numpy(memory).unsqueeze(0), torch.from_numpy(memory).unsqueeze(0)
    assert not overlapping(x[..., :8], y[..., 8:])
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


def test_qk_norm_rope_names_the_argument_that_does_not_fit():
    q, weight, rope = torch.randn(1, 6, 24), torch.ones(24), rope_3d(range(1), 2, 3, 12)
    wide = torch.randn(1, 6, 48)[..., ::2]

    def both(**changed):
        usual = {"q": q, "k": q, "q_weight": weight, "k_weight": weight, "rope": None, "num_heads": 2}
        return qk_norm_rope(**usual | changed)

    for message, call in {
        "tables for 2 x 2 x 2 tokens, but q has 6": lambda: both(rope=rope_3d(range(2), 2, 2, 12)),
        "tables for head_dim 24, but q has 12": lambda: both(rope=rope_3d(range(1), 2, 3, 24)),
        r"q: expected \[B, L, 5 \* D\]": lambda: both(num_heads=5),
        r"k_weight: expected \[24\] or \[12\]": lambda: both(k_weight=weight[1:]),
        r"q: expected the channels to be contiguous \(stride 1\), got stride 2": lambda: both(q=wide),
        "layout: expected interleaved or half, got 'pairs'": lambda: both(layout="pairs"),
        "rope: tables for 1 x 2 x 3 tokens, but x has 6, from 1 on": lambda: norm_rope(q, weight, rope, 2, start=1),
        r"rope.h: expected contiguous \[n, pairs, 2\] .*float32 on cpu, got .*float64": lambda: norm_rope(
            q, weight, rope._replace(h=rope.h.double()), 2
        ),
        "head_dim: expected an even number": lambda: rope_3d(range(2), 2, 2, 7),
        r"axis_dims: expected three even numbers with sum 128": lambda: rope_3d([0], 8, 9, 128, axis_dims=(16, 56, 57)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
