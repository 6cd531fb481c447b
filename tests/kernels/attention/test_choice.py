"""The dense calls that torch's own attention may take: those of which every row of every head is aligned."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v_kernels.attention import choice
from swifti2v_kernels.attention.arguments import aligned, check_call
from swifti2v_kernels.attention.choice import choose_kernel
from swifti2v_kernels.common import configs
from tests.support.attention_oracle import cat_attention
from tests.support.tolerances import OPERATOR, relative_error

#: Buffers start at a multiple of at least 64 bytes.
BUFFER = torch.zeros(1 << 16, dtype=torch.float32)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; the choice reads no more than its metadata and its address."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


def rows_aligned(x: Tensor) -> bool:
    """Returns whether each row begins at a multiple of 16 bytes, looked at one by one."""
    return all(x[i].data_ptr() % 16 == 0 for i in itertools.product(*map(range, x.shape[:3])))


def view(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Tensor:
    return BUFFER.view(dtype).as_strided(shape, strides, offset)


@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    strides=st.tuples(*[st.sampled_from((1, 2, 4, 6, 8, 12, 16, 100, 128, 132, 512)) for _ in range(3)]),
    offset=st.sampled_from((0, 0, 0, 1, 2, 3, 4, 8, 12, 16)),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_views_are_taken_exactly_where_all_of_their_rows_are_aligned(
    dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    x = view(dtype, (*sizes, 8), (*strides, 1), offset)
    assert aligned(x) == rows_aligned(x)


@pytest.mark.parametrize("fastest", ["sdpa-cudnn", "sdpa-flash", "swifti2v", None])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_torch_s_attention_is_never_chosen_for_views_that_are_not_aligned(
    capability: int, fastest: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views that are not aligned, q, k and v in turn, never take torch's attention.

    It does not matter what the table says is fastest; an aligned call takes that.
    """
    monkeypatch.setattr(choice, "capability_of", lambda device: capability)
    entries: list[dict[str, Any]] = []
    if fastest is not None:
        seconds = {"swifti2v": 2.0, "sdpa-cudnn": 2.0, "sdpa-flash": 2.0, fastest: 1.0}
        entries = [{"capability": capability, "card": "card", "dtype": "bfloat16", "head_dim": 128, "tokens": 9,
                    "seconds": seconds}]  # fmt: skip
    monkeypatch.setattr(configs, "load_table", lambda name: entries)

    def chosen(*views: Tensor) -> str:
        q, k, v = (x.as_subclass(OnGpu) for x in views)
        return choose_kernel(check_call(q, [(k, v)]), False)[0]

    good = view(torch.bfloat16, (2, 9, 3, 128), (9 * 384, 384, 128, 1))
    untaken = {"hopper", "portable"}
    usual = fastest or ("sdpa-cudnn" if capability >= 90 else "sdpa-flash")
    assert chosen(good, good, good) in (untaken if usual == "swifti2v" else {usual})
    assert choose_kernel(check_call(good, [(good, good)]), False)[0] in untaken  # on a CPU
    for bad in (
        view(torch.bfloat16, (2, 9, 3, 128), (9 * 384, 384, 128, 1), 1),
        view(torch.bfloat16, (2, 9, 3, 128), (9 * 388, 388, 128, 1)),
        view(torch.bfloat16, (2, 9, 3, 128), (9 * 420, 420, 140, 1)),
    ):
        for i in range(3):
            assert chosen(*[bad if i == j else good for j in range(3)]) in untaken


def test_torch_s_attention_computes_a_dense_call() -> None:
    q, k, v = torch.randn(3, 2, 7, 3, 16).unbind(0)
    for name in ("sdpa-cudnn", "sdpa-flash"):
        out = choice.sdpa(name, q, k, v, 0.3)
        assert relative_error(out, cat_attention(q, [(k, v)], scale=0.3)[0]) < OPERATOR["float32"]
