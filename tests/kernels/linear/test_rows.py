"""8-bit rows: what is refused, what computes which call, and what they cost.

``tests/interpreter/linear`` compares the numbers of their PyTorch path and of their kernels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.operators.discover import all_cases
from bench.static import report
from bench.tuning.space import targets
from swifti2v_kernels import (
    QuantizedRows,
    dequantize_rows,
    explain,
    gated_residual_norm_modulate,
    norm_modulate,
    pretend_gpu,
    quantize_rows,
)
from swifti2v_kernels.linear.dequantize_rows import cost as dequantize_cost
from swifti2v_kernels.linear.quantize_rows import cost as quantize_cost
from swifti2v_kernels.linear.quantize_rows_kernel import QuantizeConfig
from swifti2v_kernels.norm.adaln import cost as adaln_cost
from swifti2v_kernels.norm.adaln_kernel import AdalnConfig, register_limit
from tests.support.quantized_oracle import LARGEST


def test_results_go_where_they_are_told() -> None:
    x, update = torch.randn(2, 1, 12, 96)
    out = QuantizedRows(torch.zeros(1, 12, 96, dtype=torch.int8), torch.zeros(1, 12))
    for call in (
        lambda **to: quantize_rows(x, torch.int8, **to),
        lambda **to: norm_modulate(x, quantize=torch.int8, **to),
        lambda **to: gated_residual_norm_modulate(x, update, quantize=torch.int8, **to)[1],
    ):
        expected = call()
        assert call(out=out) is out
        assert all(map(torch.equal, out, expected))
    stream = x.clone()
    results = gated_residual_norm_modulate(stream, update, quantize=torch.int8, out=out, inplace=True)
    assert results[0] is stream
    assert results[1] is out
    wide = torch.empty(1, 12, 96, dtype=torch.float16)
    assert dequantize_rows(*out, dtype=torch.float16, out=wide) is wide
    assert torch.equal(wide, (out.values.float() * out.scales[..., None]).half())


def test_arguments_that_do_not_fit_are_named() -> None:
    x, kind = torch.randn(2, 12, 10), torch.int8
    values, scales = quantize_rows(x, kind)
    out = QuantizedRows(values, scales)
    for message, call in {
        "x: expected a tensor, got list": lambda: quantize_rows([1.0]),
        "x: expected float32, float16 or bfloat16 .* got torch.int32": lambda: quantize_rows(x.int()),
        r"x: expected \[..., C\] with at least one channel, got \[2, 12, 0\]": lambda: quantize_rows(x[..., :0]),
        r"x: expected the channels to be contiguous \(stride 1\), got stride 2": lambda: quantize_rows(x[..., ::2]),
        r"x: expected rows that flatten to \[M, C\] without a copy, got": lambda: quantize_rows(x[:, :3]),
        "dtype: expected torch.float8_e4m3fn or torch.int8, got torch.uint8": lambda: quantize_rows(x, torch.uint8),
        "out: expected QuantizedRows, got Tensor": lambda: quantize_rows(x, kind, out=x),
        r"out.values: expected \[2, 12, 10\] torch.float8_e4m3fn on cpu, got .* torch.int8": lambda: quantize_rows(
            x, out=out
        ),
        r"out.scales: expected \[2, 12\] torch.float32 on cpu, got \[2, 11\]": lambda: quantize_rows(
            x, kind, out=out._replace(scales=scales[:, 1:])
        ),
        "out.scales: expected a tensor, got float": lambda: quantize_rows(x, kind, out=out._replace(scales=1.0)),
        r"out.scales: expected numbers that flatten to \[M\] without a copy": lambda: quantize_rows(
            x, kind, out=out._replace(scales=torch.empty(12, 2).t())
        ),
        "values: expected one of .*, got torch.float32": lambda: dequantize_rows(x, scales),
        r"scales: expected \[2, 12\] torch.float32 on cpu, one a row of values, got \[2, 10\]": lambda: dequantize_rows(
            values, scales[:, :10].contiguous()
        ),
        r"scales: expected .* got \[2, 12\] torch.float64": lambda: dequantize_rows(values, scales.double()),
        "dtype: expected one of .*, got torch.float64": lambda: dequantize_rows(values, scales, dtype=torch.float64),
        r"out: expected \[2, 12, 10\] torch.bfloat16 on cpu, got .* torch.float32": lambda: dequantize_rows(
            values, scales, out=x
        ),
        "quantize: expected torch.float8_e4m3fn or torch.int8, got torch.float16": lambda: norm_modulate(
            x, quantize=torch.float16
        ),
        "inplace: expected False with quantize": lambda: norm_modulate(x, quantize=kind, inplace=True),
        "out: expected a tensor, got QuantizedRows": lambda: norm_modulate(x, out=out),
        "out: expected QuantizedRows, got Tensor$": lambda: norm_modulate(x, quantize=kind, out=x),
        "out.values: expected the channels to be contiguous": lambda: norm_modulate(
            x, quantize=kind, out=out._replace(values=torch.empty(2, 10, 12, dtype=kind).transpose(1, 2))
        ),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_writing_over_what_is_read_is_refused() -> None:
    memory = torch.randn(1, 24, 96)
    x, other = memory[:, :6], memory[:, 12:18]
    values = memory.view(torch.int8).view(1, 24, 384)[:, 5:11, :96]  # its first row is the last of x
    fresh = QuantizedRows(torch.empty(1, 6, 96, dtype=torch.int8), torch.empty(1, 6))
    scales = memory[0, 17, :6].unsqueeze(0)
    for message, call in {
        "out.values: expected memory of its own, but it overlaps x": lambda: quantize_rows(
            x, torch.int8, out=fresh._replace(values=values)
        ),
        "out.values: expected memory of its own, but it overlaps update": lambda: gated_residual_norm_modulate(
            other, x, quantize=torch.int8, out=fresh._replace(values=values)
        ),
        "out.scales: expected memory of its own, but it overlaps x": lambda: norm_modulate(
            other, quantize=torch.int8, out=fresh._replace(scales=scales)
        ),
        "out.scales: expected distinct elements": lambda: quantize_rows(
            x, torch.int8, out=fresh._replace(scales=torch.zeros(1).expand(1, 6))
        ),
        "out: expected memory of its own, but it overlaps values": lambda: dequantize_rows(
            values, fresh.scales.zero_(), dtype=torch.float32, out=x
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_old_gpus_have_the_kernels_but_those_that_round_to_float8() -> None:
    """Old GPUs take the reference for these, with a reason, and raise an error if the kernel is asked for by name."""
    x, rows = torch.empty(1, 6, 96), quantize_rows(torch.randn(6, 96))
    reason = "kernels that round to float8 exist for compute capability 8.9 and newer, this device has 8.6"
    with pretend_gpu(86):
        for operator, arguments, name in (
            (quantize_rows, (x,), "dtype"),
            (norm_modulate, (x,), "quantize"),
            (gated_residual_norm_modulate, (x, x), "quantize"),
        ):
            assert explain(operator, *arguments, **{name: torch.float8_e4m3fn}).reason == reason
            assert explain(operator, *arguments, **{name: torch.int8}).implementation == "fused kernel"
            with pytest.raises(ValueError, match=f"backend: 'triton' cannot take this call: {reason}"):
                operator(*arguments, **{name: torch.float8_e4m3fn}, backend="triton")
        assert explain(dequantize_rows, *rows).implementation == "fused kernel"
    with pretend_gpu(89):
        assert explain(quantize_rows, x).implementation == "fused kernel"
        values, scales = quantize_rows(torch.empty(2, 6, 96, device="meta"))  # planners: nothing runs
        assert (values.shape, values.dtype, scales.shape) == ((2, 6, 96), torch.float8_e4m3fn, (2, 6))
        assert norm_modulate(torch.empty(2, 6, 96, device="meta"), quantize=torch.int8).scales.shape == (2, 6)
        assert "up to 16384 channels, got 16385" in explain(quantize_rows, torch.empty(1, 16385)).reason


def test_quantised_results_have_no_gradients_and_the_stream_has() -> None:
    x = torch.randn(1, 4, 12, requires_grad=True)
    x_new, y = gated_residual_norm_modulate(x, torch.randn(1, 4, 12), quantize=torch.int8)
    assert x_new.requires_grad
    assert not y.scales.requires_grad
    assert "gradients" in explain(quantize_rows, x).reason
    scales = torch.rand(4, requires_grad=True)
    dequantize_rows(torch.full((4, 3), 2, dtype=torch.int8), scales, dtype=torch.float32).sum().backward()
    assert torch.equal(scales.grad, torch.full((4,), 6.0))


def test_costs_are_what_the_docstrings_say() -> None:
    """An element of 16 bits costs 3 bytes and a row 4; a quantised norm halves what it writes."""
    assert quantize_cost(7, 100).bytes == 7 * (3 * 100 + 4)
    assert dequantize_cost(7, 100).bytes == 7 * (3 * 100 + 4)
    parts = {"update": True, "norm": True}
    plain, quantised = (adaln_cost(1, 7, 100, **parts, quantize=q) for q in (False, True))
    assert (plain.bytes_written, quantised.bytes_written) == (4 * 700, 3 * 700)
    assert plain.bytes_read == quantised.bytes_read


def test_a_row_stays_in_registers() -> None:
    """A thread has at most 32 numbers; the limit of registers is for at most 24, which do not spill under it."""
    for channels in (96, 1536, 5120, 8960, 13824, 16384):
        block_c = 1 << (channels - 1).bit_length()
        config = QuantizeConfig.heuristic(block_c)
        assert config.block_m * block_c / (32 * config.num_warps) <= 32
        assert config.num_warps <= 16
    limited = {c: bool(register_limit(c, AdalnConfig.heuristic(1 << (c - 1).bit_length()).num_warps)) for c in _WIDTHS}
    assert limited == {1536: True, 3072: True, 4096: False, 5120: True, 8192: False}


_WIDTHS = (1536, 3072, 4096, 5120, 8192)


def test_cases_are_for_gpus_that_have_their_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cases are compiled, tuned and launched for the GPUs that have their kernel alone."""
    cases = {case.name: i for i, case in enumerate(all_cases())}
    new, old = cases["quantize_rows C13824 float8"], cases["quantize_rows C8960 int8"]
    assert (all_cases()[new].least_capability, all_cases()[old].least_capability) == (89, 80)
    compiled: list[tuple[int, int]] = []

    def compile_cases(capability: int, some: list[int]) -> list[report.Row]:
        compiled.extend((capability, case) for case in some)
        return [report.Row(all_cases()[case].name, capability, "kernel", "", None) for case in some]

    monkeypatch.setattr(report, "compile_cases", compile_cases)
    monkeypatch.setattr(report, "ProcessPoolExecutor", lambda jobs, *rest, **more: ThreadPoolExecutor(1))
    rows = report.compile_all(report.select_tasks([80, 86, 89], [old, new]), 1)
    assert compiled == [(80, old), (86, old), (89, old), (89, new)]
    assert [(row.capability, row.case) for row in rows] == [(c, all_cases()[i].name) for c, i in compiled]
    assert main(["compile", "--targets", "80,86", "--cases", "C13824 float8", "--out", str(tmp_path)]) == 2
    assert "targets: expected one of 89 or newer for these cases, got 86" in capsys.readouterr().err
    for capability, some in ((86, False), (90, True)):
        found = [case.name for target in targets(capability, "quantize_rows") for case in target.cases]
        assert ("quantize_rows C13824 float8" in found) == some
        assert "quantize_rows C8960 int8" in found


def test_codes_and_the_largest_of_them() -> None:
    """The library's table of largest magnitudes is torch's."""
    assert LARGEST[torch.float8_e4m3fn] == torch.finfo(torch.float8_e4m3fn).max
    assert LARGEST[torch.int8] == torch.iinfo(torch.int8).max
