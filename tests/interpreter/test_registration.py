"""Attention and norms that write into the caller's memory as one graph of ``torch.compile``; calls without a kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import (
    BlockWindow,
    explain,
    gated_residual,
    gated_residual_norm_modulate,
    merge_attention,
    norm_modulate,
    norm_rope,
    qk_norm_rope,
    rope_3d,
    segment_attention,
)
from tests.support.attention_oracle import cat_attention
from tests.support.tolerances import KERNEL, relative_error


def qkv(length: int) -> list[Tensor]:
    return list(torch.randn(1, length, 3, 2, 64, dtype=torch.float16).unbind(2))


def test_attention_is_written_in_place_masked_and_merged_in_one_graph() -> None:
    (q, k, v), valid = qkv(33), torch.tensor([3])

    def module(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        segment_attention(q, [(k, v)], out=out)
        parts = [segment_attention(q, [(k[:, s], v[:, s])], return_lse=True) for s in (slice(0, 9), slice(9, 33))]
        sources, lengths = [(k, v), (k[:, :5], v[:, :5])], [None, valid]
        local = segment_attention(2 * q, sources, valid_lengths=lengths, window=BlockWindow(20, 1))
        return out + 1, merge_attention(*zip(*parts, strict=True))[0], local

    out, expected = torch.zeros_like(q), cat_attention(q, [(k, v)])[0]
    plus_one, merged, local = torch.compile(module, fullgraph=True, backend="aot_eager")(q, k, v, out)
    assert relative_error(out, expected) < KERNEL["float16"]
    assert torch.equal(plus_one, out + 1)
    assert relative_error(merged, expected) < 2 * KERNEL["float16"]
    assert torch.equal(local, module(q, k, v, out)[2])


def adaln_block(x: Tensor, update: Tensor, table: Tensor, rows: Tensor) -> list[Tensor]:
    """Computes as a foreign module would: into new tensors and in place, on a part of a larger tensor."""
    shift, scale, gate = table.unbind(2)
    y = norm_modulate(2 * x, shift, scale, block_map=rows)
    stream = x + 1
    gated_residual(stream[:, :6], update[:, :6], gate, block_map=rows, inplace=True)
    new, z = gated_residual_norm_modulate(stream, update, gate, shift, scale, block_map=rows, out=y, inplace=True)
    return [y + 1, new, 2 * z, stream]


def rope_block(x: Tensor, weight: Tensor, one: Tensor) -> list[Tensor]:
    """Computes slices of a fused projection in place, unsorted blocks, and a single token."""
    qkv = x @ one
    q, k, v = qkv.chunk(3, dim=2)
    rope = rope_3d([5, 0, 2], 2, 2, 24)
    q, k = qk_norm_rope(q, k, weight, weight, rope, 4, inplace=True)
    return [q + 1, k, v, qkv, norm_rope(x[:, 3:4], weight, rope, 4, start=3)]


def test_the_fused_operators_compile_as_one_graph() -> None:
    x, update = torch.randn(2, 1, 12, 96, dtype=torch.float16)
    rows = torch.tensor([1, 0, 1], dtype=torch.int32)
    calls = {
        adaln_block: (x, update, torch.randn(1, 2, 3, 96), rows),
        rope_block: (x, torch.rand(96, dtype=torch.float16), torch.randn(96, 288, dtype=torch.float16)),
    }
    for module, arguments in calls.items():
        expected = module(*arguments)
        actual = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) < KERNEL["float16"]


def test_what_has_no_kernel_takes_the_reference() -> None:
    q, k, v = qkv(5)
    far = torch.empty(2**23 + 64, dtype=torch.float16).as_strided((1, 2, 1, 64), (1, 2**23, 64, 1))
    for reason, views in {
        "kernels exist for float16 and bfloat16, got torch.float64": (q.double(), k.double(), v.double()),
        "an input needs gradients": (q.clone().requires_grad_(), k, v),
        "a token stride of 2": (far, far, far),
        "kernels exist for head_dim 64, 96, 128, got 32": (q[..., :32], k[..., :32], v[..., :32]),
    }.items():
        assert explain(segment_attention, views[0], [views[1:]]).reason.startswith(reason)
    assert segment_attention(q[:, :0], [(k, v)]).shape == (1, 0, 2, 64)
    with pytest.raises(ValueError, match=r"valid_lengths\[0\]: expected values in 0..5, got \[6\]"):
        segment_attention(q, [(k, v)], valid_lengths=[torch.tensor([6])])
    with pytest.raises(ValueError, match=r"out\[0\]: .* overlaps sources\[0\]\.k"):
        segment_attention(q, [(k, v)], out=k)
