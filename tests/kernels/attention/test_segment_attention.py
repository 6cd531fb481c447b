"""The contract of segment attention on its PyTorch path: errors, memory, the choice; numbers: tests/interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.machine.counted import TensorMemory
from swifti2v_kernels import BlockWindow, explain, linear_gelu, merge_attention, segment_attention
from swifti2v_kernels.attention import reference
from swifti2v_kernels.common import target
from swifti2v_kernels.common.checks import overlapping, self_overlapping
from swifti2v_kernels.common.dispatch import default_backend, use_backend
from tests.support.tolerances import OPERATOR, relative_error


def qkv(
    length: int, batch: int = 2, heads: int = 3, head_dim: int = 16, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return list(torch.randn(batch, length, 3, heads, head_dim, dtype=dtype).unbind(2))


def test_gradients_of_rows_without_a_valid_key_are_zero() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(3))
    out, lse = segment_attention(q, [(k, v)], valid_lengths=[torch.tensor([0, 2])], return_lse=True)
    (out.sum() + lse[1].sum()).backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert (x.grad[0] == 0).all()


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
    # Half of the logits in float32, which would be held several times.
    assert memory.peak - before < 2 * length**2 * 4 / 2
    monkeypatch.setattr(reference, "PIECE", dict.fromkeys(reference.PIECE, 1 << 30))
    for a, b in zip(found, computed(), strict=True):
        assert relative_error(a, b) < OPERATOR["float32"]


Q, K, V = (torch.zeros(2, 5, 3, 16) for _ in range(3))
ROWS, BUFFER = torch.zeros(2, 3, 5), torch.zeros(2, 9, 3, 16)
BAD: dict[str, Callable[[], Any]] = {
    r"sources: expected 1 to 24 .* got 0": lambda: segment_attention(Q, []),
    r"q: expected .* got 0": lambda: segment_attention([], [(K, V)]),
    r"sources\[0\]: expected a pair \(k, v\), got 3 items": lambda: segment_attention(Q, [(K, V, V)]),
    r"sources\[0\]: expected a pair .* Tensor": lambda: segment_attention(Q, [K]),
    r"sources\[1\]\.k: .*\[2, 5, 2, 16\]": lambda: segment_attention(Q, [(K, V), (K[:, :, :2], V)]),
    r"q: expected \[B, Lq, H, D\], got \[2, 5, 3, 0\]": lambda: segment_attention(Q[..., :0], [(K, V)]),
    r"sources\[0\]: k has 5 tokens and v has 4": lambda: segment_attention(Q, [(K, V[:, :4])]),
    r"q: .*contiguous .* got stride 2": lambda: segment_attention(torch.zeros(2, 5, 3, 32)[..., ::2], [(K, V)]),
    "every source is empty": lambda: segment_attention(Q, [(K[:, :0], V[:, :0])]),
    r"scale: expected a positive number, got -1.0": lambda: segment_attention(Q, [(K, V)], scale=-1.0),
    r"valid_lengths: expected a list": lambda: segment_attention(Q, [(K, V)], valid_lengths=torch.tensor([5, 5])),
    r"valid_lengths\[0\]: expected \[2\]": lambda: segment_attention(Q, [(K, V)], valid_lengths=[torch.tensor([5])]),
    r"valid_lengths\[0\]: expected values in 0..5, got \[-1, 6\]": lambda: segment_attention(
        Q, [(K, V)], valid_lengths=[torch.tensor([-1, 6])]
    ),
    r"attends: expected 2 lists": lambda: segment_attention([Q, Q], [(K, V)], attends=[[0]]),
    r"attends\[0\]: .* in 0..0, got \[1\]": lambda: segment_attention(Q, [(K, V)], attends=[[1]]),
    r"attends\[0\]: expected at least one": lambda: segment_attention(Q, [(K, V)], attends=[[]]),
    r"window: .* got BlockWindow\(.* left=-1": lambda: segment_attention(Q, [(K, V)], window=BlockWindow(2, -1)),
    r"window: .* 5, got lengths \[4\]": lambda: segment_attention(Q[:, :4], [(K, V)], window=BlockWindow(2, 1)),
    r"attends: .* first source": lambda: segment_attention(Q, [(K, V)] * 2, window=BlockWindow(2, 1), attends=[[1]]),
    r"out: expected 1 view": lambda: segment_attention(Q, [(K, V)], out=[Q.clone()]),
    r"out\[0\]: .* overlaps q\[0\]": lambda: segment_attention(Q, [(K, V)], out=Q),
    r"out\[0\]: .* overlaps out\[1\]": lambda: segment_attention(
        [Q[:, :3], Q[:, 3:]], [(K, V)], out=[BUFFER[:, :3], BUFFER[:, 2:4]]
    ),
    "distinct elements": lambda: segment_attention(Q, [(K, V)], out=torch.zeros(1, 5, 3, 16).expand(2, 5, 3, 16)),
    r"backend: expected one of auto, torch": lambda: segment_attention(Q, [(K, V)], backend="cuda"),
    r"cannot take this call: kernels need an NV": lambda: segment_attention(Q, [(K, V)], backend="triton"),
    r"outputs, lses: expected sequences": lambda: merge_attention(Q, [K]),
    r"got 1 and 0": lambda: merge_attention([Q], []),
    r"outputs\[1\]: expected \[2, 5, 3, 16\]": lambda: merge_attention([Q, Q[:, :4]], [ROWS] * 2),
    r"operator: expected one of .*segment_attention.*, got linear_gelu": lambda: explain(linear_gelu, Q),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


def test_the_choice_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = explain(segment_attention, Q, [(K, V)])
    assert str(choice).startswith("torch: reference (kernels need an NVIDIA GPU")
    monkeypatch.setenv("SWIFTI2V_BACKEND", "torch")
    assert explain(segment_attention, Q, [(K, V)]).reason == "SWIFTI2V_BACKEND is 'torch'"
    monkeypatch.setenv("SWIFTI2V_BACKEND", "triton")  # a preference: what has no kernel still runs
    assert explain(segment_attention, Q, [(K, V)]).backend == "torch"
    monkeypatch.setenv("SWIFTI2V_BACKEND", "")  # as if it were not set
    assert explain(segment_attention, Q, [(K, V)]) == choice


def test_a_backend_can_be_asked_for_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes before the environment, whose unknown word is named in a compiled call too."""
    monkeypatch.setenv("SWIFTI2V_BACKEND", "cuda")
    compiled = torch.compile(lambda q, k, v: segment_attention(q, [(k, v)]), backend="eager")
    with pytest.raises(ValueError, match=r"^SWIFTI2V_BACKEND: expected one of auto, torch, triton, got 'cuda'$"):
        compiled(Q, K, V)
    with use_backend("torch"):
        assert default_backend() == "torch"
        with pytest.raises(ValueError, match="backend: expected one of auto, torch, triton, got 'cuda'"):
            use_backend("cuda").__enter__()
        assert default_backend() == "torch"


def test_a_card_older_than_the_kernels_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made from the tensors' metadata: these say that they are on a GPU, and hold nothing."""
    monkeypatch.setattr(target, "capability_of", lambda device: 75)
    with FakeTensorMode():
        q = torch.empty(1, 9, 2, 64, dtype=torch.float16, device="cuda")
        choice = explain(segment_attention, q, [(q, q)])
    assert str(choice) == "torch: reference (kernels exist for compute capability 8.0 and newer, this device has 7.5)"


STRIDES = st.sampled_from((0, 1, 2, 3, 4, 8, 12, 40))


@given(st.lists(st.tuples(STRIDES, st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_overlap_is_exact(axes: list[tuple[int, int, int]], start: int) -> None:
    """The answer is that of the sets of elements, for two views of one buffer with the same strides."""
    strides, first, second = zip(*axes, strict=True)
    buffer = torch.arange(600)
    a, b = buffer.as_strided(first, strides), buffer.as_strided(second, strides, start)
    shared = bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))
    assert overlapping(a, b) == overlapping(b, a) == shared
    assert self_overlapping(a) or len(set(a.flatten().tolist())) == a.numel()
    assert not overlapping(a, b.clone())
    assert not overlapping(a[:0], b)
