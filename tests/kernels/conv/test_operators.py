"""A video autoencoder's operators on their torch path: defaults, folding, graphs, costs.

``tests/interpreter/conv`` compares the numbers of this path and of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swifti2v_kernels import (
    causal_conv3d,
    fold_upsample_weight,
    frames_out,
    pretend_gpu,
    rms_norm_silu,
    upsample_conv2d,
)
from swifti2v_kernels.conv.cases import CASES
from tests.support.conv_oracle import convolved, normed, upsampled, weights
from tests.support.tolerances import EXACT, OPERATOR, relative_error


def test_defaults_keep_the_size() -> None:
    x, (weight, _) = torch.randn(1, 2, 4, 5, 8), weights(8, 8, (3, 3, 5), torch.float32)
    assert relative_error(causal_conv3d(x, weight), convolved(x, weight, None)) < OPERATOR["float32"]
    frames = torch.zeros(1, 2, 4, 5, 3)
    assert frames_out(x, weights(3, 8, (1, 5, 3), torch.float32)[0], None, frames).any()


@pytest.mark.parametrize(("dtype", "claimed"), [(torch.bfloat16, 1.7e-3), (torch.float32, 4e-8)], ids=str)
def test_folding_costs_what_its_file_says(dtype: torch.dtype, claimed: float) -> None:
    """Folded weights cost what the file says: sums rounded once, everything else in float64."""
    weight, x = torch.randn(192, 192, 3, 3).to(dtype), torch.randn(1, 1, 16, 16, 192).double()
    expected = upsampled(x, weight, None)
    moved = relative_error(upsample_conv2d(x, fold_upsample_weight(weight).double()), expected)
    assert claimed / 2 < moved < claimed
    assert moved < 1.5 * relative_error(expected.to(dtype), expected)  # as much as the result's own rounding


def test_gradients_of_a_pixel_of_zeros_are_not_nan() -> None:
    x, gamma = torch.randn(1, 1, 2, 3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x[:, :, 0, 0] = 0
    x.requires_grad_()
    actual, expected = (torch.autograd.grad(f(x, gamma).sum(), x)[0] for f in (rms_norm_silu, normed))
    assert relative_error(actual[:, :, 0, :1], expected[:, :, 0, :1]) < EXACT
    assert relative_error(actual[:, :, :, 1:], expected[:, :, :, 1:]) < EXACT


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.")
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, ["causal_conv3d"]), (torch.float32, ["rms_norm_silu"])],  # after cuDNN's sums
    ids=str,
)
def test_the_choice_of_a_gpu_is_made_while_tracing(dtype: torch.dtype, expected: list[str]) -> None:
    """Tensors without contents suffice: the table is read, and the kernels' operators stand in the one graph."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    x, (weight, _), gamma = torch.empty(1, 2, 4, 5, 16), weights(16, 16, (3, 3, 3), dtype), torch.empty(16)
    x, weight, gamma = (tensor.to("meta", dtype) for tensor in (x, weight, gamma))
    torch._dynamo.reset()
    with pretend_gpu(90):
        compiled = torch.compile(causal_conv3d, fullgraph=True, backend=backend)
        sums, normed = compiled(x, weight, gamma, residual=x, norm_weight=gamma, past=x[:, :1])
    assert sums.shape == normed.shape == x.shape
    (graph,) = graphs
    assert [name.split(".")[1] for name in graph if name.startswith("swifti2v.")] == expected


def test_the_least_costs_of_cases_are_those_counted_by_hand() -> None:
    costs = {case.name: case.real.cost for case in CASES if case.real is not None}
    pixels, half = 4 * 1408 * 2560, 4 * 704 * 1280
    full = costs["causal_conv3d C96 residual norm"]
    assert full.flops == 2 * pixels * 96 * 96 * 27
    assert (full.bytes_read, full.bytes_written) == (2 * (2 * 96 * pixels + 27 * 96 * 96), 2 * 2 * 96 * pixels)
    big = costs["upsample_conv2d C192 to C96 norm"]
    assert big.flops == 2 * pixels * 192 * 96 * 4
    assert (big.bytes_read, big.bytes_written) == (2 * (192 * half + 16 * 96 * 192), 2 * 2 * 96 * pixels)
    head = costs["frames_out C256 patches of 2"]
    assert head.flops == 2 * half * 256 * 12 * 27
    assert (head.bytes_read, head.bytes_written) == (2 * (256 * half + 12 * 256 * 27), 12 * half)


def test_torch_counts_their_operations() -> None:
    """torch counts the same operations of tensors without contents, as the kernels' or as cuDNN's."""

    def counted(call: Callable[..., Any], *args: Any, **options: Any) -> int:
        with FlopCounterMode(display=False) as counter, pretend_gpu(90):
            call(*args, **options)
        return counter.get_total_flops()

    for dtype in (torch.bfloat16, torch.float32):
        with torch.device("meta"):
            x, weight = (torch.empty(s, dtype=dtype) for s in ((2, 4, 10, 12, 96), (384, 3, 3, 3, 96)))
            gamma, out = torch.empty(384, dtype=dtype), torch.empty(2, 4, 10, 12, 3, dtype=torch.uint8)
            phases = torch.empty(4, 384, 2, 2, 96, dtype=dtype)
        weight = weight.permute(0, 4, 1, 2, 3)
        # The norm of so many channels is an operator of its own, without products.
        options = {"stride": (2, 1, 1), "padding": (0, 0, 1, 1), "norm_weight": gamma, "keep_sum": False}
        assert counted(causal_conv3d, x, weight, **options) == 2 * (2 * 2 * 8 * 12) * 96 * 384 * 27
        assert counted(frames_out, x, weight[:3], None, out) == 2 * (2 * 4 * 120) * 96 * 3 * 27
        if dtype == torch.bfloat16:  # cuDNN's paddings are more pixels of each phase
            assert counted(upsample_conv2d, x, phases, padding=(0, 1, 1, 1)) == 2 * (2 * 4 * 19 * 24) * 96 * 384 * 4
