"""Out-of-bounds accesses and races of the kernel of RMSNorm with RoPE (see conftest.py).

Tensors are exactly as long as what they hold: one token or channel more would be out of bounds.
"""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels import rope_3d
from swifti2v_kernels.norm.qk_norm_rope import RopeCall, norm_rope_reference
from swifti2v_kernels.norm.qk_norm_rope_kernel import launch_norm_rope
from tests.support.tolerances import OPERATOR, relative_error


@pytest.mark.parametrize(("heads", "head_dim", "interleaved"), [(3, 24, True), (2, 10, False)])
def test_norm_rope_stays_inside(heads: int, head_dim: int, interleaved: bool) -> None:
    """q and k of two lengths without rotation, and both rotated in place within a fused buffer, stay inside."""
    width, rope = heads * head_dim, rope_3d([5, 0], 2, 3, head_dim)
    qkv = torch.randn(2, 12, 3 * width).to("cuda", torch.float16)
    q, k, _ = qkv.chunk(3, dim=2)
    weight = torch.rand(width).to("cuda", torch.float16)
    layout = "interleaved" if interleaved else "half"
    options = (heads, 0, 1e-6, interleaved)
    text, outputs = (
        k[:, :5].contiguous(),
        [torch.empty(2, n, width, device="cuda", dtype=torch.float16) for n in (12, 5)],
    )
    launch_norm_rope(RopeCall(q, text, weight, weight, [], *options, *outputs))
    for x, out in zip((q, text), outputs, strict=True):
        expected = norm_rope_reference(x, weight, None, heads, 0, 1e-6, layout)
        assert relative_error(out.unflatten(2, (heads, -1)), expected) < OPERATOR["float16"]
    tables = tuple(table.to("cuda") for table in rope)
    expected = [norm_rope_reference(x, weight, rope._make(tables), heads, 0, 1e-6, layout) for x in (q, k)]
    launch_norm_rope(RopeCall(q, k, weight, weight, tables, *options, q, k))
    for x, wanted in zip((q, k), expected, strict=True):
        assert relative_error(x.unflatten(2, (heads, -1)), wanted) < 2 * OPERATOR["float16"]
