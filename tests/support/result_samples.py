"""Result files as a GPU's run would write them, through the same Record; the figures are invented."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.records.read import read_result
from bench.records.write import Record, Section

H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
SHAPES = {"CSG window 2560x1408, 1.3B": (70_400, 30.4e12), "CSG window, 3 sources": (17_600, 1.9e12)}
TWO_STAGE, END_TO_END = "two stages, CSG", "end-to-end, 50 steps, guidance"


def environment(device: str = H200, date: str = "2026-11-26T10:00:00+00:00", **changes: Any) -> dict[str, Any]:
    """Returns the environment of a machine; ``changes`` replace fields."""
    gpu = {"capability": [9, 0], "multiprocessors": 132, "memory_bytes": 141 * 2**30, "cuda": "13.0", "cudnn": 91200,
           "driver": "580.65", "power_limit_watts": 700.0, "max_clock_mhz": 1980}  # fmt: skip
    packages = {"torch": "2.13.0+cu130", "triton": "3.6.0", "numpy": "2.3.4", "diffusers": None}
    git = {"commit": "a" * 40, "dirty": False}
    return {"date": date, "device": device, "device_type": "cuda", "packages": packages, "git": git, "gpu": gpu,
            "python": "3.12.4", "platform": "Linux", **changes}  # fmt: skip


def document(
    path: Path,
    *rows: dict[str, Any],
    metrics: tuple[str, ...],
    identity: tuple[str, ...] = ("shape", "provider"),
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Writes and reads a file of one table, ``rows`` of section ``dit``; rows are of one shape and provider."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = Record(path, environment(**changes))
    with record.section("dit", "dit", settings or {}) as section:
        table = section.table("rows", "rows", identity=identity, metrics=metrics)
        for row in rows:
            table.add({"shape": "2K", "provider": "swifti2v", **row})
    return read_result(path)


def sample(path: Path, device: str = H200, *, faster: float = 1.0, **changes: Any) -> Path:
    """Writes a campaign's file: sections of every kind, complete, cut short and failed; with every basis.

    Args:
        path: where the file is written.
        device: the device of its environment.
        faster: the factor that all times are divided by.
        changes: changes of the environment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    record = Record(path, environment(device, **changes))
    record.save = lambda: None  # once at the end instead of after every row, which takes most of the time
    settings = {"milliseconds": 300, "quick": False}
    with record.section("attention", "Attention", settings) as section:
        _machine(section, 760.0 * faster)
        _attention(section, faster)
    with suppress(RuntimeError), record.section("dit", "The DiT's operators and one layer", settings) as section:
        _machine(section, 760.0 * faster)
        _operators(section, faster)
        raise RuntimeError("CUDA error: an illegal memory access was encountered <kernel & launch>")
    with record.section("csg", "End-to-end against CSG", {"steps": 4, "size": None}) as section:
        _clips(section, faster)
        _timeline(section)
    with record.section("compile", "What the compiler made of the kernels", {}) as section:
        _kernels(section)
    Record.save(record)
    return path


def _machine(section: Section, matmul: float) -> None:
    before = {"clock_mhz": 1980, "memory_clock_mhz": 3201, "temperature_celsius": 34, "power_watts": 118.2}
    after = {"clock_mhz": 1755, "memory_clock_mhz": 3201, "temperature_celsius": 61, "power_watts": 655.0}
    machine = {"before": before | {"throttling": []}, "after": after | {"throttling": ["power cap"]}}
    ceilings = {"copy_bytes_per_second": 4.05e12, "matmul_tflops": matmul, "matmul_dtype": "bfloat16"}
    section.set(machine=machine, ceilings=ceilings)


def _timed(seconds: float, spread: float = 0.01, runs: int = 40) -> dict[str, Any]:
    ends = {"seconds_low": seconds * (1 - spread), "seconds_high": seconds * (1 + spread)}
    return {"seconds": seconds, **ends, "runs": runs, "launch_seconds": 2.1e-5}


def _attention(section: Section, faster: float) -> None:
    metrics = ("seconds", "tflops", "fraction_of_matmul", "error", "peak_bytes")
    table = section.table("attention", "attention in bf16", identity=("shape", "provider"), metrics=metrics,
                          note="With several sources the others concatenate first.")  # fmt: skip
    rates = {"swifti2v": 640.0, "sdpa-cudnn": 610.0, "sdpa-flash": 395.0, "flex": 410.0}
    for shape, (tokens, flops) in SHAPES.items():
        for provider, rate in rates.items():
            rate *= faster
            row = {"shape": shape, "provider": provider, "ours": provider == "swifti2v", "flops": flops}
            row |= {"bytes": 4 * 2 * tokens * 1536, "peak_bytes": 2 * tokens * 1536, "error": 2.1e-3}
            row |= {"tflops": rate, "fraction_of_matmul": rate / 760 / faster, "tokens": tokens}
            table.add(row | _timed(flops / rate / 1e12, 0.08 if provider == "flex" else 0.004))
        missing = {"shape": shape, "provider": "flash-attn", "ours": False, "status": "not available"}
        table.add(missing | {"reason": "flash-attn is not installed"})
        wrong = {"shape": shape, "provider": "sageattention", "ours": False, "status": "wrong"}
        table.add(wrong | {"reason": "error 2.2e-01 against float64; not timed", "error": 0.22})
    value = 640 / 610
    section.verdicts([
        {"what": "attention over the best peer", "shape": "CSG window", "value": value, "unit": "x", "wanted": 1.05,
         "met": value >= 1.05},
        {"what": "several sources over one", "shape": "CSG window", "value": 0.99, "unit": "x", "wanted": 0.98,
         "met": True},
    ])  # fmt: skip


