"""Kernels compiled for GPU generations, without a GPU, through the public functions; and the report on them.

All cases for all generations: ``python -m bench compile --check``.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

import swifti2v_kernels
from bench.__main__ import main
from bench.operators.discover import all_cases
from bench.static import report
from bench.static.bounds import predict
from bench.static.compile_only import CompiledKernel, compiled_for
from bench.static.cubin import Analysis, Loop, analyse
from swifti2v_kernels import norm_rope, qk_norm_rope, segment_attention
from swifti2v_kernels.attention.portable import PortableConfig
from swifti2v_kernels.common.case import Work
from swifti2v_kernels.common.dispatch import _OPERATORS
from swifti2v_kernels.common.target import TARGETS
from tests.support.bench_session import rows_of

CPU = torch.device("cpu")


def compiled(name: str, capability: int) -> CompiledKernel:
    case = next(case for case in report.CASES if case.name == name)
    with compiled_for(capability) as kernels:
        case.run(CPU)
    (kernel,) = kernels
    assert kernel.error is None, kernel.error
    return kernel


def test_lengths_do_not_recompile() -> None:
    """Kernels are specialised on alignment and on the number of views, not on lengths."""
    with compiled_for(89) as kernels:
        for length in (1, 16, 17, 128, 1000):
            q, k, v = torch.ones(1, length, 3, 2, 64, dtype=torch.bfloat16).unbind(2)
            segment_attention(q, [(k, v)], backend="triton")
    assert len({kernel.binary for kernel in kernels}) == 1


def test_one_token_stride_beyond_32_bits_compiles() -> None:
    """A long token stride of q alone compiles: both branches that choose between q and k keep one type.

    Untouched pages cost no memory.
    """
    far = torch.empty(2**31 + 96, dtype=torch.bfloat16).as_strided((1, 2, 96), (0, 2**31, 1))
    near, weight = torch.ones(1, 2, 96, dtype=torch.bfloat16), torch.ones(96)
    with compiled_for(90) as kernels:
        qk_norm_rope(far, near, weight, weight, None, 4, backend="triton")
    assert [kernel.error for kernel in kernels] == [None]


@triton.jit
def asserting_matmul_kernel(A, B, OUT, n):
    """Sums the products of n tiles; its assertion, there in debug mode, is a call that no ``wgmma`` may cross."""
    offsets = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    acc = tl.zeros([64, 64], tl.float32)
    for i in range(n):
        acc = tl.dot(tl.load(A + i * 4096 + offsets), tl.load(B + i * 4096 + offsets), acc)
        tl.device_assert(i < 100, "tiles")
    tl.store(OUT + offsets, acc)


def test_serialised_multiplications_are_found() -> None:
    """A matmul that ptxas serialises has a fault with ptxas' reason; the same matmul without the cause has none."""
    case = dataclasses.replace(report.CASES[1], work=lambda constants: Work(64**3, 2 * 2 * 64**2))
    a, out = torch.ones(64, 64, dtype=torch.bfloat16), torch.empty(64, 64)
    with compiled_for(90) as kernels:
        for debug in (True, False):
            asserting_matmul_kernel[(1,)](a, a, out, 5, debug=debug, enable_fp_fusion=True)
    serial, sound = report.rows_of([(case, kernel) for kernel in kernels], TARGETS[90])
    reason = "wgmma pipeline crossing function boundary at a function call"
    assert (serial.mma, serial.faults()) == ("HGMMA", [f"wgmma serialised by ptxas: {reason}"])
    assert (sound.mma, sound.faults()) == ("HGMMA", [])


def test_a_softmax_that_waits_is_found(monkeypatch) -> None:
    """The softmax runs while a matmul does: that is what warp specialisation is for, and without it there is a fault.

    ptxas undoes it silently where a barrier wait is missing; here one of the kernel's two loops waits.
    """
    case = next(case for case in report.CASES if case.name == "segment_attention d128")
    launches = [(case, compiled(case.name, 90))]
    (row,) = report.rows_of(launches, TARGETS[90])
    assert (row.kernel, row.faults()) == ("segment_attention_hopper_kernel", [])
    (analysis,) = analyse([launches[0][1].binary], launches[0][1].arch)
    hoisted = dataclasses.replace(analysis.loops[0], overlapped=False)
    monkeypatch.setattr(
        report, "analyse", lambda *args: [dataclasses.replace(analysis, loops=[hoisted, *analysis.loops[1:]])]
    )
    (row,) = report.rows_of(launches, TARGETS[90])
    assert row.faults() == ["overlap: exponentials run during a multiplication in 1 of 2 loops"]


