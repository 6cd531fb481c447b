"""The 8-bit linear layer: its errors, what computes it where, and what its kernel compiles to.

``tests/interpreter/linear`` compares the numbers of its PyTorch path and of its kernel.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.static import report
from bench.static.bounds import predict
from bench.static.compile_only import compiled_for
from bench.static.cubin import Analysis, Loop, analyse
from swifti2v_kernels import QuantizedRows, explain, pretend_gpu, quantize_rows, scaled_linear
from swifti2v_kernels.common.cost import Work
from swifti2v_kernels.common.target import TARGETS
from swifti2v_kernels.linear.scaled_linear import cost
from tests.support.operator_cases import cases_of
from tests.support.tolerances import OPERATOR, relative_error

KINDS = [torch.float8_e4m3fn, torch.int8]
#: Not the function of that name.
MODULE = importlib.import_module("swifti2v_kernels.linear.scaled_linear")
CPU = torch.device("cpu")


def layer(kind: torch.dtype, tokens: int = 10, channels: int = 48, columns: int = 32) -> tuple[Any, Any, Tensor]:
    """Returns operands as a model makes them; the columns need no kernel."""
    x, weight = torch.randn(2, tokens // 2, channels), torch.randn(columns, channels) / channels**0.5
    return quantize_rows(x, kind), quantize_rows(weight, kind), torch.randn(columns)


def exact(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None = None) -> Tensor:
    """Returns the result in float64, with the scales in the operands."""
    wide = [r.values.double() * r.scales.double().unsqueeze(-1) for r in (x, weight)]
    return F.linear(*wide, None if bias is None else bias.double())


@pytest.mark.parametrize(("kind", "allowed"), [(torch.float8_e4m3fn, 4e-2), (torch.int8, 1.5e-2)], ids=str)
def test_two_quantisations_cost_what_8_bits_cost(kind: torch.dtype, allowed: float) -> None:
    """Two roundings cost 3.7 % for three bits of mantissa, less for int8 without outliers, and not nothing."""
    x, weight = torch.randn(64, 1536), torch.randn(96, 1536)
    y = scaled_linear(quantize_rows(x, kind), quantize_rows(weight, kind), dtype=torch.float32)
    assert allowed / 4 < relative_error(y, F.linear(x.double(), weight.double())) < allowed


def test_the_argument_that_does_not_fit_is_named() -> None:
    x, weight, bias = layer(torch.int8)
    float8, _, _ = layer(torch.float8_e4m3fn)
    wrong = {
        "x: expected QuantizedRows, got Tensor": lambda: scaled_linear(x.values, weight),
        "weight: expected QuantizedRows, got tuple": lambda: scaled_linear(x, tuple(weight)),
        "x.values: expected a tensor, got NoneType": lambda: scaled_linear(QuantizedRows(None, x.scales), weight),
        r"x.values: expected \[..., K\] torch.float8_e4m3fn or torch.int8, got \[2, 5, 48\] torch.float32": (
            lambda: scaled_linear(x._replace(values=x.values.float()), weight)
        ),
        r"x.values: expected \[..., K\] .*, got \[48\]": lambda: scaled_linear(
            QuantizedRows(x.values[0, 0], x.scales[0, 0]), weight
        ),
        r"x.values: expected the channels to be contiguous \(stride 1\), got stride 2": lambda: scaled_linear(
            x._replace(values=x.values[..., ::2]), weight
        ),
        r"x.values: expected rows that flatten to \[M, C\] without a copy": lambda: scaled_linear(
            QuantizedRows(x.values[:, :4], x.scales[:, :4]), weight
        ),
        r"x.scales: expected \[2, 5\] torch.float32 on cpu, one a row of x.values, got \[10\]": lambda: scaled_linear(
            x._replace(scales=x.scales.flatten()), weight
        ),
        r"x.scales: expected \[2, 5\] torch.float32 .* got \[2, 5\] torch.float16": lambda: scaled_linear(
            x._replace(scales=x.scales.half()), weight
        ),
        r"weight.values: expected contiguous \[N, 48\] torch.float8_e4m3fn on cpu, got \[32, 48\] torch.int8": (
            lambda: scaled_linear(float8, weight)
        ),
        r"weight.values: expected contiguous \[N, 48\] .*, got \[32, 40\]": lambda: scaled_linear(
            x, weight._replace(values=weight.values[:, :40].contiguous())
        ),
        r"weight.values: .* not contiguous": lambda: scaled_linear(
            x, weight._replace(values=weight.values.t().contiguous().t())
        ),
        r"weight.scales: expected contiguous \[32\] torch.float32 on cpu, got \[31\]": lambda: scaled_linear(
            x, weight._replace(scales=weight.scales[:31])
        ),
        r"bias: expected contiguous \[32\] float32, float16 or bfloat16 on cpu, got \[33\]": lambda: scaled_linear(
            x, weight, torch.zeros(33)
        ),
        r"bias: .* got \[32\] torch.int32": lambda: scaled_linear(x, weight, bias.int()),
        "activation: expected None or 'gelu_tanh', got 'gelu'": lambda: scaled_linear(x, weight, activation="gelu"),
        r"dtype: expected one of torch.float16, torch.bfloat16, torch.float32, got torch.float64": (
            lambda: scaled_linear(x, weight, dtype=torch.float64)
        ),
        "out: expected a tensor, got list": lambda: scaled_linear(x, weight, out=[]),
        r"out: expected contiguous \[2, 5, 32\] torch.bfloat16 on cpu, got \[2, 5, 32\] torch.float32": (
            lambda: scaled_linear(x, weight, out=torch.empty(2, 5, 32))
        ),
        "backend: 'triton' cannot take this call: kernels need an NVIDIA GPU": lambda: scaled_linear(
            x, weight, backend="triton"
        ),
    }
    for message, call in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_writing_over_what_is_read_is_refused() -> None:
    store = torch.zeros(64, 64, dtype=torch.int8)
    x, weight = QuantizedRows(store[:16], torch.ones(16)), QuantizedRows(store[16:32], torch.ones(16))
    for start, other in ((8, "x.values"), (24, "weight.values")):
        out = store[start : start + 8].view(torch.bfloat16).view(16, 16)
        with pytest.raises(ValueError, match=f"out: expected memory of its own, but it overlaps {other}"):
            scaled_linear(x, weight, out=out)
    assert scaled_linear(x, weight, out=store[32:40].view(torch.bfloat16).view(16, 16)) is not None


def test_explain_says_what_computes_it_and_why() -> None:
    float8, weight, bias = layer(torch.float8_e4m3fn)
    int8, int8_weight, _ = layer(torch.int8)
    choice = explain(scaled_linear, float8, weight, bias)
    assert (choice.backend, choice.implementation) == ("torch", "reference")
    assert choice.reason.startswith("kernels need an NVIDIA GPU")
    for capability in TARGETS:
        with pretend_gpu(capability):
            assert explain(scaled_linear, int8, int8_weight).implementation == "fused matmul"
            choice = explain(scaled_linear, float8, weight, bias)
            if capability >= 89:
                assert choice.implementation == "fused matmul"
            else:
                older = "exist for compute capability 8.9 and newer, this device has"
                reason = f"kernels that multiply float8 {older} {capability / 10}"
                assert (choice.implementation, choice.reason) == ("reference", reason)
            assert explain(scaled_linear, float8, weight, backend="torch").reason == "backend is 'torch'"
    with pretend_gpu(90):
        y = scaled_linear(*(QuantizedRows(*(t.to("meta") for t in rows)) for rows in (float8, weight)))
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 32), torch.bfloat16, "meta")


class _OnCuda:
    """A tensor with as much of CUDA tensors as the choice of torch's matmul looks at."""

    def __init__(self, x: Tensor) -> None:
        self.device, self.dtype, self.shape, self._x = torch.device("cuda"), x.dtype, x.shape, x
        self.requires_grad = x.requires_grad

    def is_contiguous(self) -> bool:
        return self._x.is_contiguous()

    def numel(self) -> int:
        return self._x.numel()


