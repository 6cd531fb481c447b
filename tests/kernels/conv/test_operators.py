"""The contract of a video autoencoder's operators on their torch path: gradients, folding, graphs, costs.

``tests/interpreter/conv`` compares the numbers of this path and of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swifti2v_kernels import (
    causal_conv3d,
    explain,
    fold_upsample_weight,
    frames_out,
    pretend_gpu,
    rms_norm_silu,
    upsample_conv2d,
)
from swifti2v_kernels.conv.causal_conv3d import cost as conv_cost
from swifti2v_kernels.conv.frames_out import cost as frames_cost
from swifti2v_kernels.conv.upsample_conv2d import cost as upsample_cost
from swifti2v_kernels.norm.rms_norm_silu import cost as norm_cost
from tests.support.conv_oracle import convolved, normed, upsampled, weights
from tests.support.tolerances import EXACT, OPERATOR, relative_error

#: Who computes: the sums of 2D convolutions that stand for the CPU, and what a GPU would be given.
PATHS: dict[str, Callable[[], AbstractContextManager[object]]] = {"cpu": nullcontext, "cudnn": lambda: pretend_gpu(90)}


def test_defaults_keep_the_size() -> None:
    x, (weight, _) = torch.randn(1, 2, 4, 5, 8), weights(8, 8, (3, 3, 5), torch.float32)
    assert relative_error(causal_conv3d(x, weight), convolved(x, weight, None)) < OPERATOR["float32"]
    frames = torch.zeros(1, 2, 4, 5, 3)
    assert frames_out(x, weights(3, 8, (1, 5, 3), torch.float32)[0], None, frames).any()


def test_phases_share_out_the_nine_taps() -> None:
    weight = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    phases = fold_upsample_weight(weight)
    assert phases.shape == (4, 8, 2, 2, 6)
    assert relative_error(phases.sum((2, 3)), weight.sum((2, 3)).expand(4, 8, 6)) < EXACT
    # Even rows: one row of taps above, two on the pixel's own; odd rows: two and one below. Columns likewise.
    assert torch.equal(phases[0, :, 0, 0], weight[:, :, 0, 0])
    assert torch.equal(phases[1, :, 0, 1], weight[:, :, 0, 2])
    assert torch.equal(phases[0, :, 1, 0], weight[:, :, 1, 0] + weight[:, :, 2, 0])
    assert torch.equal(phases[2, :, 1, 0], weight[:, :, 2, 0])
    assert torch.equal(phases[2, :, 0, 0], weight[:, :, 0, 0] + weight[:, :, 1, 0])
    assert relative_error(phases[3, :, 0, 0], weight[:, :, :2, :2].sum((2, 3))) < EXACT


@pytest.mark.parametrize(("dtype", "claimed"), [(torch.bfloat16, 1.7e-3), (torch.float32, 4e-8)], ids=str)
def test_folding_costs_what_its_file_says(dtype: torch.dtype, claimed: float) -> None:
    """Folded weights cost what the file says: sums rounded once, everything else in float64."""
    weight, x = torch.randn(192, 192, 3, 3).to(dtype), torch.randn(1, 1, 16, 16, 192).double()
    expected = upsampled(x, weight, None)
    moved = relative_error(upsample_conv2d(x, fold_upsample_weight(weight).double()), expected)
    assert claimed / 2 < moved < claimed
    assert moved < 1.5 * relative_error(expected.to(dtype), expected)  # as much as the result's own rounding


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_the_formula(path: str) -> None:
    x, past, residual = double(1, 4, 5, 4, 3), double(1, 2, 5, 4, 3), double(1, 2, 3, 4, 5)
    weight, bias = weights(5, 3, (3, 3, 3), torch.float64)
    options: dict[str, Any] = {"stride": (2, 2, 1), "padding": (1, 1, 2, 0)}
    gamma = double(5)
    inputs = (x, past, residual, weight.requires_grad_(), bias.requires_grad_(), gamma)
    with PATHS[path]():
        y, z = causal_conv3d(
            x, weight, bias, past=past, residual=residual, norm_weight=gamma, **options, backend="torch"
        )
    a, b = torch.randn_like(y), torch.randn_like(z)
    total = convolved(x, weight, bias, past, residual=residual, **options)
    expected = torch.autograd.grad((total, normed(total, gamma)), inputs, (a, b))
    for actual, wanted in zip(torch.autograd.grad((y, z), inputs, (a, b)), expected, strict=True):
        assert relative_error(actual, wanted) < EXACT
    assert "gradients" in explain(causal_conv3d, x, weight).reason


@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_upsampling_are_those_of_the_formula(path: str) -> None:
    """Gradients pass through the folding too, up to the weight that a model holds."""
    x, weight, bias, gamma = double(1, 2, 3, 2, 3), double(5, 3, 3, 3), double(5), double(5)
    inputs, padding = (x, weight, bias, gamma), (1, 0, -1, 1)
    with PATHS[path]():
        phases = fold_upsample_weight(weight)
        y, z = upsample_conv2d(x, phases, bias, padding=padding, norm_weight=gamma, backend="torch")
    a, b = torch.randn_like(y), torch.randn_like(z)
    total = upsampled(x, weight, bias, padding)
    expected = torch.autograd.grad((total, normed(total, gamma)), inputs, (a, b))
    for actual, wanted in zip(torch.autograd.grad((y, z), inputs, (a, b)), expected, strict=True):
        assert relative_error(actual, wanted) < EXACT
    assert "gradients" in explain(upsample_conv2d, x, fold_upsample_weight(weight)).reason


def test_gradients_of_a_pixel_of_zeros_are_not_nan() -> None:
    x, gamma = torch.randn(1, 1, 2, 3, 4, dtype=torch.float64), double(4)
    x[:, :, 0, 0] = 0
    x.requires_grad_()
    actual, expected = (torch.autograd.grad(f(x, gamma).sum(), x)[0] for f in (rms_norm_silu, normed))
    assert relative_error(actual[:, :, 0, :1], expected[:, :, 0, :1]) < EXACT
    assert relative_error(actual[:, :, :, 1:], expected[:, :, :, 1:]) < EXACT


def modules(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Returns a model of someone else's that calls every operator, with history, halo, residual and norms."""
    (weight, bias), gamma = weights(16, 16, (3, 3, 3), dtype), torch.rand(16).to(dtype)
    phases = fold_upsample_weight(weight[:, :, 0]).to(device)
    head = weight[:3].contiguous(memory_format=torch.channels_last_3d).to(device)
    weight, bias, gamma = weight.to(device), bias.to(device), gamma.to(device)

    def foreign(x: Tensor, frames: Tensor) -> list[Tensor]:
        y, z = causal_conv3d(x + 1, weight, bias, residual=x, norm_weight=gamma, past=x[:, :1])
        z = causal_conv3d(z[:, :, 1:], weight, padding=(0, 1, 1, 1), norm_weight=gamma, keep_sum=False)
        big = upsample_conv2d(z, phases, bias)
        rms_norm_silu(big, gamma, out=big)
        frames_out(big, head, None, frames)
        return [y, big, frames + 1]

    return foreign


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.")
def test_the_choice_of_a_gpu_is_made_while_tracing() -> None:
    """Tensors without contents suffice: the table is read, and the kernels' operators stand in the one graph."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def compiled(dtype: torch.dtype) -> list[str]:
        x, frames = torch.empty(1, 2, 4, 5, 16, dtype=dtype, device="meta"), torch.empty(1, 2, 4, 10, 3, device="meta")
        results = torch.compile(modules(dtype, "meta"), fullgraph=True, backend=backend)(x, frames)
        assert [tuple(y.shape[2:]) for y in results] == [(4, 5, 16), (4, 10, 16), (4, 10, 3)]
        return graphs[-1]

    torch._dynamo.reset()
    with pretend_gpu(90):
        kernels = [name.split(".")[1] for name in compiled(torch.bfloat16) if name.startswith("swifti2v.")]
        assert kernels == ["causal_conv3d", "causal_conv3d", "upsample_conv2d", "rms_norm_silu", "frames_out"]
        kernels = [name.split(".")[1] for name in compiled(torch.float32) if name.startswith("swifti2v.")]
        # cuDNN's sums, and the norms after two of them by their own kernel.
        assert kernels == ["rms_norm_silu"] * 3
    assert len(graphs) == 2


def test_costs_count_what_must_move() -> None:
    plain, full = conv_cost(1000, 96, 192, 27), conv_cost(1000, 96, 192, 27, residual=True, results=2)
    assert plain.flops == full.flops == 2 * 1000 * 96 * 192 * 27
    assert plain.bytes_read == (1000 * 96 + 96 * 192 * 27) * 2
    assert plain.bytes_written == 1000 * 192 * 2
    assert full.bytes_read == plain.bytes_read + plain.bytes_written
    assert full.bytes_written == 2 * plain.bytes_written
    big = upsample_cost(4000, 192, 96, results=2, itemsize=4)
    assert big.flops == 2 * 4000 * 192 * 96 * 4
    assert big.bytes_read == (1000 * 192 + 4 * 96 * 4 * 192) * 4
    assert big.bytes_written == 2 * 4000 * 96 * 4
    assert upsample_cost(4000, 192, 96, residual=True).bytes_read == (1000 * 192 + 4000 * 96 + 16 * 96 * 192) * 2
    head = frames_cost(1000, 256, 27, 2)
    assert head.flops == 2 * 1000 * 256 * 12 * 27
    assert head.bytes_read == (1000 * 256 + 12 * 256 * 27) * 2
    assert head.bytes_written == 4000 * 3
    norm = norm_cost(1000, 384)
    assert norm.flops == 8 * 384_000
    assert norm.bytes_read == norm.bytes_written == 768_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_counts_their_operations(dtype: torch.dtype) -> None:
    """torch counts operations of tensors without contents as on a GPU: by the kernels in 16 bits, by cuDNN in 32."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def counted(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    x, weight = empty(2, 4, 10, 12, 96), empty(160, 3, 3, 3, 96).permute(0, 4, 1, 2, 3)
    gamma, wide, gammas = empty(160), empty(384, 1, 3, 3, 96).permute(0, 4, 1, 2, 3), empty(384)
    products = 96 * 160 * 27
    with pretend_gpu(90):
        assert counted(lambda: causal_conv3d(x, weight, past=x[:, :2])) == 2 * (2 * 4 * 120) * products
        options: dict[str, Any] = {"stride": (2, 1, 1), "padding": (0, 0, 1, 1), "norm_weight": gamma}
        assert counted(lambda: causal_conv3d(x, weight, keep_sum=False, **options)) == 2 * (2 * 2 * 8 * 12) * products
        # The norm of so many channels is an operator of its own, without products.
        assert counted(lambda: causal_conv3d(x, wide, norm_weight=gammas)) == 2 * (2 * 4 * 120) * 96 * 384 * 9
        y, z = causal_conv3d(x, wide, norm_weight=gammas, keep_sum=True)
        assert y.shape == z.shape == (2, 4, 10, 12, 384)
        out = empty(2, 4, 10, 12, 3, dtype=torch.uint8)
        head = weight[:3]
        assert counted(lambda: frames_out(x, head, None, out)) == 2 * (2 * 4 * 120) * 96 * 3 * 27
        if dtype == torch.bfloat16:  # cuDNN's paddings are more pixels of each phase
            phases = empty(4, 160, 2, 2, 96)
            expected = 2 * (2 * 4 * 19 * 24) * 96 * 160 * 4
            assert counted(lambda: upsample_conv2d(x, phases, padding=(0, 1, 1, 1), norm_weight=gamma)) == expected
