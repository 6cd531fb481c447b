"""Out-of-bounds accesses and races of the kernels of adaptive norms and of RMSNorm with RoPE (see conftest.py).

Tensors are exactly as long as what they hold: one token or channel more would be out of bounds.
"""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels import gated_residual, norm_modulate, rope_3d
from swifti2v_kernels.norm.adaln import AdalnCall
from swifti2v_kernels.norm.adaln_kernel import launch as launch_adaln
from swifti2v_kernels.norm.qk_norm_rope import RopeCall, norm_rope_reference
from swifti2v_kernels.norm.qk_norm_rope_kernel import launch as launch_norm_rope
from tests.support.tolerances import OPERATOR, relative_error


@pytest.mark.parametrize(("block_len", "channels"), [(5, 96), (1, 10)])
def test_adaln_stays_inside(block_len: int, channels: int) -> None:
    x, update = torch.randn(2, 2, 3 * block_len, channels).to("cuda", torch.bfloat16)
    gate, shift, scale = torch.randn(2, 2, 3, channels).to("cuda").unbind(2)
    weight, bias = torch.randn(2, channels).to("cuda")
    block_map = torch.tensor([1, 0, 1], dtype=torch.int32).to("cuda")
    rows = {"block_map": block_map, "backend": "torch"}
    x_out, y_out = torch.empty_like(x), torch.empty_like(x)
    launch_adaln(AdalnCall(x, update, gate, shift, scale, weight, bias, block_map, "layer", 1e-6, x_out, y_out))
    expected = gated_residual(x, update, gate, **rows)
    assert relative_error(x_out, expected) < OPERATOR["bfloat16"]
    expected = norm_modulate(expected, shift, scale, weight=weight, bias=bias, **rows)
    assert relative_error(y_out, expected) < OPERATOR["bfloat16"]
    expected = norm_modulate(x, shift, scale, norm="rms", **rows)
    launch_adaln(AdalnCall(x, None, None, shift, scale, None, None, block_map, "rms", 1e-6, None, x))
    assert relative_error(x, expected) < OPERATOR["bfloat16"]


@pytest.mark.parametrize(("heads", "head_dim", "layout"), [(3, 24, "interleaved"), (2, 10, "half")])
def test_norm_rope_stays_inside(heads: int, head_dim: int, layout: str) -> None:
    """q and k of two lengths without rotation, and both rotated in place within a fused buffer, stay inside."""
    width, rope = heads * head_dim, rope_3d([5, 0], 2, 3, head_dim, device="cuda")
    q, k, _ = torch.randn(2, 12, 3 * width).to("cuda", torch.float16).chunk(3, dim=2)
    weight, text = torch.rand(width).to("cuda", torch.float16), k[:, :5].contiguous()
    outputs = [torch.empty(2, n, width, device="cuda", dtype=torch.float16) for n in (12, 5)]
    for tables, inputs, targets in ((None, (q, text), outputs), (rope, (q, k), [q, k])):
        expected = [norm_rope_reference(x, weight, tables, heads, 0, 1e-6, layout) for x in inputs]
        launch_norm_rope(RopeCall(inputs, [weight] * 2, tables or (), heads, 0, 1e-6, layout, targets))
        for actual, wanted in zip(targets, expected, strict=True):
            assert relative_error(actual.unflatten(2, (heads, -1)), wanted) < 2 * OPERATOR["float16"]
