"""The operators on hardware: every compiled case, and what cases cannot say of them.

That is bits that no cut changes, roundings of the hardware, and graphs. Shapes, layouts and offsets beyond 32 bits are
tried in ``tests/interpreter``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.operators.check import check_case, randomised
from bench.operators.discover import all_cases, cases_of
from swifti2v_kernels import (
    QuantizedRows,
    causal_conv3d,
    fold_upsample_weight,
    frames_out,
    quantize_rows,
    rms_norm_silu,
    scaled_linear,
    upsample_conv2d,
)
from swifti2v_kernels.common.case import Case
from tests.support.conv_oracle import check_pieces, check_tiles, scattered, weights
from tests.support.quantized_oracle import check_codes, check_odd_rows, check_ties, multiplied
from tests.support.tolerances import KERNEL, relative_error

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HEIGHT, WIDTH = 100, 180
KINDS = [torch.int8, torch.float8_e4m3fn]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: float32 results. Tensor cores that keep 14 bits of a sum of float8 are off by 1.2e-4 when it is moved to float32
#: every 128 channels, and by 1e-3 (1,536 channels) to 1.1e-2 (13,824) if it never is. int8 is exact up to the scales.
SUMS = {torch.float8_e4m3fn: 3e-4, torch.int8: KERNEL["float32"]}


@pytest.fixture(autouse=True)
def _no_synchronisation() -> Iterator[None]:
    """Lets operators wait for the device again after a test."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def needs(capability: int) -> None:
    """Skips a test on older GPUs, which take the reference."""
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < capability:
        pytest.skip(f"needs compute capability {capability / 10}")


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> torch.dtype:
    """A dtype of 8 bits that this device's kernels round to and multiply."""
    if request.param == torch.float8_e4m3fn:
        needs(89)
    return request.param


def parameters(columns: int, channels: int, kernel: tuple[int, ...]) -> list[Tensor]:
    """Returns weight, bias and norm weight."""
    found = (*weights(columns, channels, kernel, torch.bfloat16), torch.rand(columns) + 0.5)
    return [x.to(DEVICE, torch.bfloat16) for x in found]


def rows(count: int, channels: int, kind: torch.dtype, gap: int = 0) -> QuantizedRows:
    """Returns rows of different sizes, a part of a buffer whose other bytes are NaN, or -1."""
    made = quantize_rows(torch.randn(count, channels, device=DEVICE) * torch.rand(count, 1, device=DEVICE), kind)
    buffer = torch.full((count, channels + gap), -1, dtype=torch.int8, device=DEVICE).view(kind)
    buffer[:, :channels].copy_(made.values)
    return made._replace(values=buffer[:, :channels])


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_every_case_of_the_compile_report_is_right(case: Case) -> None:
    needs(case.least_capability)
    row = check_case(case, torch.device(DEVICE))
    assert row["status"] == "ok", row