def test_a_spill_is_found(monkeypatch) -> None:
    """A spill is found, since 128 rows on 4 warps need more registers than there are."""
    bad = PortableConfig(128, 64, 4, 2)
    monkeypatch.setattr(PortableConfig, "heuristic", classmethod(lambda cls, *args: bad))
    kernel = compiled("segment_attention d128", 89)
    (row,) = report.rows_of([(report.CASES[1], kernel)], TARGETS[89])
    assert row.spill_loads > 0
    assert any("spills" in fault for fault in row.faults())


def test_what_check_objects_to() -> None:
    good = report.Row(
        "segment_attention", 89, "k", "", None, shared_bytes=1, shared_limit=2, mma="HMMA", has_matmul=True
    )
    assert good.faults() == []
    assert "spills: 0 loads, 3 stores" in dataclasses.replace(good, spill_stores=3).faults()
    assert "shared memory: 3 of 2 bytes" in dataclasses.replace(good, shared_bytes=3).faults()
    assert "tensor cores: expected HMMA, got none" in dataclasses.replace(good, mma="").faults()
    assert dataclasses.replace(good, mma="", has_matmul=False).faults() == []
    assert "does not compile: second" in dataclasses.replace(good, error="first\nsecond").faults()


def test_cases_that_are_spread_meet_every_target_in_every_form() -> None:
    """Cases compiled for two cards each: every operator, head_dim and form of attention still meets every target."""
    every, cases = list(TARGETS), list(range(len(report.CASES)))
    tasks = report.select_tasks(every, cases, 2)
    assert len(tasks) == len(set(tasks)) < len(report.select_tasks(every, cases)) / 2
    met: dict[str, set[int]] = {}
    for target, index in tasks:
        case = report.CASES[index]
        operator, head_dim, *form = case.name.split(" ", 2)
        attention = operator == "segment_attention" and head_dim != "fp16"
        for feature in (operator, head_dim, f"attention {form}") if attention else (operator,):
            met.setdefault(feature, set()).add(target)
    assert {feature: targets for feature, targets in met.items() if targets != set(every)} == {}
    assert len(met) == 3 + 10 + len({case.operator for case in report.CASES})
    assert report.select_tasks([90, 80], [3, 2], 9) == [(90, 2), (90, 3), (80, 2), (80, 3)]


def test_check_fails_on_a_fault(monkeypatch, capsys, tmp_path) -> None:
    row = report.Row("segment_attention d64", 89, "kernel", "", None, spill_loads=1, shared_limit=1, mma="HMMA")
    monkeypatch.setattr(report, "compile_all", lambda *args: [row])
    assert main(["compile", "--check", "--out", str(tmp_path / "a")]) != 0
    assert "sm_89 segment_attention d64 kernel : spills: 1 loads, 0 stores" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "a", "kernels")) == 1  # the table is kept
    assert main(["compile", "--out", str(tmp_path / "b")]) == 0


def test_every_operator_of_the_library_has_cases() -> None:
    """Every operator with a kernel has cases, found by being there; without one it would be in no report."""
    public = {getattr(swifti2v_kernels, name) for name in swifti2v_kernels.__all__}
    assert {case.operator for case in all_cases()} == public & _OPERATORS - {norm_rope}  # half of qk_norm_rope


def test_bounds_by_hand() -> None:
    """Bounds are those counted by hand.

    64 times 2048 multiply-adds on 8 warps of a 4090, with 100 exponentials a warp, are 4096 and 1600 cycles.
    """
    loop = Loop(200, 300, {"HMMA": 64, "MUFU": 100}, False)
    bound = predict(Analysis(128, 0, 0, 200, {}, [loop]), Work(2**20, 0), 8, 1, TARGETS[89])
    assert bound is not None
    assert bound.cycles["tensor"] == 2**20 / 256
    assert bound.cycles["exponent"] == 100 * 8 * 2
    assert (bound.limit, bound.fraction) == ("tensor", 1.0)
    slow = predict(Analysis(128, 0, 0, 200, {}, [loop]), Work(2**18, 0), 8, 1, TARGETS[89])
    assert slow is not None
    assert (slow.limit, slow.fraction) == ("exponent", 1024 / 1600)
