"""8-bit rows: what is refused, what computes which call, and what they cost.

``tests/interpreter/linear`` compares the numbers of their PyTorch path and of their kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.operators.discover import all_cases
from bench.static import report
from bench.tuning.space import targets
from model.errors import InputError
from swifti2v_kernels import (
    QuantizedRows,
    dequantize_rows,
    explain,
    gated_residual_norm_modulate,
    norm_modulate,
    pretend_gpu,
    quantize_rows,
    scaled_linear,
)

X, INT8 = torch.randn(2, 12, 10), torch.int8
OUT = QuantizedRows(*quantize_rows(X, INT8))
VALUES, SCALES = OUT
FLAT, SIZE = "rows that flatten to [M, C] without a copy", "[2, 12, 10]"
#: Memory of rows in float32, in which ``BYTES`` are rows of 8 bits: their first is the last of ``MEMORY[:, :6]``.
MEMORY = torch.randn(1, 24, 96)
BYTES = MEMORY.view(INT8).view(1, 24, 384)[:, 5:11, :96]
FRESH = QuantizedRows(torch.empty(1, 6, 96, dtype=INT8), torch.empty(1, 6))


def into(rows: QuantizedRows = OUT, **changes: Any) -> dict[str, Any]:
    """Returns options of int8 rows that are to be written, some of their parts changed."""
    return {"dtype": INT8, "out": rows._replace(**changes)}


BAD: dict[Callable[..., Any], list[tuple[tuple[Any, ...], dict[str, Any], str]]] = {
    quantize_rows: [
        ((X.int(),), {}, "x: expected float32, float16 or bfloat16 (float64: torch), got torch.int32"),
        ((X[..., :0],), {}, "x: expected [..., C] with at least one channel, got [2, 12, 0]"),
        ((X[..., ::2],), {}, "x: expected the channels to be contiguous (stride 1), got stride 2"),
        ((X[:, :3],), {}, f"x: expected {FLAT}, got"),
        ((X, torch.uint8), {}, "dtype: expected torch.float8_e4m3fn or torch.int8, got torch.uint8"),
        ((X, INT8), {"out": X}, "out: expected QuantizedRows, got Tensor"),
        ((X,), {"out": OUT}, f"out.values: expected {SIZE} torch.float8_e4m3fn on cpu, got {SIZE} torch.int8"),
        ((X,), into(scales=SCALES[:, 1:]), "out.scales: expected [2, 12] torch.float32 on cpu, got [2, 11]"),
        ((X,), into(scales=torch.empty(12, 2).t()), "out.scales: expected numbers that flatten to [M] without a copy"),
        ((MEMORY[:, :6],), into(FRESH, values=BYTES), "out.values: expected memory of its own, but it overlaps x"),
        (
            (MEMORY[:, :6],),
            into(FRESH, scales=torch.zeros(1).expand(1, 6)),
            "out.scales: expected distinct elements",
        ),
    ],
    dequantize_rows: [
        ((X, SCALES), {}, "values: expected torch.float8_e4m3fn or torch.float8_e5m2 or torch.int8, got torch.float32"),
        ((VALUES, SCALES[:, :10].contiguous()), {}, "scales: expected [2, 12] torch.float32 on cpu, one a row of"),
        (
            (VALUES, SCALES),
            {"dtype": torch.float64},
            "dtype: expected torch.float16 or torch.bfloat16 or torch.float32",
        ),
        ((VALUES, SCALES), {"out": X}, f"out: expected {SIZE} torch.bfloat16 on cpu, got {SIZE} torch.float32"),
        (
            (BYTES, torch.zeros(1, 6)),
            {"dtype": torch.float32, "out": MEMORY[:, :6]},
            "out: expected memory of its own, but it overlaps values",
        ),
    ],
    norm_modulate: [
        ((X,), {"quantize": torch.float16}, "quantize: expected torch.float8_e4m3fn or torch.int8, got torch.float16"),
        ((X,), {"out": OUT}, "out: expected a tensor, got QuantizedRows"),
        ((X,), {"quantize": INT8, "out": X}, "out: expected QuantizedRows, got Tensor"),
    ],
    gated_residual_norm_modulate: [
        (
            (MEMORY[:, 12:18], MEMORY[:, :6]),
            {"quantize": INT8, "out": FRESH._replace(values=BYTES)},
            "out.values: expected memory of its own, but it overlaps update",
        )
    ],
}


@pytest.mark.parametrize(
    ("operator", "arguments", "options", "message"), [(o, *bad) for o, some in BAD.items() for bad in some]
)
def test_the_argument_that_does_not_fit_is_named(
    operator: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        operator(*arguments, **options)
    assert str(error.value).startswith(message)


def test_a_graph_of_any_width_is_traced_once() -> None:
    """Nothing that a call asks about its channels, such as what to say of too many, fixes their number in a graph."""
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantize_rows(x, INT8), fullgraph=True, dynamic=True, backend=backend)
    for channels in (8, 24, 40):
        assert compiled(torch.ones(3, channels)).values.shape == (3, channels)
    assert len(traced) == 1


def float8_calls(kind: torch.dtype) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Returns a call of every operator that makes or multiplies rows of this dtype."""
    x, made = torch.ones(1, 6, 96), quantize_rows(torch.ones(16, 96), kind)
    return [
        (quantize_rows, {"x": x, "dtype": kind}),
        (norm_modulate, {"x": x, "quantize": kind}),
        (gated_residual_norm_modulate, {"x": x, "update": x, "quantize": kind}),
        (scaled_linear, {"x": made, "weight": made}),
    ]


