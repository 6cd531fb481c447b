"""Triton's interpreter is repaired by the library itself, in the versions of Triton that were looked at."""

from __future__ import annotations

import sys

import pytest
import torch
import triton

from swifti2v_kernels import explain, segment_attention
from tests.support.tolerances import KERNEL, relative_error


def test_bfloat16_is_right_for_whoever_uses_the_library_alone() -> None:
    """Nothing but the library has repaired the interpreter of this process."""
    q, k, v = torch.randn(3, 1, 20, 2, 64, dtype=torch.bfloat16).unbind(0)
    expected = segment_attention(q.double(), [(k.double(), v.double())], backend="torch")
    assert relative_error(segment_attention(q, [(k, v)], backend="triton"), expected) < KERNEL["bfloat16"]
    assert not any(name.startswith("bench.") and "interpret" in name for name in sys.modules)


def test_other_versions_of_triton_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 5, 2, 64)
    assert str(explain(segment_attention, q, [(q, q)])) == "triton: portable (in Triton's interpreter)"
    monkeypatch.setattr(triton, "__version__", "3.10.1")
    expected = "torch: reference (kernels are interpreted by Triton 3.6 to 3.9, this is 3.10.1)"
    assert str(explain(segment_attention, q, [(q, q)])) == expected