@pytest.mark.parametrize("capability", [89, 90, 100])
def test_torch_has_products_of_its_own(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's matmuls are taken where they are known to take scales a row, for what they take."""
    monkeypatch.setattr(MODULE, "capability_of", lambda device: capability)

    def chosen(kind: torch.dtype, dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None, **sizes: int) -> str:
        x, weight, _ = layer(kind, **sizes)
        return MODULE.torchs_product(MODULE.ScaledCall(*map(_OnCuda, (*x, *weight)), bias, False, None, dtype))

    float8, int8 = KINDS
    assert chosen(float8) == ("torch._scaled_mm" if capability == 90 else "reference")
    assert chosen(float8, torch.float32) == chosen(float8, channels=40) == chosen(float8, columns=24) == "reference"
    assert chosen(int8, tokens=18) == "torch._int_mm"
    assert chosen(int8, tokens=16) == chosen(int8, tokens=18, channels=40) == "reference"
    assert chosen(int8, tokens=18, bias=torch.zeros(32, requires_grad=True)) == "reference"


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, *,
    out_dtype: torch.dtype, use_fast_accum: bool, out: Tensor,
) -> None:  # fmt: skip
    """Stands for ``torch._scaled_mm`` with scales a row: rows by columns, scales [M, 1] and [1, N], a bfloat16 bias."""
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert not use_fast_accum
    assert (scale_a.shape, scale_b.shape) == ((len(a), 1), (1, b.shape[1]))
    assert out_dtype == out.dtype == torch.bfloat16
    assert bias is None or bias.dtype == torch.bfloat16
    out.copy_(a.float() @ b.float() * scale_a * scale_b + (0 if bias is None else bias))


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize(("kind", "own"), list(zip(KINDS, ("torch._scaled_mm", "torch._int_mm"), strict=True)), ids=str)
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_torchs_products_are_asked_for_the_formula(
    kind: torch.dtype, own: str, bias_dtype: torch.dtype | None, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's matmuls are asked for the formula.

    That of int8 exists on the CPU; that of float8 takes scales a row there in the newest torch only, so that what it is
    documented to do stands in for it.
    """
    monkeypatch.setattr(torch.ops.aten._scaled_mm, "out", scaled_mm)
    monkeypatch.setattr(MODULE, "torchs_product", lambda call: own)
    x, weight, bias = layer(kind, 36)
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    out = torch.full((2, 18, 32), float("nan"), dtype=torch.bfloat16)
    y = scaled_linear(x, weight, bias, activation=activation, out=out)
    assert y is out
    expected = exact(x, weight, bias)
    expected = F.gelu(expected, approximate="tanh") if activation else expected
    # Once more for a bias of another dtype, and once more for GELU.
    assert relative_error(out, expected) < 2 * OPERATOR["bfloat16"]
    assert torch.equal(out, scaled_linear(x, weight, bias, activation=activation))


def test_least_cost_by_hand() -> None:
    """The least cost of the first matmul of Wan 1.3B's feed-forward, for 2816 tokens, is that counted by hand."""
    least = cost(2816, 1536, 8960, gelu=True)
    assert least.flops == 2 * 2816 * 1536 * 8960 + 8 * 2816 * 8960
    assert least.bytes_read == (2816 + 8960) * 1536 + 4 * (2816 + 8960) + 2 * 8960
    assert least.bytes_written == 2 * 2816 * 8960
    assert cost(2816, 1536, 8960).flops == 2 * 2816 * 1536 * 8960


# What it compiles to


def row_of(case: Any, capability: int) -> tuple[report.Row, Analysis]:
    with compiled_for(capability) as kernels:
        case.run(CPU)
    (kernel,) = kernels
    assert kernel.error is None, kernel.error
    (row,) = report.rows_of([(case, kernel)], TARGETS[capability])
    return row, analyse([kernel.binary], kernel.arch)[0]


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
    case = next(case for case in cases_of(scaled_linear) if "K1536" in case.name and kind in case.name)
    row, analysis = row_of(case, capability)
    assert row.faults() == []
    assert (row.mma, row.operands) == (opcode, kind)
    assert row.bound_fraction is not None
    assert 0.5 < row.bound_fraction <= 1
    (loop,) = analysis.loops
    if kind == "float8":
        # Sums leave the tensor cores with every step: an addition for each that a thread holds.
        assert loop.mix["FADD"] == {89: 64, 90: 128}[capability]
    else:
        assert "FADD" not in loop.mix
    # The compiler unpacks nothing: an instruction or two for each of the tensor cores', and no byte permutations.
    assert loop.mix.get("PRMT", 0) == 0


def test_a_product_of_8_bits_in_16_is_a_fault() -> None:
    good = report.Row("c", 89, "k", "", None, shared_limit=1, mma="QMMA", has_matmul=True, operands="float8")
    assert good.faults() == []
    wrong = dataclasses.replace(good, mma="HMMA").faults()
    assert wrong == ["tensor cores: expected QGMMA or QMMA or UTCQMMA, got HMMA"]
    assert dataclasses.replace(good, operands="").faults() == ["tensor cores: expected HMMA, got QMMA"]


def test_bounds_of_8_bits_by_hand() -> None:
    """Bounds for 8 warps on a 4090 are those counted by hand.

    float8 runs at twice the rate of bf16, int8 at four times; IGMMA by all warps.
    """
    for opcode, capability, rate, cycles in (("QMMA", 89, 2, 2048), ("IMMA", 89, 4, 1024), ("QGMMA", 90, 2, 256)):
        loop = Loop(200, 100, {opcode: 64}, False)
        bound = predict(Analysis(128, 0, 0, 200, {}, [loop]), Work(2**20, 0), 8, 1, TARGETS[capability])
        assert bound is not None
        assert (bound.cycles["tensor"], bound.rate) == (cycles, rate)
        alone = max(200 * (1 if opcode[1] == "M" else 2), 100)
        assert bound.cycles["latency"] == (cycles / 2 if opcode[1] == "M" else cycles) + alone
        assert bound.tflops(TARGETS[capability]) == bound.fraction * rate * TARGETS[capability].bf16
