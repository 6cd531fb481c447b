"""The portable kernel, run by the interpreter, against float64; every memory around the views is NaN.

Calls in float64 are the reference's, which is held against the same oracle.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v_kernels import BlockWindow, merge_attention, segment_attention
from swifti2v_kernels.attention.arguments import check_call
from swifti2v_kernels.attention.portable import PortableConfig, launch_portable
from swifti2v_kernels.attention.reference import segment_attention_reference
from tests.support.attention_oracle import cat_attention
from tests.support.tolerances import EXACT, KERNEL, LSE, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "reference"])
DESCRIPTORS = PortableConfig(64, 32, 4, 1, descriptors=True)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fused_qkv(length: int, heads: int, head_dim: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """Returns q, k, v as slices of one buffer that is NaN before, between and after them."""
    buffer = torch.full((batch, length + 2, 3, heads, head_dim + 8), float("nan"), dtype=dtype)
    inner = buffer[:, 1:-1, :, :, :head_dim]
    inner.copy_(torch.randn(inner.shape))
    return list(inner.unbind(2))


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, lse: Tensor | None = None, expected_lse: Tensor | None = None
) -> None:
    assert torch.isfinite(actual).all()
    assert relative_error(actual, expected) < (KERNEL | {"float64": EXACT})[name(dtype)]
    if lse is not None:
        finite = expected_lse.isfinite()
        assert torch.equal(lse.isfinite(), finite)
        assert (lse[finite] - expected_lse[finite]).abs().max() < (LSE | {"float64": EXACT})[name(dtype)]


def blocks_seen(length: int, others: int, block_len: int, left: int, right: int) -> Tensor:
    """Returns the dense mask of a block window, [1, length, length + others]."""
    block = torch.arange(length) // block_len
    distance = block.unsqueeze(0) - block.unsqueeze(1)
    near = (distance >= -left) & (distance <= right)
    return torch.cat((near, torch.ones(length, others, dtype=torch.bool)), dim=1).unsqueeze(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("head_dim", "backend"), [(64, "auto"), (96, "auto"), (128, "auto"), (64, "torch")])
def test_one_source(head_dim: int, backend: str, dtype: torch.dtype) -> None:
    q, k, v = fused_qkv(70, 2, head_dim, dtype)
    out, lse = segment_attention(q, [(k, v)], return_lse=True, backend=backend)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    expected, expected_lse = cat_attention(q, [(k, v)])
    assert_close(out, expected, dtype, lse, expected_lse)


@pytest.mark.parametrize("lengths", [(1,), (32,), (33, 1), (64, 0, 7), (1,) * 24], ids=str)
@pytest.mark.parametrize("queries", [1, 64, 65])
def test_awkward_lengths(lengths: tuple[int, ...], queries: int) -> None:
    q = fused_qkv(queries, 1, 64, torch.float32)[0]
    sources = [tuple(fused_qkv(n, 1, 64, torch.float32)[1:]) for n in lengths]
    out, lse = segment_attention(q, sources, scale=0.5, return_lse=True)
    expected, expected_lse = cat_attention(q, sources, scale=0.5)
    assert_close(out, expected, torch.float32, lse, expected_lse)


def test_strides_of_every_kind() -> None:
    """Sources may lie in [B, H, L, D] memory, in a buffer shared by batch entries, or expanded over the batch."""
    q = torch.randn(2, 3, 40, 64).transpose(1, 2)
    first = torch.randn(2, 2, 3, 50, 64).transpose(2, 3).unbind(0)
    second = torch.randn(2, 1, 20, 3, 64).expand(2, 2, 20, 3, 64).unbind(0)
    third = torch.randn(30, 2, 2, 3, 64).transpose(0, 1).transpose(1, 2).unbind(1)
    sources = [tuple(first), tuple(second), tuple(x.transpose(0, 1).transpose(0, 1) for x in third)]
    assert_close(segment_attention(q, sources), cat_attention(q, sources)[0], torch.float32)


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any),
    queries=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    calls=st.integers(1, 3),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_split_into_sources_and_calls_is_the_same_attention(
    lengths: list[int], queries: int, dtype: torch.dtype, calls: int
) -> None:
    """The keys of one buffer may be cut into any sources, dealt out to calls whose results are merged."""
    total = sum(lengths)
    q = fused_qkv(queries, 1, 64, dtype, batch=1)[0]
    _, k, v = fused_qkv(total, 1, 64, dtype, batch=1)
    cuts = [0, *itertools.accumulate(lengths)]
    sources = [(k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(cuts)]
    expected, expected_lse = cat_attention(q, [(k, v)])
    parts = [sources[i::calls] for i in range(calls)]
    parts = [part for part in parts if any(x.shape[1] for x, _ in part)]
    results = [segment_attention(q, part, return_lse=True) for part in parts]
    out, lse = merge_attention(*zip(*results, strict=True))
    assert_close(out, expected, dtype, lse, expected_lse)


@BOTH
@pytest.mark.parametrize("head_dim", [64, 128])
def test_valid_lengths_hide_what_lies_behind(head_dim: int, dtype: torch.dtype) -> None:
    """Hidden rows never count, with 0, some or all keys valid, even where they are NaN in keys and values."""
    q, k, v = fused_qkv(40, 2, head_dim, dtype, batch=3)
    _, text_k, text_v = fused_qkv(70, 2, head_dim, dtype, batch=3)
    valid = torch.tensor([0, 33, 70])
    for i, n in enumerate(valid.tolist()):
        text_k[i, n:], text_v[i, n:] = float("nan"), float("nan")
    both = [(k, v), (text_k, text_v)], [None, valid]
    for sources, lengths in (both, ([(text_k, text_v)], [valid.int()])):
        out, lse = segment_attention(q, sources, valid_lengths=lengths, return_lse=True)
        expected, expected_lse = cat_attention(q, sources, valid_lengths=lengths)
        assert_close(out, expected, dtype, lse, expected_lse)
    # Rows without a valid key.
    assert (out[0] == 0).all()
    assert lse[0].isneginf().all()


def test_lengths_out_of_range_count_as_the_nearer_end() -> None:
    """Lengths are not looked at on a GPU, and nothing outside of the tensors is read there."""
    q, k, v = fused_qkv(70, 1, 64, torch.float16, batch=3)
    expected = segment_attention(q, [(k, v)], valid_lengths=[torch.tensor([0, 33, 70])])
    call = check_call(q, [(k, v)], None, [torch.tensor([-9, 33, 999])], out=torch.empty_like(q))
    launch_portable(call, PortableConfig(64, 32, 4, 1))
    for out in (call.out[0], segment_attention_reference(call, False)[0][0]):
        assert_close(out, expected, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
def test_query_views_see_their_sources_only(dtype: torch.dtype) -> None:
    """The causal ablation runs in one call, with its outputs in two slices of one buffer."""
    given_qkv, noisy_qkv = fused_qkv(70, 2, 64, dtype), fused_qkv(90, 2, 64, dtype)
    sources = [tuple(given_qkv[1:]), tuple(noisy_qkv[1:])]
    buffer = torch.full((2, 161, 2, 64), float("nan"), dtype=dtype)
    out = [buffer[:, :70], buffer[:, 70:160]]
    returned, lse = segment_attention(
        [given_qkv[0], noisy_qkv[0]], sources, attends=[[0], [0, 1]], out=out, return_lse=True
    )
    assert all(x is y for x, y in zip(returned, out, strict=True))
    first, first_lse = cat_attention(given_qkv[0], sources[:1])
    second, second_lse = cat_attention(noisy_qkv[0], sources)
    assert_close(out[0], first, dtype, lse[0], first_lse)
    assert_close(out[1], second, dtype, lse[1], second_lse)
    assert buffer[:, 160:].isnan().all(), "the kernel wrote past its outputs"


def test_an_empty_query_view_changes_nothing_of_the_others() -> None:
    sources = [tuple(fused_qkv(n, 1, 64, torch.float32)[1:]) for n in (40, 50, 33)]
    q = fused_qkv(70, 1, 64, torch.float32)[0]
    none, out = segment_attention([q[:, :0], q], sources, attends=[[1], [2, 0]])
    assert none.shape == (2, 0, 1, 64)
    assert_close(out, cat_attention(q, [sources[0], sources[2]])[0], torch.float32)


@BOTH
@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 1), (9, 9)])
@pytest.mark.parametrize("block_len", [1, 30, 64, 70])
def test_block_windows(block_len: int, left: int, right: int, dtype: torch.dtype) -> None:
    """A block window equals a dense mask; a second source is seen by all queries."""
    length = 150 if block_len > 1 else 12
    q, k, v = fused_qkv(length, 1, 64, dtype, batch=1)
    _, anchor_k, anchor_v = fused_qkv(20, 1, 64, dtype, batch=1)
    sources = [(k, v), (anchor_k, anchor_v)]
    out = segment_attention(q, sources, window=BlockWindow(block_len, left, right))
    mask = blocks_seen(length, 20, block_len, left, right)
    assert_close(out, cat_attention(q, sources, mask=mask)[0], dtype)


def test_a_skipped_tile_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of one block of four computes a quarter of the tiles of keys of the whole."""
    from triton.runtime.interpreter import InterpreterBuilder

    count, stock = [0], InterpreterBuilder.create_dot

    def counting(*args: object) -> object:
        count[0] += 1
        return stock(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    q, k, v = fused_qkv(256, 1, 64, torch.float16, batch=1)
    segment_attention(q, [(k, v)])
    whole, count[0] = count[0], 0
    segment_attention(q, [(k, v)], window=BlockWindow(64, 0))
    assert whole == 4 * 8 * 2
    assert count[0] * 4 == whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize(("head_dim", "lengths"), [(96, (70,)), (64, (64, 33)), (96, (1, 32, 40, 5))], ids=str)
def test_descriptors(head_dim: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Tensor descriptors, the form compiled for Hopper and Blackwell, give the same numbers as pointers."""
    q = fused_qkv(66, 2, head_dim, dtype)[0]
    sources = [tuple(fused_qkv(n, 2, head_dim, dtype)[1:]) for n in lengths]
    out, lse = torch.full_like(q, float("nan")), torch.full((2, 2, 66), float("nan"))
    launch_portable(check_call(q, sources, 0.1, out=out)._replace(lse=[lse]), DESCRIPTORS)
    expected, expected_lse = cat_attention(q, sources, scale=0.1)
    assert_close(out, expected, dtype, lse, expected_lse)


def test_descriptors_with_valid_lengths_and_a_window() -> None:
    """Rows after the visible ones never count: NaN after valid lengths, other blocks beside a window."""
    q, k, v = fused_qkv(100, 1, 64, torch.float16, batch=1)
    _, text_k, text_v = fused_qkv(50, 1, 64, torch.float16, batch=1)
    text_k[:, 37:], text_v[:, 37:] = float("nan"), float("nan")
    out, sources, lengths = torch.empty_like(q), [(k, v), (text_k, text_v)], [None, torch.tensor([37])]
    launch_portable(check_call(q, sources, 0.125, lengths, window=BlockWindow(40, 1), out=out), DESCRIPTORS)
    mask = blocks_seen(100, 50, 40, 1, 0)
    assert_close(out, cat_attention(q, sources, valid_lengths=lengths, mask=mask)[0], torch.float16)


def test_logits_far_from_zero() -> None:
    """Logits of 1000 do not overflow; what is lost is a few roundings of the logits themselves, 1000 * 2**-24 each."""
    q, k, v = (torch.randn(1, 40, 1, 64) for _ in range(3))
    q[..., 0], k[..., 0] = 32.0, 256.0
    out, lse = segment_attention(q, [(k, v)], return_lse=True)
    expected, expected_lse = cat_attention(q, [(k, v)])
    assert lse.min() > 1000
    assert relative_error(out, expected) < 1000 * 2**-24 * 16
    assert relative_error(lse, expected_lse) < KERNEL["float32"]


def test_not_a_number_is_not_hidden() -> None:
    q, k, v = (torch.randn(1, 5, 1, 64) for _ in range(3))
    k[0, 3] = float("nan")
    assert segment_attention(q, [(k, v)]).isnan().all()


def test_rows_beyond_two_to_the_31_elements() -> None:
    """Batch entries and heads may lie more than 2**31 elements apart; untouched pages cost no memory."""
    far = 2**31 + 64
    buffer, target = (torch.empty(far + 2**17, dtype=torch.float16) for _ in range(2))
    q = buffer.as_strided((2, 3, 2, 64), (far, 64, 1024, 1))
    kv = [buffer.as_strided((2, 40, 2, 64), (2048, 64, far, 1), 8192 * (i + 1)) for i in range(2)]
    out = target.as_strided((2, 3, 2, 64), (64, 256, far, 1))
    for x in (q, *kv):
        x.copy_(torch.randn(x.shape))
    assert segment_attention(q, [tuple(kv)], out=out) is out
    assert_close(out, cat_attention(q, [tuple(kv)])[0], torch.float16)
