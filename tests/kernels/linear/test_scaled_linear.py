"""The 8-bit linear layer: its accuracy, its errors, and what its kernel compiles to.

``tests/interpreter/linear`` compares the numbers of its PyTorch path and of its kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.static import report
from bench.static.bounds import predict
from bench.static.cubin import Analysis, Loop
from swifti2v_kernels import QuantizedRows, quantize_rows, scaled_linear
from swifti2v_kernels.common.case import Work
from swifti2v_kernels.common.target import TARGETS
from tests.support.tolerances import relative_error

X, WEIGHT = quantize_rows(torch.randn(2, 5, 48), torch.int8), quantize_rows(torch.randn(32, 48), torch.int8)
FLOAT8 = quantize_rows(torch.randn(2, 5, 48)), quantize_rows(torch.randn(32, 48))
#: Memory that rows and results share.
STORE = torch.zeros(32, 64, dtype=torch.int8)
ROWS, COLUMNS = (QuantizedRows(STORE[i : i + 16], torch.ones(16)) for i in (0, 16))


@pytest.mark.parametrize(("kind", "allowed"), [(torch.float8_e4m3fn, 4e-2), (torch.int8, 1.5e-2)], ids=str)
def test_two_quantisations_cost_what_8_bits_cost(kind: torch.dtype, allowed: float) -> None:
    """Two roundings cost 3.7 % for three bits of mantissa, less for int8 without outliers, and not nothing."""
    x, weight = torch.randn(64, 1536), torch.randn(96, 1536)
    y = scaled_linear(quantize_rows(x, kind), quantize_rows(weight, kind), dtype=torch.float32)
    assert allowed / 4 < relative_error(y, F.linear(x.double(), weight.double())) < allowed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.values}, "x: expected QuantizedRows, got Tensor"),
        ({"weight": tuple(WEIGHT)}, "weight: expected QuantizedRows, got tuple"),
        ({"x": QuantizedRows(None, X.scales)}, "x.values: expected a tensor, got NoneType"),
        ({"x": X._replace(values=X.values.float())}, "x.values: expected torch.float8_e4m3fn or torch.int8, got torch"),
        ({"x": QuantizedRows(X.values[0, 0], X.scales[0, 0])}, "x.values: expected [..., K] of two axes or more, got"),
        ({"x": X._replace(values=X.values[..., ::2])}, "x.values: expected the channels to be contiguous (stride 1),"),
        ({"x": QuantizedRows(X.values[:, :4], X.scales)}, "x.values: expected rows that flatten to [M, C] without"),
        ({"x": X._replace(scales=X.scales.flatten())}, "x.scales: expected [2, 5] torch.float32 on cpu, one a row of"),
        ({"x": FLOAT8[0]}, "weight.values: expected contiguous [N, 48] torch.float8_e4m3fn on cpu, got [32, 48] torch"),
        ({"weight": WEIGHT._replace(values=WEIGHT.values[:, :40])}, "weight.values: expected contiguous [N, 48] torch"),
        ({"activation": "gelu"}, "activation: expected None or 'gelu_tanh', got 'gelu'"),
        ({"dtype": torch.float64}, "dtype: expected torch.float16 or torch.bfloat16 or torch.float32, got torch.float"),
        ({"out": torch.empty(2, 5, 32)}, "out: expected contiguous [2, 5, 32] torch.bfloat16 on cpu, got [2, 5, 32]"),
        ({"backend": "triton"}, "backend: 'triton' cannot take this call: kernels need an NVIDIA GPU"),
        *(
            ({"x": ROWS, "weight": COLUMNS, "out": STORE[start : start + 8].view(torch.bfloat16).view(16, 16)}, message)
            for start, message in (
                (8, "out: expected memory of its own, but it overlaps x.values"),
                (24, "out: expected memory of its own, but it overlaps weight.values"),
            )
        ),
    ],
)
def test_the_argument_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        scaled_linear(**{"x": X, "weight": WEIGHT} | changes)
    assert str(error.value).startswith(message)


# What it compiles to


@pytest.mark.parametrize(
    ("capability", "kind", "opcode"),
    [
        pytest.param(80, "int8", "IMMA", marks=pytest.mark.slow),
        (89, "float8", "QMMA"),
        pytest.param(90, "float8", "QGMMA", marks=pytest.mark.slow),
        (90, "int8", "IGMMA"),
        pytest.param(120, "int8", "IMMA", marks=pytest.mark.slow),
    ],
)
def test_it_multiplies_in_8_bits(capability: int, kind: str, opcode: str) -> None:
    """One case of each dtype multiplies in 8 bits; ``python -m bench compile --check`` checks all."""
    named = f"scaled_linear K1536 gelu {kind}"
    (row,) = report.compile_cases(capability, [i for i, case in enumerate(report.CASES) if named in case.name])
    assert row.faults() == []
    assert (row.mma, row.operands) == (opcode, kind)
    assert 0.5 < row.bound_fraction <= 1
    if kind == "float8":
        # Sums leave the tensor cores with every step: an addition for each that a thread holds.
        assert row.loop.mix["FADD"] == {89: 64, 90: 128}[capability]
    else:
        assert "FADD" not in row.loop.mix
    # The compiler unpacks nothing: an instruction or two for each of the tensor cores', and no byte permutations.
    assert row.loop.mix.get("PRMT", 0) == 0


def test_a_product_of_8_bits_in_16_is_a_fault() -> None:
    good = report.Row("c", 89, "k", "", None, shared_limit=1, mma="QMMA", has_matmul=True, operands="float8")
    assert good.faults() == []
    wrong = dataclasses.replace(good, mma="HMMA").faults()
    assert wrong == ["tensor cores: expected QGMMA or QMMA or UTCQMMA, got HMMA"]
    assert dataclasses.replace(good, operands="").faults() == ["tensor cores: expected HMMA, got QMMA"]


def test_bounds_of_8_bits_by_hand() -> None:
    """Bounds for 8 warps are those counted by hand: float8 at twice the rate of bf16, int8 at four times on a 4090."""
    for opcode, capability, cycles in (("QMMA", 89, 2048), ("IMMA", 89, 1024), ("QGMMA", 90, 256)):
        loop = Loop(200, 100, {opcode: 64}, False)
        bound = predict(Analysis(128, 0, 0, 200, {}, [loop]), Work(2**20, 0), 8, 1, TARGETS[capability])
        assert bound is not None
        assert bound.cycles["tensor"] == cycles
