"""The 8-bit matmul against float64, by kernel and by torch, over ragged shapes, layouts, epilogues and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v_kernels import QuantizedRows, explain, scaled_linear
from swifti2v_kernels.linear.scaled_linear_kernel import ScaledConfig
from tests.support.quantized_oracle import multiplied
from tests.support.tolerances import KERNEL, relative_error

#: That of a large negative number in GELU, which is to be infinite.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
KINDS = [torch.float8_e4m3fn, torch.int8]
both = pytest.mark.parametrize("backend", ["triton", "torch"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows(count: int, channels: int, kind: torch.dtype, gap: int = 0) -> QuantizedRows:
    """Returns values over the whole range amid codes that would spoil every sum (NaN, -128), scales of both signs."""
    bytes_ = torch.full((count, channels + gap), 0x7F if kind != torch.int8 else -128, dtype=torch.int8)
    values = bytes_.view(kind)[:, :channels]
    whole = torch.randint(-127, 128, values.shape) if kind == torch.int8 else torch.randn(values.shape) * 60
    values.copy_(whole.clamp(-448, 448))
    return QuantizedRows(values, 0.02 * torch.randn(count))


def check(actual: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(actual).all()
    assert relative_error(actual, expected) < KERNEL[str(actual.dtype).removeprefix("torch.")]


@both
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "channels", "columns"),
    [
        (1, 16, 16),
        (16, 64, 32),  # one tile
        (17, 64, 32),
        (33, 80, 48),  # ragged in all
        (5, 192, 80),
        (150, 16, 64),  # ten tiles of rows: two groups
        (14, 37, 11),  # which has no kernel
    ],
)
def test_against_float64(tokens: int, channels: int, columns: int, kind: torch.dtype, backend: str) -> None:
    """Rows amid NaN or -128 give the float64 result.

    Every dtype of the result is tried, with and without bias, also of another dtype, and activation.
    """
    x, weight = rows(tokens, channels, kind, gap=16), rows(columns, channels, kind)
    biases = {None: None} | {dtype: torch.randn(columns).to(dtype) for dtype in DTYPES}
    calls: list[tuple[torch.dtype, torch.dtype | None, str | None]] = [
        (torch.bfloat16, torch.bfloat16, "gelu_tanh"),
        (torch.float16, None, None),
        (torch.float32, torch.float16, "gelu_tanh"),
        (torch.float32, torch.float32, None),
    ]
    for dtype, of_bias, activation in calls:
        options: dict[str, Any] = {"activation": activation, "dtype": dtype}
        options["backend"] = backend if channels != 37 else "auto"
        taken = "fused kernel" if options["backend"] == "triton" else "reference"
        assert explain(scaled_linear, x, weight, biases[of_bias], **options).implementation == taken
        actual = scaled_linear(x, weight, biases[of_bias], **options)
        assert actual.dtype == dtype
        check(actual, multiplied(x, weight, biases[of_bias], activation))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("block_m", "block_n", "block_k"), [(32, 16, 32), (16, 32, 128)])
def test_other_tiles_give_the_same(
    block_m: int, block_n: int, block_k: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = rows(40, 160, kind), rows(112, 160, kind), torch.randn(112)
    config = ScaledConfig(block_m, block_n, block_k, 4, 1)
    monkeypatch.setattr(ScaledConfig, "heuristic", classmethod(lambda cls, *args: config))
    check(scaled_linear(x, weight, bias, dtype=torch.float32), multiplied(x, weight, bias))


@both
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_leading_axes_views_and_out(kind: torch.dtype, backend: str) -> None:
    """Batches of tokens, a part of a buffer and every other scale work; nothing but ``out`` is written."""
    values, scales = rows(2 * 9, 96, kind, gap=32)
    table = torch.full((2, 9, 2), float("nan"))
    table[..., 0] = scales.view(2, 9)
    x = QuantizedRows(values.unflatten(0, (2, 9)), table[..., 0])
    weight, bias = rows(48, 96, kind), torch.randn(48)
    buffer = torch.full((4, 9, 48), float("nan"), dtype=torch.float16)
    out = buffer[1:3]
    options: dict[str, Any] = {"dtype": torch.float16, "backend": backend}
    assert scaled_linear(x, weight, bias, out=out, **options) is out
    check(out, multiplied(x, weight, bias))
    assert buffer[::3].isnan().all()
    part = QuantizedRows(x.values[1, 2:7], x.scales[1, 2:7])
    assert torch.equal(scaled_linear(part, weight, bias, **options), out[1, 2:7])
    none = scaled_linear(QuantizedRows(x.values[:0], x.scales[:0]), weight, backend=backend)
    assert (none.shape, none.dtype) == ((0, 9, 48), torch.bfloat16)


@both
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_extreme_scales(kind: torch.dtype, backend: str) -> None:
    """No row spoils another: zeros, tiny and huge ones lie beside each other and beside a row that is NaN."""
    x, weight = rows(20, 64, kind), rows(32, 64, kind)
    x.scales[:4] = torch.tensor([0.0, 1e-30, 1e30, float("nan")])
    weight.scales[:3] = torch.tensor([0.0, 1e-6, 1e3])
    actual, expected = scaled_linear(x, weight, dtype=torch.float32, backend=backend), multiplied(x, weight)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert actual[3].isnan().all()
    for i in (i for i in range(20) if i != 3):
        assert (actual[i] - expected[i]).abs().max() <= 2e-6 * expected[i].abs().max()


@both
def test_int8_sums_are_multiplied(backend: str) -> None:
    """The largest sum of int8 there is, less one, is exact, which float32 could not hold."""
    x = QuantizedRows(torch.full((2, 2064), -128, dtype=torch.int8), torch.ones(2))
    weight = QuantizedRows(torch.full((16, 2064), -128, dtype=torch.int8), torch.ones(16))
    weight.values[:, -1] = -127
    y = scaled_linear(x, weight, torch.full((16,), -float(2**25)), dtype=torch.float32, backend=backend)
    assert torch.equal(y, torch.full((2, 16), float(2064 * 2**14 - 128 - 2**25)))


def test_offsets_beyond_32_bits() -> None:
    """The last of 300 rows is 2.5e9 bytes after the first, in memory of which only their pages exist."""
    values = torch.empty(300 * 2**23, dtype=torch.int8).as_strided((300, 16), (2**23, 1)).random_(-127, 128)
    x, weight = QuantizedRows(values, torch.rand(300)), rows(16, 16, torch.int8)
    check(scaled_linear(x, weight, dtype=torch.float32, backend="triton"), multiplied(x, weight))


def test_gelu_of_large_values_is_finite() -> None:
    x = QuantizedRows(torch.full((2, 16), 127, dtype=torch.int8), torch.tensor([1e3, -1e3]))
    weight = QuantizedRows(torch.full((16, 16), 127, dtype=torch.int8), torch.ones(16))
    y = scaled_linear(x, weight, activation="gelu_tanh", dtype=torch.float32)
    assert torch.equal(y, torch.tensor([[127.0 * 127 * 16 * 1e3], [0.0]]).expand(2, 16))


def test_what_has_no_kernel_takes_the_reference() -> None:
    x, weight = rows(3, 32, torch.int8), rows(16, 32, torch.int8)
    far = QuantizedRows(torch.empty(2**24 + 32, dtype=torch.int8).as_strided((2, 32), (2**24, 1)), torch.ones(2))
    long, sixteen = (QuantizedRows(torch.zeros(n, 2**17, dtype=torch.int8), torch.ones(n)) for n in (1, 16))
    multiples = "the kernel takes multiples of 16 channels, columns and elements from row to row, got"
    wide = [part._replace(scales=part.scales.double()) for part in (x, weight)]
    for arguments, reason in (
        ((x, weight, torch.zeros(16, requires_grad=True)), "an input needs gradients"),
        ((rows(3, 24, torch.int8), rows(16, 24, torch.int8)), f"{multiples} 24, 16 and 24"),
        ((x, rows(17, 32, torch.int8)), f"{multiples} 32, 17 and 32"),
        ((rows(3, 32, torch.int8, gap=8), weight), f"{multiples} 32, 16 and 40"),
        ((far, weight), "the kernel takes up to 8388608 columns"),
        ((long, sixteen), "sums of int32 hold up to 131071 channels of int8, got 131072"),
        (wide, "kernels exist for float16, bfloat16 and float32, got torch.float64"),
    ):
        assert explain(scaled_linear, *arguments).reason.startswith(reason)
