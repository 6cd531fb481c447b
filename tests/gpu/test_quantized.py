"""8-bit rows on hardware, at the widths and lengths of DiTs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import (
    QuantizedRows,
    dequantize_rows,
    explain,
    gated_residual_norm_modulate,
    norm_modulate,
    quantize_rows,
)
from tests.support.quantized_oracle import excess, ties, true_scales
from tests.support.tolerances import relative_error

pytestmark = pytest.mark.gpu
KINDS = [torch.int8, torch.float8_e4m3fn]
STORED = [*KINDS, torch.float8_e5m2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_synchronisation() -> Iterator[None]:
    """Switches this mode off after a test: while it is on, an operator that waits for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> torch.dtype:
    """A dtype of 8 bits that this device's kernels round to."""
    if request.param == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("rounding to float8 needs compute capability 8.9")
    return request.param


def without_waiting(call: Callable[[], Any]) -> Any:
    """Returns the result of a call after one that compiles, and checks that it neither allocates nor waits."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    result = call()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before
    return result


def rows(*shape: int, kind: torch.dtype) -> QuantizedRows:
    """Returns memory that a kernel has to write: NaN, or 127."""
    values = torch.full(shape, 127, dtype=torch.uint8, device="cuda").view(kind)
    return QuantizedRows(values, torch.full(shape[:-1], float("nan"), device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7, 10), (1, 3001, 1536), (2, 500, 8960), (1, 1000, 13824), (1, 64, 16384)])
def test_quantize_rows(shape: tuple[int, ...], dtype: torch.dtype, kind: torch.dtype) -> None:
    x = (3 * torch.randn(shape, device="cuda") + 1).to(dtype)
    out = rows(*shape, kind=kind)
    assert without_waiting(lambda: quantize_rows(x, kind, out=out)) is out
    assert relative_error(out.scales, true_scales(x, kind)) < 1e-7
    assert excess(*out, x) < 4e-7
    assert explain(quantize_rows, x, kind).implementation == "fused kernel"


def test_the_middle_between_two_codes_goes_to_the_even_one(kind: torch.dtype) -> None:
    x, expected = ties(kind)
    values, scales = quantize_rows(x.cuda(), kind)
    assert scales.tolist() == [1.0]
    assert torch.equal(values.double().cpu(), expected)


def test_rows_that_are_not_ordinary_are_those_of_the_cpu(kind: torch.dtype) -> None:
    x = torch.randn(9, 50)
    x[0], x[1], x[2, 7], x[3], x[7] = 0.0, 1e-38, 1e30, 3.4e38, 1e-45
    x[4, 3], x[5, 0], x[6, 49] = float("nan"), float("inf"), -float("inf")
    actual = QuantizedRows(*(part.cpu() for part in quantize_rows(x.cuda(), kind)))
    expected = quantize_rows(x, kind)
    known = ~expected.scales.isnan()
    assert torch.equal(actual.scales[known], expected.scales[known])
    assert torch.equal(actual.values[known].float(), expected.values[known].float())
    assert actual.scales[~known].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_every_code_is_decoded_bit_for_bit(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Every code is decoded bit for bit on every GPU, also where Triton has no float8."""
    values = torch.arange(256, dtype=torch.uint8).view(stored).expand(8, 256).contiguous()
    scales = torch.tensor([1.0, 0.37, -3e-5, 2e-39, 1e36, 0.0, float("inf"), float("nan")])
    expected = (values.float() * scales[:, None]).to(dtype)
    actual = dequantize_rows(values.cuda(), scales.cuda(), dtype=dtype, backend="triton").cpu()
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.view(bits)[~actual.isnan()], expected.view(bits)[~expected.isnan()])


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 300), (1536, 8960), (5120, 13824)], ids=str)
def test_dequantize_rows(shape: tuple[int, int], stored: torch.dtype) -> None:
    values = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
    values = values if stored == torch.int8 else (values / 32).to(stored)
    scales = torch.rand(shape[0], device="cuda")
    out = torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
    assert without_waiting(lambda: dequantize_rows(values, scales, out=out)) is out
    assert torch.equal(out, (values.float() * scales[:, None]).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [96, 3072, 5120])
@pytest.mark.parametrize("block_len", [1, 7, 700])
def test_quantised_norms(channels: int, block_len: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    """The stream's bits are those without quantisation, and codes are the nearest to the norm in float64."""
    x, update = torch.randn(2, 1, 5 * block_len, channels, device="cuda").to(dtype)
    shift, scale, gate = torch.randn(1, 2, 6, channels, device="cuda").unbind(2)[:3]
    block_map = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32, device="cuda")
    stream, out = x.clone(), rows(*x.shape, kind=kind)
    options = {"block_map": block_map, "quantize": kind, "out": out}
    gated_residual_norm_modulate(stream, update, gate, shift, scale, **options, inplace=True)
    stream.copy_(x)
    torch.cuda.set_sync_debug_mode("error")
    gated_residual_norm_modulate(stream, update, gate, shift, scale, **options, inplace=True)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(stream, gated_residual_norm_modulate(x, update, gate, block_map=block_map)[0])
    modulation = {"shift": shift.double(), "scale": scale.double(), "block_map": block_map}
    expected = norm_modulate(stream.double(), **modulation, backend="torch")
    assert relative_error(out.scales, true_scales(expected, kind)) < 1e-5
    assert excess(*out, expected) < 5e-3
    again = without_waiting(lambda: norm_modulate(stream, shift, scale, **options))
    assert again is out
    assert excess(*out, expected) < 5e-3


def test_beyond_32_bits() -> None:
    """1.4 million tokens of 1,536 channels are 2.15e9 elements."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    x = torch.randn(1_400_000, 1536, device="cuda", dtype=torch.bfloat16)
    found = quantize_rows(x, torch.int8)
    last = [0, 700_000, 1_399_999]
    picked = QuantizedRows(*(part[last] for part in found))
    assert excess(*picked, x[last]) < 4e-7
    y: Tensor = dequantize_rows(*found, out=x)
    assert torch.equal(y[last], dequantize_rows(*picked))
