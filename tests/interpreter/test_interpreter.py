"""Triton's interpreter is repaired by the library itself, in the versions of Triton that were looked at."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import triton

from swifti2v_kernels import explain, segment_attention

ALONE = """
import torch
from swifti2v_kernels import segment_attention
q, k, v = torch.randn(3, 1, 20, 2, 64, dtype=torch.bfloat16).unbind(0)
expected = segment_attention(q.double(), [(k.double(), v.double())], backend="torch")
error = (segment_attention(q, [(k, v)], backend="triton") - expected).norm() / expected.norm()
assert error < 6e-3, error
"""


def test_bfloat16_is_right_for_whoever_uses_the_library_alone() -> None:
    subprocess.run([sys.executable, "-c", ALONE], check=True)


def test_other_versions_of_triton_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 5, 2, 64)
    assert explain(segment_attention, q, [(q, q)]).backend == "triton"
    monkeypatch.setattr(triton, "__version__", "3.10.1")
    expected = "torch: reference (kernels are interpreted by Triton 3.6 to 3.9, this is 3.10.1)"
    assert str(explain(segment_attention, q, [(q, q)])) == expected