@pytest.mark.parametrize("channels", [96, 192, 384])
def test_any_cut_in_time_gives_the_same_bits(channels: int) -> None:
    clip = torch.randn(1, 7, HEIGHT // 2, WIDTH // 2, channels, device=DEVICE).bfloat16()
    weight, bias, gamma = parameters(channels, channels, (3, 3, 3))
    options: dict[str, Any] = {"weight": weight, "bias": bias, "norm_weight": gamma, "backend": "triton"}
    for pieces in ((1,) * 7, (1, 4, 2), (3, 4)):
        check_pieces(clip, pieces, functools.partial(causal_conv3d, **options))


@pytest.mark.parametrize("channels", [96, 192, 384])
def test_any_cut_in_space_gives_the_same_bits(channels: int) -> None:
    frame = torch.randn(1, 1, HEIGHT, WIDTH, channels, device=DEVICE).bfloat16()
    weight, bias, gamma = parameters(channels, channels, (1, 3, 3))
    options: dict[str, Any] = {"norm_weight": gamma, "backend": "triton"}
    check_tiles(frame, weight, bias, (HEIGHT // 3,), (7, WIDTH // 2), **options)


def test_rows_are_rounded_as_on_the_cpu(kind: torch.dtype) -> None:
    """The middle between two codes goes to the even one, and rows that are not ordinary are those of the CPU."""
    check_ties(kind, DEVICE, "triton")
    check_odd_rows(kind, DEVICE, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [*KINDS, torch.float8_e5m2], ids=str)
def test_every_code_is_decoded_bit_for_bit(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Every code is decoded bit for bit on every GPU, also where Triton has no float8."""
    check_codes(stored, dtype, DEVICE, "triton")


@pytest.mark.parametrize(("channels", "columns"), [(1536, 8960), (3072, 3072), (13824, 5120), (1552, 48)])
def test_sums_of_8_bits_keep_their_precision(channels: int, columns: int, kind: torch.dtype) -> None:
    """Any number of tokens gives full tiles and ragged ones; what float8 loses in its sums shows in float32."""
    weight, bias = rows(columns, channels, kind), torch.randn(columns, device=DEVICE)
    for tokens in (1, 77, 2900):
        x = rows(tokens, channels, kind, gap=32)
        last = QuantizedRows(x.values[-64:], x.scales[-64:])
        out = scaled_linear(x, weight, bias, dtype=torch.float32, backend="triton")
        assert torch.isfinite(out).all()
        assert relative_error(out[-64:], multiplied(last, weight, bias)) < SUMS[kind]
        y = scaled_linear(x, weight, bias, activation="gelu_tanh", backend="triton")
        assert relative_error(y[-64:], multiplied(last, weight, bias, "gelu_tanh")) < KERNEL["bfloat16"]


def decoder() -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
    """Returns frames, and a piece of a decoder that makes others of them, some of them in place."""
    x, past = (scattered((1, 2, HEIGHT // 2, WIDTH // 2, 192), torch.bfloat16, device=DEVICE) for _ in range(2))
    (weight, bias, gamma), (head, head_bias, _) = parameters(192, 192, (3, 3, 3)), parameters(3, 192, (3, 3, 3))
    phases = fold_upsample_weight(weight[:, :, 1])

    def piece(x: Tensor, past: Tensor) -> list[Tensor]:
        y, z = causal_conv3d(x, weight, bias, past=past, residual=x, norm_weight=gamma)
        y = causal_conv3d(z, weight, bias, past=past, residual=y)
        big = upsample_conv2d(y, phases)
        rms_norm_silu(big, gamma, out=big)
        bytes_ = x.new_empty(1, 2, *big.shape[2:4], 3, dtype=torch.uint8)
        return [big, frames_out(big, head, head_bias, bytes_)]

    return [x, past], piece


@pytest.mark.parametrize("case", cases_of(quick=True), ids=lambda case: case.name)
def test_a_captured_call_takes_the_numbers_of_the_moment(case: Case) -> None:
    """Nothing waits for the device, and a captured call is replayed on other numbers to the same bits."""
    needs(case.least_capability)
    args, kwargs = randomised(case, torch.device(DEVICE))

    def call() -> list[Tensor]:
        return tree_leaves(case.operator(*args, **kwargs))

    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    call()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
    others = [x.mul(-0.5) if x.itemsize > 1 else x.clone() for x in given]
    results = []
    for run in (call, lambda: graph.replay() or captured):
        for x, numbers in zip(given, others, strict=True):  # which an operator may have overwritten
            x.copy_(numbers)
        results.append([y.double() for y in run()])
    assert all(map(torch.equal, *results))


def test_a_compiled_decoder_equals_the_eager_one() -> None:
    inputs, run = decoder()
    for a, b in zip(torch.compile(run, fullgraph=True)(*inputs), run(*inputs), strict=True):
        assert relative_error(a, b) < KERNEL["bfloat16"]
