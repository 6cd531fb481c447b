"""Rows of 8 bits are made and read, by kernels and by torch, as float64 and all codes say."""

from __future__ import annotations

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
from swifti2v_kernels.norm.adaln import AdalnCall
from swifti2v_kernels.norm.adaln_kernel import launch as launch_adaln
from tests.support.quantized_oracle import check_codes, check_odd_rows, check_ties, excess, true_scales
from tests.support.tolerances import relative_error

KINDS = [torch.float8_e4m3fn, torch.int8]
STORED = [*KINDS, torch.float8_e5m2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
both = pytest.mark.parametrize("backend", ["triton", "torch"])
#: A quotient differs from the exact one by float32's rounding, so a value is no farther off than the nearest by more.
LAST_BIT = 4e-7


def inside(values: Tensor) -> Tensor:
    """Returns the same rows as a view of a larger buffer of NaN."""
    buffer = torch.full((len(values), values.shape[1] + 2, values.shape[2] + 8), float("nan")).to(values.dtype)
    view = buffer[:, 1:-1, 8:]
    view.copy_(values)
    return view


@both
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (9, 96), (5, 300), (2, 1536), (1, 5120)], ids=str)
def test_rows_are_rounded_to_the_nearest_codes(
    shape: tuple[int, int], dtype: torch.dtype, kind: torch.dtype, backend: str
) -> None:
    x = inside((3 * torch.randn(1, *shape) + 1).to(dtype))
    out = QuantizedRows(inside(torch.zeros(1, *shape).to(kind)), torch.full((1, 2 * shape[0]), -1.0)[:, ::2])
    around = out.values._base.view(torch.uint8).clone()
    assert quantize_rows(x, kind, out=out, backend=backend) is out
    assert relative_error(out.scales, true_scales(x, kind)) < 1e-7
    assert excess(out.values, out.scales, x) < LAST_BIT
    around[:, 1:-1, 8:] = out.values.view(torch.uint8)
    assert torch.equal(out.values._base.view(torch.uint8), around)  # nothing beside the rows was written
    assert (out.scales._base[:, 1::2] == -1).all()
    assert all(map(torch.equal, quantize_rows(x, kind, backend=backend), out))
    assert explain(quantize_rows, x, kind).implementation == "fused kernel"


@both
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_middle_between_two_codes_goes_to_the_even_one(kind: torch.dtype, backend: str) -> None:
    check_ties(kind, "cpu", backend)


@both
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_that_are_not_ordinary(kind: torch.dtype, backend: str) -> None:
    check_odd_rows(kind, "cpu", backend)


@both
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", STORED, ids=str)
def test_every_code_is_decoded_bit_for_bit(kind: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    check_codes(kind, dtype, "cpu", backend)


@both
@pytest.mark.parametrize("kind", STORED, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (9, 300), (17, 512), (2, 1537)], ids=str)
def test_rows_of_any_width_are_decoded_where_they_stand(
    shape: tuple[int, int], kind: torch.dtype, backend: str
) -> None:
    values, scales = inside(torch.randn(1, *shape).to(kind)), torch.rand(1, 3 * shape[0])[:, ::3]
    if kind == torch.int8:
        values.random_(-128, 128)
    out = inside(torch.zeros(1, *shape, dtype=torch.bfloat16))
    assert dequantize_rows(values, scales, out=out, backend=backend) is out
    assert torch.equal(out, (values.float() * scales[..., None]).bfloat16())
    assert out._base[:, 0].isnan().all()
    assert out._base[:, -1].isnan().all()
    assert out._base[..., :8].isnan().all()
    one = torch.tensor(0.25).expand(1, shape[0])
    assert torch.equal(dequantize_rows(values, one, dtype=torch.float32, backend=backend), values.float() / 4)


@both
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 5, 10), (2, 3, 1536)], ids=str)
def test_norms_are_rounded_once_to_the_nearest_codes(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: torch.dtype, backend: str
) -> None:
    """Codes are the nearest to the float32 row, to float32's error: never to a row in x's dtype.

    Norms write where they are told, within a larger buffer, and nothing else.
    """
    blocks, block_len, channels = shape
    x, update = (3 * torch.randn(2, 1, blocks * block_len + 1, channels) + 1).to(dtype)[:, :, 1:]
    gate, shift, scale = torch.randn(1, 2, 3, channels).unbind(2)
    block_map = torch.randint(0, 2, (blocks,), dtype=torch.int32)
    out = QuantizedRows(inside(torch.zeros(x.shape).to(kind)), torch.empty(x.shape[:2]))
    around = out.values._base.view(torch.uint8).clone()
    rest = {"block_map": block_map, "quantize": kind, "out": out, "backend": backend}
    stream = gated_residual_norm_modulate(x, update, gate, block_map=block_map, backend=backend)[0]
    wide = {"shift": shift.double(), "scale": scale.double(), "block_map": block_map, "backend": "torch"}
    for norm in ("rms", "layer"):
        if norm == "rms":
            assert norm_modulate(x, shift, scale, norm=norm, **rest) is out
        else:
            x, y = gated_residual_norm_modulate(x, update, gate, shift, scale, **rest)
            assert y is out
            assert torch.equal(x, stream)
        expected = norm_modulate(x.double(), norm=norm, **wide)
        assert relative_error(out.scales, true_scales(expected, kind)) < 1e-6
        # A float32 row is 1e-6 of its largest number off, which is 448 or 127.
        assert excess(*out, expected) < 1e-6 * (448 if kind == torch.float8_e4m3fn else 127)
        around[:, 1:-1, 8:] = out.values.view(torch.uint8)
        assert torch.equal(out.values._base.view(torch.uint8), around)


def test_a_token_of_no_row_has_no_scale() -> None:
    """A bad map gives NaN, as it does on a GPU and in the norms that are not quantised."""
    x, values, scales = torch.randn(1, 6, 96), torch.zeros(1, 6, 96, dtype=torch.int8), torch.empty(1, 6)
    shift, scale = torch.randn(1, 2, 2, 96).unbind(2)
    block_map = torch.tensor([1, 2, -1], dtype=torch.int32)
    launch_adaln(AdalnCall(x, None, None, shift, scale, None, None, block_map, "rms", 1e-6, None, values, scales))
    assert scales[:, 2:].isnan().all()
    assert not scales[:, :2].isnan().any()


def test_offsets_beyond_32_bits() -> None:
    """Two rows may lie 2**31 elements apart, in memory of which only their pages exist."""
    apart = 2**31 + 16

    def far(dtype: torch.dtype) -> Tensor:
        return torch.empty(apart + 96, dtype=torch.uint8).view(dtype).as_strided((2, 96), (apart, 1))

    x = torch.randn(2, 96)
    out = QuantizedRows(far(torch.int8), torch.empty(2))
    expected = quantize_rows(x, torch.int8)
    assert torch.equal(quantize_rows(x, torch.int8, out=out).values, expected.values)
    assert torch.equal(dequantize_rows(*out), dequantize_rows(*expected))
