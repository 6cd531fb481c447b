"""The contract of segment attention on its PyTorch path: numbers, errors, autograd, compilation, the choice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.machine.counted import TensorMemory
from swifti2v_kernels import BlockWindow, explain, merge_attention, segment_attention
from swifti2v_kernels.attention import choice as attention_choice
from swifti2v_kernels.attention import reference
from swifti2v_kernels.attention.portable import PortableConfig
from swifti2v_kernels.attention.segment_attention import cost
from swifti2v_kernels.common import tables, target
from swifti2v_kernels.common.checks import overlapping, self_overlapping
from swifti2v_kernels.common.dispatch import default_backend, use_backend
from tests.support.attention_oracle import cat_attention
from tests.support.tolerances import EXACT, OPERATOR, relative_error


def qkv(
    length: int, batch: int = 2, heads: int = 3, head_dim: int = 16, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return list(torch.randn(batch, length, 3, heads, head_dim, dtype=dtype).unbind(2))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    dealt=st.integers(1, 3),
    queries=st.integers(0, 7),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_split_into_sources_and_calls_is_the_same_attention(lengths: list[int], dealt: int, queries: int) -> None:
    q, (_, k, v) = qkv(queries)[0], qkv(sum(lengths))
    cuts = [0, *itertools.accumulate(lengths)]
    sources = [(k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(cuts)]
    expected, expected_lse = cat_attention(q, [(k, v)])
    parts = [part for part in (sources[i::dealt] for i in range(dealt)) if any(x.shape[1] for x, _ in part)]
    out, lse = merge_attention(*zip(*(segment_attention(q, part, return_lse=True) for part in parts), strict=True))
    assert torch.allclose(out, expected, atol=EXACT)
    assert torch.allclose(lse, expected_lse, atol=EXACT)


def test_valid_lengths_attends_and_out() -> None:
    (q, k, v), (p, text_k, text_v) = qkv(5), qkv(4)
    valid = torch.tensor([0, 3])
    text_k[1, 3:], text_v[1, 3:] = float("nan"), float("nan")
    text_k[0], text_v[0] = float("nan"), float("nan")
    sources, lengths = [(k, v), (text_k, text_v)], [None, valid]
    buffer = torch.zeros(2, 9, 3, 16, dtype=torch.float64)
    out = [buffer[:, :5], buffer[:, 5:]]
    returned, lse = segment_attention(
        [q, p], sources, valid_lengths=lengths, attends=[[1], [0, 1]], out=out, return_lse=True
    )
    assert all(x is y for x, y in zip(returned, out, strict=True))
    second, second_lse = cat_attention(p, sources, valid_lengths=lengths)
    assert relative_error(out[1], second) < EXACT
    assert relative_error(lse[1], second_lse) < EXACT
    assert (out[0][0] == 0).all()
    assert lse[0][0].isneginf().all()
    first = cat_attention(q[1:], [(text_k[1:, :3], text_v[1:, :3])])[0]
    assert relative_error(out[0][1:], first) < EXACT


def test_gradients_of_rows_without_a_valid_key_are_zero() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(3))
    out, lse = segment_attention(q, [(k, v)], valid_lengths=[torch.tensor([0, 2])], return_lse=True)
    (out.sum() + lse[1].sum()).backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert (x.grad[0] == 0).all()


@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 0), (2, 1)])
def test_block_windows(left: int, right: int) -> None:
    (q, k, v), (_, anchor_k, anchor_v) = qkv(14), qkv(3)
    block = torch.arange(14) // 4
    distance = block.unsqueeze(0) - block.unsqueeze(1)
    mask = torch.cat(((distance >= -left) & (distance <= right), torch.ones(14, 3, dtype=torch.bool)), dim=1)
    sources = [(k, v), (anchor_k, anchor_v)]
    out = segment_attention(q, sources, window=BlockWindow(4, left, right))
    assert relative_error(out, cat_attention(q, sources, mask=mask.unsqueeze(0))[0]) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_log_sum_exp_in_every_dtype(dtype: torch.dtype) -> None:
    q, k, v = qkv(6, dtype=dtype)
    out, lse = segment_attention(q, [(k, v)], return_lse=True)
    expected, expected_lse = cat_attention(q, [(k, v)])
    assert lse.dtype == torch.float32
    assert relative_error(out, expected) < OPERATOR[str(dtype).removeprefix("torch.")]
    assert relative_error(lse, expected_lse) < OPERATOR["float32"]


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("return_lse", [False, True], ids=["attention alone", "log-sum-exp"])
def test_logits_are_never_all_there_at_once(return_lse: bool, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of [B, H, Lq, L] is held, forward or backward, with padded text and without a kernel."""
    length, (q, k, v) = 1024, qkv(1024, batch=1, heads=2, dtype=torch.float32)
    text, valid = qkv(16, batch=1, heads=2, dtype=torch.float32)[1:], torch.tensor([9])
    monkeypatch.setattr(reference, "PIECE", dict.fromkeys(reference.PIECE, 32 * 2 * (length + 16)))

    def computed() -> list[Tensor]:
        leaves = [x.detach().requires_grad_(gradients) for x in (q, k, v, *text)]
        sources = [(leaves[1], leaves[2]), (leaves[3], leaves[4])]
        result = segment_attention(leaves[0], sources, valid_lengths=[None, valid], return_lse=return_lse)
        results = list(result) if return_lse else [result]
        return [*results, *(torch.autograd.grad(sum(x.sin().sum() for x in results), leaves) if gradients else ())]

    with TensorMemory([q, k, v, *text]) as memory:
        before = memory.live
        found = computed()
    assert (
        memory.peak - before < 2 * length**2 * 4 / 2
    )  # half of the logits in float32, which would be held several times
    monkeypatch.setattr(reference, "PIECE", dict.fromkeys(reference.PIECE, 1 << 30))
    for a, b in zip(found, computed(), strict=True):
        assert relative_error(a, b) < OPERATOR["float32"]


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"window": BlockWindow(2, 1)}], ids=str)
def test_compiles_as_one_graph(options: dict[str, Any]) -> None:
    def module(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return segment_attention(q, [(k, v), (k[:, :2], v[:, :2])], **options)

    q, k, v = qkv(6)
    expected = module(q, k, v)
    actual = torch.compile(module, fullgraph=True, backend="aot_eager")(q, k, v)
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) < EXACT


