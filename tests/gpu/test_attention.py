"""Segment attention on hardware: every kernel that the card has, against float64, up to the longest sequences.

Its named calls are checked by ``python -m bench operators``.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from bench.attention.measure import exact_rows
from bench.attention.providers import own_kernel
from bench.records.outcome import Unavailable
from swifti2v_kernels import explain, merge_attention, segment_attention
from tests.support.attention_oracle import cat_attention
from tests.support.tolerances import HARDWARE_LSE, KERNEL, relative_error

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes memory that a kernel leaves unwritten show as NaN."""
    stock = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *args, **kwargs: stock(self, *args, **kwargs).fill_(float("nan"))
    )


def qkv(
    length: int, heads: int = 2, head_dim: int = 128, batch: int = 2, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """Returns slices of one buffer whose surroundings are NaN."""
    buffer = torch.full((batch, length + 2, 3, heads, head_dim), float("nan"), device="cuda", dtype=dtype)
    inner = buffer[:, 1:-1]
    inner.normal_(0.1, 0.8)
    return list(inner.unbind(2))


def check(out: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(out).all()
    assert relative_error(out, expected) < KERNEL[str(out.dtype).removeprefix("torch.")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_random_splits(head_dim: int, dtype: torch.dtype) -> None:
    """Our kernels, the public function and merged calls equal float64 over random sources with random lengths."""
    choose = random.Random(head_dim)
    for _ in range(20):
        lengths = [choose.choice((1, 31, 64, 127, 128, 129, 300, 1000)) for _ in range(choose.randint(1, 5))]
        q = qkv(choose.choice((1, 63, 128, 500)), head_dim=head_dim, dtype=dtype)[0]
        sources = [tuple(qkv(n, head_dim=head_dim, dtype=dtype)[1:]) for n in lengths]
        expected, expected_lse = cat_attention(q, sources)
        check(segment_attention(q, sources), expected)
        for portable in (False, True):
            try:
                check(own_kernel(q, sources, portable), expected)
            except Unavailable:
                continue
        parts = [segment_attention(q, [source], return_lse=True) for source in sources]
        out, lse = merge_attention(*zip(*parts, strict=True))
        assert relative_error(out, expected) < 2 * KERNEL[str(dtype).removeprefix("torch.")]
        assert (lse - expected_lse).abs().max() < HARDWARE_LSE


@pytest.mark.parametrize("tokens", [70_400, 140_000])
@pytest.mark.parametrize("sources", [1, 3])
def test_long_sequences(tokens: int, sources: int) -> None:
    """A 2K window, and more than 131,072 tokens, equal float64 in sampled rows."""
    q, k, v = qkv(tokens, batch=1)
    cuts = [tokens * i // sources for i in range(sources + 1)]
    pairs = [(k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(cuts)]
    rows = torch.linspace(0, tokens - 1, 64, device="cuda").long()
    expected = exact_rows(q, pairs, rows)
    for portable in (False, True):
        try:
            check(own_kernel(q, pairs, portable)[:, rows], expected)
        except Unavailable:
            continue


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """The second batch entry and the last heads may lie more than 2**31 elements into one buffer."""
    buffer = torch.empty(2, 140_000, 3, 24, 128, device="cuda", dtype=torch.bfloat16)  # 2.6e9 elements, 4.8 GiB
    buffer.normal_(0.1, 0.8)
    q, k, v = buffer.unbind(2)
    q, k, v = q[:, -300:], k[:, -2000:], v[:, -2000:]
    check(segment_attention(q, [(k, v)], backend="triton"), cat_attention(q, [(k, v)])[0])


def test_compiled_module_equals_eager() -> None:
    q, k, v = qkv(300)
    compiled = torch.compile(lambda q, k, v: segment_attention(2 * q, [(k, v), (k[:, :50], v[:, :50])]), fullgraph=True)
    assert relative_error(compiled(q, k, v), segment_attention(2 * q, [(k, v), (k[:, :50], v[:, :50])])) < 1e-3


@pytest.mark.parametrize(("shift", "longer"), [(1, 0), (4, 0), (0, 4), (1, 4), (8, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_views_that_are_not_aligned(dtype: torch.dtype, shift: int, longer: int) -> None:
    """Views of q, k and v, in turn and all, may begin at any element, with tokens farther apart than they are long.

    The public function is right wherever torch's attention, cuDNN's above all, could have taken the call; it may take
    the last, which is aligned.
    """
    for moved in ("q", "k", "v", "qkv"):
        views = []
        for name in "qkv":
            offset, token = (shift, 384 + longer) if name in moved else (0, 384)
            buffer = torch.full((2 * 300 * token + offset,), float("nan"), device="cuda", dtype=dtype)
            views.append(buffer.as_strided((2, 300, 3, 128), (300 * token, token, 128, 1), offset).normal_(0.1, 0.8))
        q, k, v = views
        if (shift, longer) != (8, 0):
            assert not explain(segment_attention, q, [(k, v)]).implementation.startswith("sdpa")
        check(segment_attention(q, [(k, v)]), cat_attention(q, [(k, v)])[0])
