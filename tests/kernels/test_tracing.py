"""Functions that are constant when traced are marked as torch marks them."""

from __future__ import annotations

import torch

from swifti2v_kernels.common.tracing import constant_when_traced


def test_the_mark_is_torch_s_own() -> None:
    """The mark is private to torch: should a release change it, this fails before a graph breaks."""

    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert constant_when_traced(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}