Q, K, V = (torch.zeros(2, 5, 3, 16) for _ in range(3))
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no source": (lambda: segment_attention(Q, []), r"sources: expected 1 to 24 .* got 0"),
    "no queries": (lambda: segment_attention([], [(K, V)]), r"q: expected .* got 0"),
    "too many sources": (lambda: segment_attention(Q, [(K, V)] * 25), r"sources: .* got 25"),
    "not a pair": (lambda: segment_attention(Q, [(K, V, V)]), r"sources\[0\]: expected a pair \(k, v\), got 3 items"),
    "a tensor for a pair": (lambda: segment_attention(Q, [K]), r"sources\[0\]: expected a pair .* Tensor"),
    "other heads": (lambda: segment_attention(Q, [(K, V), (K[:, :, :2], V)]), r"sources\[1\]\.k: .*\[2, 5, 2, 16\]"),
    "other head_dim": (lambda: segment_attention(Q, [(K, V[..., :8])]), r"sources\[0\]\.v: expected \[2, L, 3, 16\]"),
    "other batch": (lambda: segment_attention(Q, [(K[:1], V[:1])]), r"sources\[0\]\.k: .*\[1, 5, 3, 16\]"),
    "other dtype": (lambda: segment_attention(Q, [(K.half(), V)]), r"sources\[0\]\.k: .* got .*torch.float16"),
    "k and v differ": (lambda: segment_attention(Q, [(K, V[:, :4])]), r"sources\[0\]: k has 5 tokens and v has 4"),
    "strided head_dim": (
        lambda: segment_attention(torch.zeros(2, 5, 3, 32)[..., ::2], [(K, V)]), r"q: .*contiguous .* got stride 2"
    ),
    "all empty": (lambda: segment_attention(Q, [(K[:, :0], V[:, :0])]), "every source is empty"),
    "scale": (lambda: segment_attention(Q, [(K, V)], scale=-1.0), r"scale: expected a positive number, got -1.0"),
    "lengths: one for all": (
        lambda: segment_attention(Q, [(K, V)], valid_lengths=torch.tensor([5, 5])), r"valid_lengths: expected a list"
    ),
    "lengths: too few": (lambda: segment_attention(Q, [(K, V)], valid_lengths=[]), r"valid_lengths: .* got 0 entries"),
    "lengths: batch": (
        lambda: segment_attention(Q, [(K, V)], valid_lengths=[torch.tensor([5])]), r"valid_lengths\[0\]: expected \[2\]"
    ),
    "lengths: float": (
        lambda: segment_attention(Q, [(K, V)], valid_lengths=[torch.ones(2)]), r"valid_lengths\[0\]: .*float32"
    ),
    "lengths: negative": (
        lambda: segment_attention(Q, [(K, V)], valid_lengths=[torch.tensor([-1, 5])]),
        r"valid_lengths\[0\]: expected values in 0..5, got \[-1, 5\]",
    ),
    "lengths: too long": (
        lambda: segment_attention(Q, [(K, V)], valid_lengths=[torch.tensor([6, 5])]), r"in 0..5, got \[6, 5\]"
    ),
    "attends: too few": (lambda: segment_attention([Q, Q], [(K, V)], attends=[[0]]), r"attends: expected 2 lists"),
    "attends: index": (lambda: segment_attention(Q, [(K, V)], attends=[[1]]), r"attends\[0\]: .* in 0..0, got \[1\]"),
    "attends: nothing": (lambda: segment_attention(Q, [(K, V)], attends=[[]]), r"attends\[0\]: expected at least one"),
    "window: negative": (
        lambda: segment_attention(Q, [(K, V)], window=BlockWindow(2, -1)), r"window: .* got BlockWindow\(.* left=-1"
    ),
    "window: lengths": (
        lambda: segment_attention(Q[:, :4], [(K, V)], window=BlockWindow(2, 1)), r"window: .* 5, got lengths \[4\]"
    ),
    "window: not seen": (
        lambda: segment_attention(Q, [(K, V)] * 2, window=BlockWindow(2, 1), attends=[[1]]), r"attends: .* first source"
    ),
    "out: shape": (lambda: segment_attention(Q, [(K, V)], out=Q[:, :4].clone()), r"out\[0\]: expected \[2, 5, 3, 16\]"),
    "out: number": (lambda: segment_attention(Q, [(K, V)], out=[Q.clone()]), r"out: expected 1 view"),
    "out: is an input": (lambda: segment_attention(Q, [(K, V)], out=Q), r"out\[0\]: .* overlaps q\[0\]"),
    "out: on each other": (
        lambda: segment_attention([Q[:, :3], Q[:, 3:]], [(K, V)], out=[(b := Q.clone())[:, :3], b[:, 2:4]]),
        r"out\[0\]: .* overlaps out\[1\]",
    ),
    "out: expanded": (
        lambda: segment_attention(Q, [(K, V)], out=torch.zeros(1, 5, 3, 16).expand(2, 5, 3, 16)), r"distinct elements"
    ),
    "backend": (lambda: segment_attention(Q, [(K, V)], backend="cuda"), r"backend: expected one of auto, torch"),
    "no GPU": (lambda: segment_attention(Q, [(K, V)], backend="triton"), r"cannot take this call: kernels need an NV"),
    "merge: a tensor": (lambda: merge_attention(Q, [K]), r"outputs, lses: expected sequences"),
    "merge: counts": (lambda: merge_attention([Q], []), r"got 1 and 0"),
    "merge: shape": (
        lambda: merge_attention([Q, Q[:, :4]], [torch.zeros(2, 3, 5)] * 2), r"outputs\[1\]: expected \[2, 5, 3, 16\]"
    ),
    "merge: lse": (lambda: merge_attention([Q], [torch.zeros(2, 5, 3)]), r"lses\[0\]: expected \[2, 3, 5\]"),
    "explain": (lambda: explain(torch.relu, Q), r"operator: expected one of .*segment_attention.*, got relu"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_the_choice_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = explain(segment_attention, Q, [(K, V)])
    assert str(choice).startswith("torch: reference (kernels need an NVIDIA GPU")
    monkeypatch.setenv("SWIFTI2V_BACKEND", "torch")
    assert explain(segment_attention, Q, [(K, V)]).reason == "SWIFTI2V_BACKEND is 'torch'"
    monkeypatch.setenv("SWIFTI2V_BACKEND", "cuda")
    with pytest.raises(ValueError, match="SWIFTI2V_BACKEND: expected one of auto, torch, triton, got 'cuda'"):
        segment_attention(Q, [(K, V)])
    monkeypatch.setenv("SWIFTI2V_BACKEND", "triton")  # a preference: what has no kernel still runs
    assert explain(segment_attention, Q, [(K, V)]).backend == "torch"
    monkeypatch.setenv("SWIFTI2V_BACKEND", "")  # as if it were not set
    assert explain(segment_attention, Q, [(K, V)]) == choice


def test_a_backend_of_another_word_is_named_in_a_compiled_call_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFTI2V_BACKEND", "cuda")
    compiled = torch.compile(lambda q, k, v: segment_attention(q, [(k, v)]), backend="eager")
    with pytest.raises(ValueError, match=r"^SWIFTI2V_BACKEND: expected one of auto, torch, triton, got 'cuda'$"):
        compiled(Q, K, V)


def test_a_backend_can_be_asked_for_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFTI2V_BACKEND", "triton")
    with use_backend("torch"):
        assert default_backend() == "torch"
        unknown = use_backend("cuda")
        with pytest.raises(ValueError, match="backend: expected one of auto, torch, triton, got 'cuda'"):
            unknown.__enter__()
        assert default_backend() == "torch"
    assert default_backend() == "triton"


def test_the_table_decides_by_the_nearest_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(tokens: int, ours: float) -> dict[str, Any]:
        return {
            "capability": 90, "card": "card", "dtype": "bfloat16", "head_dim": 128, "tokens": tokens,
            "seconds": {"swifti2v": ours, "sdpa-cudnn": 1.0},
        }  # fmt: skip

    def fastest(capability: int, tokens: int) -> str | None:
        match = {"capability": capability, "dtype": "bfloat16", "head_dim": 128}
        return tables.fastest("attention", match, "tokens", tokens)[0]

    monkeypatch.setattr(tables, "load_table", lambda name: [entry(1000, 2.0), entry(70000, 0.9)])
    assert fastest(90, 2000) == "sdpa-cudnn"
    assert fastest(90, 50000) == "swifti2v"
    assert fastest(89, 2000) is None


def test_torch_s_attention_behind_dense_calls() -> None:
    q, k, v = qkv(7, dtype=torch.float32)
    for name in ("sdpa-cudnn", "sdpa-flash"):
        out = attention_choice.sdpa(name, q, k, v, 0.3)
        assert relative_error(out, cat_attention(q, [(k, v)], scale=0.3)[0]) < OPERATOR["float32"]


@pytest.mark.parametrize(
    ("capability", "name"), [(80, "sdpa-flash"), (89, "sdpa-flash"), (90, "sdpa-cudnn"), (120, "sdpa-cudnn")]
)
def test_a_dense_call_on_an_unmeasured_card_takes_torch(
    capability: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is made from the tensors' metadata: these say that they are on a GPU, and hold nothing."""
    for module in (attention_choice, target):
        monkeypatch.setattr(module, "capability_of", lambda device: capability)
    monkeypatch.setattr(tables, "load_table", lambda name: [])
    with FakeTensorMode():
        q, k, v = torch.empty(1, 70, 3, 2, 128, device="cuda", dtype=torch.bfloat16).unbind(2)
        choice = explain(segment_attention, q, [(k, v)])
    assert (choice.backend, choice.implementation) == ("triton", name)
    assert choice.reason == "one dense source: no measurement for this capability, dtype and head_dim"
    monkeypatch.setattr(target, "capability_of", lambda device: 75)
    with FakeTensorMode():
        choice = explain(segment_attention, q, [(k, v)])
    assert str(choice) == ("torch: reference (kernels exist for compute capability 8.0 and newer, this device has 7.5)")


def test_shipped_table_is_read() -> None:
    tables.load_table.cache_clear()
    assert isinstance(tables.load_table("attention"), list)
    assert isinstance(tables.load_table("conv3d"), list)


@pytest.mark.parametrize("capability", [None, 80, 86, 89, 90, 100, 103, 120, 121])
def test_every_capability_has_a_configuration(capability: int | None) -> None:
    for head_dim, sources, aligned in itertools.product((64, 96, 128), (1, 4, 5), (True, False)):
        config = PortableConfig.heuristic(capability, head_dim, sources, aligned)
        assert not config.descriptors or (aligned and sources <= 4)


def test_overlaps_are_decided_by_elements() -> None:
    x = torch.zeros(2, 10, 4, 8)
    assert not overlapping(x[:, :5], x[:, 5:])
    assert not overlapping(x[:, :, :2], x[:, :, 2:])
    assert not overlapping(x[:1], x[1:])
    assert not overlapping(x[..., :4], x[..., 4:])
    assert overlapping(x[:, :6], x[:, 5:])
    assert overlapping(x, x[:, 2:3, 1:2])
    assert overlapping(x[:, :, :3], x[:, 4:, 2:])
    assert not overlapping(x, x.clone())
    assert not overlapping(x[:, :0], x)
    assert not self_overlapping(x[:, ::2, 1:])
    assert self_overlapping(x.as_strided((2, 3), (1, 1)))


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_overlap_of_slices_is_exact(data: st.DataObject) -> None:
    """The answer is that of the sets of elements, for random slices of one buffer."""
    x = torch.arange(2 * 5 * 3 * 4).view(2, 5, 3, 4)

    def part() -> Tensor:
        y = x
        for axis, n in enumerate(x.shape):
            start = data.draw(st.integers(0, n - 1))
            y = y.narrow(axis, start, data.draw(st.integers(1, n - start)))
        return y

    a, b = part(), part()
    shared = bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))
    assert overlapping(a, b) == shared


def test_cost_counts_what_is_seen() -> None:
    whole, local = cost(2, 12, 128, 1000, 1000), cost(2, 12, 128, 1000, 1000, pairs=250_000)
    assert whole.flops == 4 * local.flops == 4 * 2 * 12 * 128 * 1000 * 1000
    assert whole.bytes == 2 * 12 * 128 * 2 * 4000
