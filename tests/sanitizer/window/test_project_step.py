"""Out-of-bounds accesses and races of the fused norms and of RMSNorm with RoPE; see test_memory.py.

Tensors are exactly as long as what they hold: one token or channel more would be out of bounds.
"""

from __future__ import annotations

import pytest
import torch

from swifti2v_kernels import rope_3d
from swifti2v_kernels.norm.adaln import gated_residual_reference, norm_modulate_reference
from swifti2v_kernels.norm.adaln_kernel import LAYER, RMS, launch_adaln
from swifti2v_kernels.norm.qk_norm_rope import norm_rope_reference
from swifti2v_kernels.norm.qk_norm_rope_kernel import launch_norm_rope
from tests.support.tolerances import OPERATOR, relative_error


@pytest.mark.parametrize(("block_len", "channels"), [(5, 96), (1, 10)])
def test_adaln_stays_inside(block_len: int, channels: int) -> None:
    x, update = torch.randn(2, 2, 3 * block_len, channels).to("cuda", torch.bfloat16)
    table = torch.randn(2, 2, 3, channels).to("cuda")
    gate, shift, scale = table.unbind(2)
    weight, bias = torch.randn(2, channels).to("cuda")
    block_map = torch.tensor([1, 0, 1], dtype=torch.int32).to("cuda")
    x_out, y_out = torch.empty_like(x), torch.empty_like(x)
    launch_adaln(x, update, gate, shift, scale, weight, bias, block_map, LAYER, 1e-6, x_out, y_out)
    expected = gated_residual_reference(x, update, gate, block_map)
    assert relative_error(x_out, expected) < OPERATOR["bfloat16"]
    expected = norm_modulate_reference(expected, shift, scale, weight, bias, block_map, "layer", 1e-6)
    assert relative_error(y_out, expected) < OPERATOR["bfloat16"]
    in_place = x.clone()
    launch_adaln(in_place, None, None, shift, scale, None, None, block_map, RMS, 1e-6, None, in_place)
    expected = norm_modulate_reference(x, shift, scale, None, None, block_map, "rms", 1e-6)
    assert relative_error(in_place, expected) < OPERATOR["bfloat16"]


def test_rows_that_are_not_there_are_not_read() -> None:
    x, y = torch.randn(1, 6, 96).to("cuda"), torch.empty(1, 6, 96, device="cuda")
    shift, scale = torch.randn(2, 1, 2, 96).to("cuda")
    block_map = torch.tensor([1, 2**30, -1], dtype=torch.int32).to("cuda")
    launch_adaln(x, None, None, shift, scale, None, None, block_map, LAYER, 1e-6, None, y)
    assert y[:, 2:].isnan().all()
    assert not y[:, :2].isnan().any()


@pytest.mark.parametrize(("heads", "head_dim", "interleaved"), [(3, 24, True), (2, 10, False)])
def test_norm_rope_stays_inside(heads: int, head_dim: int, interleaved: bool) -> None:
    """q and k of two lengths without rotation, and both rotated in place within a fused buffer, stay inside."""
    width, rope = heads * head_dim, rope_3d([5, 0], 2, 3, head_dim)
    qkv = torch.randn(2, 12, 3 * width).to("cuda", torch.float16)
    q, k, _ = qkv.chunk(3, dim=2)
    weight = torch.rand(width).to("cuda", torch.float16)
    layout = "interleaved" if interleaved else "half"
    options = {"heads": heads, "eps": 1e-6, "interleaved": interleaved, "start": 0}
    text, outputs = (
        k[:, :5].contiguous(),
        [torch.empty(2, n, width, device="cuda", dtype=torch.float16) for n in (12, 5)],
    )
    launch_norm_rope(q, text, weight, weight, None, *outputs, **options)
    for x, out in zip((q, text), outputs, strict=True):
        expected = norm_rope_reference(x, weight, None, heads, 0, 1e-6, layout)
        assert relative_error(out.unflatten(2, (heads, -1)), expected) < OPERATOR["float16"]
    tables = tuple(table.to("cuda") for table in rope)
    expected = [norm_rope_reference(x, weight, rope._make(tables), heads, 0, 1e-6, layout) for x in (q, k)]
    launch_norm_rope(q, k, weight, weight, tables, q, k, **options)
    for x, wanted in zip((q, k), expected, strict=True):
        assert relative_error(x.unflatten(2, (heads, -1)), wanted) < 2 * OPERATOR["float16"]