def _operators(section: Section, faster: float) -> None:
    metrics = ("seconds", "bytes_per_second", "fraction_of_copy", "tflops", "peak_bytes", "flops", "bytes")
    table = section.table("operators", "operators of the DiT, bf16", identity=("shape", "op", "provider"),
                          metrics=metrics, columns=("shape", "op", "provider", *metrics[:5]))  # fmt: skip
    work = {"norm_modulate": (2, 0.93, 0.31), "qk_norm_rope": (4, 0.88, 0.12), "embed_window": (1.2, 0.61, 0.2)}
    for op, (streams, ours, eager) in work.items():
        moved = streams * 70_400 * 1536 * 2
        flops = moved * (60 if op == "embed_window" else 3)
        for provider, fraction in (("swifti2v", ours), ("eager", eager)):
            rate = fraction * 4.05e12 * faster
            row = {"shape": "2560x1408, 1.3B", "op": op, "provider": provider, "ours": provider == "swifti2v"}
            row |= {"bytes_per_second": rate, "fraction_of_copy": fraction, "tflops": flops / moved * rate / 1e12}
            row |= {"flops": flops, "bytes": moved, "peak_bytes": moved / streams}
            table.add(row | _timed(moved / rate))
    failed = {"shape": "2560x1408, 1.3B", "op": "linear_gelu", "provider": "eager", "ours": False}
    table.add(failed | {"status": "out of memory", "reason": "CUDA out of memory. Tried to allocate 24.00 GiB"})


def _clips(section: Section, faster: float) -> None:
    identity = ("model", "size", "method")
    metrics = ("total_seconds", "speedup", "peak_bytes", "tokens")
    table = section.table("clips", "end-to-end against two stages with CSG, one clip", identity=identity,
                          metrics=metrics)  # fmt: skip
    for model, ours, theirs in (("1.3b", 52.0, 4200.0), ("14b", 160.0, 18300.0)):
        note = f"from 3 of {30 if model == '1.3b' else 40} layers, 1 of 4 steps"
        row = {"model": model, "size": "2K", "basis": "extrapolated", "basis_note": note}
        ours, theirs = ours / faster, theirs / faster
        table.add(
            row | {"method": TWO_STAGE, "total_seconds": ours, "speedup": theirs / ours, "peak_bytes": 23 * 10**9}
        )
        table.add(row | {"method": END_TO_END, "total_seconds": theirs, "speedup": 1.0, "tokens": 295_680})
    late = {"model": "5b", "size": "2K", "method": TWO_STAGE, "status": "not reached"}
    table.add(late | {"reason": "the time given was over"})
    predicted = {"model": "5b (H100, predicted)", "size": "2K", "method": TWO_STAGE, "total_seconds": 61.0}
    table.add(predicted | {"basis": "predicted", "basis_note": "bench/cost"})
    paper = {"model": "SwiftI2V (paper, H800)", "size": "2K", "basis": "reported", "basis_note": "arXiv 2605.06356"}
    table.add(paper | {"method": TWO_STAGE, "total_seconds": 111.0, "speedup": 202.0})
    table.add(paper | {"method": "CineScale, end-to-end", "total_seconds": 22_400.0})
    section.verdicts([{"what": "14b end-to-end over 1.3b two stages", "shape": "2K", "value": 352.0, "unit": "x",
                       "wanted": 404.0, "met": False, "basis": "extrapolated"}])  # fmt: skip
    section.note("Random weights at the real sizes: time and memory do not depend on them.")


def _timeline(section: Section) -> None:
    gigabyte = 10**9
    points = [(0.05 * i, gigabyte * (3 + (i % 40) * 0.1 + (6 if 200 < i < 700 else 0))) for i in range(1000)]
    marks = [(0.0, "load"), (2.0, "Stage I"), (10.0, "reference"), (14.0, "segment 1"), (20.0, "segment 2"),
             (26.0, "segment 3"), (35.0, "decode"), (48.0, "file")]  # fmt: skip
    section.timeline("memory of one clip", points, marks, limit=24 * gigabyte)


def _kernels(section: Section) -> None:
    metrics = ("registers", "spills", "bound_fraction")
    table = section.table("kernels", "every kernel, compiled", identity=("target", "case"), metrics=metrics)
    for target in ("sm_80", "sm_90", "sm_100"):
        for case, registers in (("attention d64", 128), ("attention d128", 204), ("norm <affine>", 40)):
            row = {"target": target, "case": case, "registers": registers, "spills": 0, "bound_fraction": 0.7}
            table.add(row | {"basis": "compiled"})