def test_old_gpus_have_the_kernels_but_those_that_make_or_multiply_float8() -> None:
    """Old GPUs take the reference for these, with a reason, and raise an error if the kernel is asked for by name."""
    reason = "kernels that (round to|multiply) float8 exist for compute capability 8.9 and newer, this device has 8.6"
    for (operator, known), (_, call) in zip(float8_calls(INT8), float8_calls(torch.float8_e4m3fn), strict=True):
        with pretend_gpu(86):
            assert explain(operator, **known).implementation == "fused kernel"
            assert re.fullmatch(reason, explain(operator, **call).reason)
            with pytest.raises(ValueError, match=f"backend: 'triton' cannot take this call: {reason}"):
                operator(**call, backend="triton")
        with pretend_gpu(89):
            assert explain(operator, **call).implementation == "fused kernel"
    made = quantize_rows(torch.ones(16, 96))
    with pretend_gpu(86):
        assert explain(dequantize_rows, *made).implementation == "fused kernel"
    with pretend_gpu(89):
        made = QuantizedRows(*(part.to("meta") for part in made))
        y = scaled_linear(made, made)
        assert (y.shape, y.dtype, y.device.type) == ((16, 16), torch.bfloat16, "meta")
        values, scales = quantize_rows(torch.empty(2, 6, 96, device="meta"))  # planners: nothing runs
        assert (values.shape, values.dtype, scales.shape) == ((2, 6, 96), torch.float8_e4m3fn, (2, 6))
        assert norm_modulate(torch.empty(2, 6, 96, device="meta"), quantize=torch.int8).scales.shape == (2, 6)
        assert "up to 16384 channels, got 16385" in explain(quantize_rows, torch.empty(1, 16385)).reason


def test_the_least_costs_of_cases_are_those_counted_by_hand() -> None:
    """An element of 16 bits costs 3 bytes and a row 4; the 8-bit matmul reads rows and weights once."""
    costs = {case.name: case.real for case in all_cases() if "rows" in case.name or "K1536 gelu" in case.name}
    for name, channels in (("quantize_rows C8960 int8", 8960), ("dequantize_rows C1536 int8", 1536)):
        rows = costs[name].inputs(torch.device("meta"))[0][0].numel() // channels
        assert costs[name].cost.bytes == rows * (3 * channels + 4)
    least = costs["scaled_linear K1536 gelu int8"].cost  # of 2,816 tokens
    assert least.flops == 2 * 2816 * 1536 * 8960 + 8 * 2816 * 8960
    assert least.bytes_read == (2816 + 8960) * (1536 + 4) + 2 * 8960
    assert least.bytes_written == 2 * 2816 * 8960


def test_cases_are_for_gpus_that_have_their_kernel() -> None:
    """Cases are compiled and tuned for the GPUs that have their kernel alone."""
    cases = {case.name: i for i, case in enumerate(all_cases())}
    new, old = cases["quantize_rows C13824 float8"], cases["quantize_rows C8960 int8"]
    assert report.select_tasks([80, 86, 89], [old, new]) == [(80, old), (86, old), (89, old), (89, new)]
    with pytest.raises(InputError, match="targets: expected one of 89 or newer for these cases, got 86"):
        report.select_tasks([80, 86], [new])
    for capability, some in ((86, False), (90, True)):
        found = [case.name for target in targets(capability) for case in target.cases]
        assert ("quantize_rows C13824 float8" in found) == some
