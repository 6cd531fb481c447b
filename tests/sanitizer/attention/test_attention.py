"""Out-of-bounds accesses, races and reads of unwritten memory in attention's kernels (see conftest.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swifti2v_kernels.attention.arguments import BlockWindow, check_call
from swifti2v_kernels.attention.merge_attention_kernel import launch_merge
from swifti2v_kernels.attention.portable import PortableConfig, launch_portable
from tests.support.attention_oracle import cat_attention
from tests.support.tolerances import KERNEL, relative_error

#: Descriptor loads that drop leading axes of 1 are beyond ttsem 0.1.0; TMA checks its bounds itself.
POINTERS = PortableConfig(64, 32, 4, 2)


def qkv(length: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns tensors of exactly this length: one row more would be out of bounds."""
    return [torch.randn(1, length, 2, head_dim, dtype=torch.float32).to("cuda", dtype) for _ in range(3)]


@pytest.mark.parametrize(("head_dim", "lengths"), [(96, (70,)), (64, (33, 1))], ids=str)
def test_attention_stays_inside(head_dim: int, lengths: tuple[int, ...]) -> None:
    q = qkv(67, head_dim, torch.bfloat16)[0]
    sources = [tuple(qkv(n, head_dim, torch.bfloat16)[1:]) for n in lengths]
    out, lse = torch.empty_like(q), torch.empty(1, 2, 67, device="cuda")
    launch_portable(check_call(q, sources, 0.125, out=out)._replace(lse=[lse]), POINTERS)
    expected, expected_lse = cat_attention(q, sources, scale=0.125)
    assert relative_error(out, expected) < KERNEL["bfloat16"]
    assert (lse - expected_lse).abs().max() < 1e-4


def test_masks_stay_inside() -> None:
    """Two query views with their own sources, a valid length, and a window of blocks stay inside."""
    views = [qkv(n, 64, torch.float16) for n in (40, 70)]
    sources = [(k, v) for _, k, v in views]
    out = [torch.empty_like(q) for q, _, _ in views]
    valid = torch.tensor([39], device="cuda")
    queries = [q for q, _, _ in views]
    launch_portable(check_call(queries, sources, 0.125, [valid, None], [[0], [0, 1]], out=out), POINTERS)
    q, k, v = views[1]
    local = torch.empty_like(q)
    launch_portable(check_call(q, [(k, v)], 0.125, window=BlockWindow(30, 1), out=local), POINTERS)
    lengths = [valid, None]
    first = cat_attention(views[0][0], sources[:1], scale=0.125, valid_lengths=lengths[:1])[0]
    second = cat_attention(q, sources, scale=0.125, valid_lengths=lengths)[0]
    assert relative_error(out[0], first) < KERNEL["float16"]
    assert relative_error(out[1], second) < KERNEL["float16"]
    assert torch.isfinite(local).all()


def test_merge_stays_inside() -> None:
    outputs = [torch.randn(1, 21, 2, 96).to("cuda", torch.float16) for _ in range(2)]
    lses = [torch.randn(1, 2, 21).to("cuda") for _ in range(2)]
    out, lse = torch.empty_like(outputs[0]), torch.empty_like(lses[0])
    launch_merge(outputs, lses, out, lse)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
