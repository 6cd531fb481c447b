"""Measures our attention kernels and every other implementation in the environment, on the shapes of real models.

Every implementation is first checked against float64 on sampled rows; what is wrong is not timed. The right ones then
take turns. Fractions are of a matmul's speed measured in the same run. With several sources the others must
concatenate, which is timed with them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.attention.providers import Provider, Shape, inputs, own_kernel
from bench.harness.timing import Timer, peak_of
from bench.records.outcome import FAILURES, failure
from bench.records.write import Table
from model.errors import require
from model.machine.measure import is_out_of_memory

#: Relative L2 error against float64 above which an implementation is wrong: bfloat16 rounds p and the output once, with
#: at most 2**-8 each; 8-bit matmuls are allowed ten times as much.
TOLERANCE = {True: 8e-3, False: 8e-2}
IDENTITY = ("shape", "provider")
METRICS = ("seconds", "launch_seconds", "tflops", "fraction_of_matmul", "error", "peak_bytes", "copied_bytes")
COLUMNS = ("shape", "provider", "seconds", "tflops", "fraction_of_matmul", "error", "peak_bytes", "copied_bytes")


def measure(
    shape: Shape, found: Sequence[Provider], device: torch.device, timer: Timer, matmul: float, table: Table, bar: Any
) -> None:
    """Adds one row for every implementation: checked, then timed in turns."""
    try:
        q, sources = inputs(shape, device, torch.bfloat16)
        rows_checked = torch.linspace(0, shape.queries - 1, min(64, shape.queries), device=device).long()
        expected = exact_rows(q, sources, rows_checked)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        for provider in found:
            reason = {"status": "out of memory", "reason": "the inputs alone do not fit"}
            table.add({"shape": shape.name, "provider": provider.name, **reason})
        bar.update(len(found))
        return
    rows, right = {}, {}
    for provider in found:
        bar.set_description(f"{shape.name}, {provider.name}")
        row: dict[str, Any] = {"shape": shape.name, "sources": len(shape.keys), "provider": provider.name}
        row |= {"exact": provider.exact, "ours": provider.ours, "flops": shape.cost.flops, "bytes": shape.cost.bytes}
        row["copied_bytes"] = 0 if provider.ours else shape.copied_bytes
        call = functools.partial(provider.call, q, sources)
        try:
            row |= _checked(provider, call, rows_checked, expected, device)
        except FAILURES as error:
            row |= failure(error)
            _release(device)
        rows[provider.name] = row
        if row["status"] == "ok":
            right[provider.name] = call
        bar.update()
    for name, timing in _timed(right, timer, rows).items():
        row = rows[name] = rows[name] | timing.row()
        row["tflops"] = shape.cost.flops / row["seconds"] / 1e12
        row["fraction_of_matmul"] = row["tflops"] / matmul
    for provider in found:
        table.add(rows[provider.name])


def _checked(provider: Provider, call: Any, checked: Tensor, expected: Tensor, device: torch.device) -> dict[str, Any]:
    call()  # compiles, and fills workspaces that stay
    out, peak = peak_of(call, device)
    error = ((out[:, checked].double() - expected).norm() / expected.norm()).item()
    del out
    found: dict[str, Any] = {"error": error, "peak_bytes": peak}
    found |= {} if provider.exact else {"note": "8-bit matmuls"}
    if not error < TOLERANCE[provider.exact]:
        return {**found, "status": "wrong", "reason": f"error {error:.1e} against float64; not timed"}
    return {**found, "status": "ok"}


def _timed(right: dict[str, Any], timer: Timer, rows: dict[str, Any]) -> dict[str, Any]:
    """Measures the right calls in turns; where all together do not fit, one after the other."""
    try:
        return timer(right) if right else {}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    found = {}
    for name, call in right.items():
        _release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            found |= timer({name: call})
            rows[name]["note"] = "timed alone: all together do not fit"
        except FAILURES as error:
            rows[name] |= failure(error)
    return found


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def exact_rows(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """Returns attention of the given query rows ``[1, n, H, D]`` in float64, head by head."""
    heads = []
    for h in range(q.shape[2]):
        k, v = (torch.cat([pair[i][0, :, h] for pair in sources]).double() for i in range(2))
        weights = (q[0, rows, h].double() @ k.T * q.shape[3] ** -0.5).softmax(-1)
        heads.append(weights @ v)
    return torch.stack(heads, dim=1).unsqueeze(0)


def table_entries(environment: dict[str, Any], rows: Sequence[dict[str, Any]], shapes: Sequence[Shape]) -> list[Any]:
    """Returns entries of ``configs/attention.json`` from the dense single-source measurements among the rows."""
    major, minor = environment["gpu"]["capability"]
    entries = []
    for shape in shapes:
        mine = [r for r in rows if r["shape"] == shape.name and r["status"] == "ok" and r["exact"]]
        times = {r["provider"]: r["seconds"] for r in mine if r["provider"] in ("swifti2v", "sdpa-cudnn", "sdpa-flash")}
        if len(shape.keys) == 1 and "swifti2v" in times and len(times) > 1:
            key = {"capability": 10 * major + minor, "dtype": "bfloat16", "head_dim": shape.head_dim}
            key["tokens"] = shape.keys[0]
            entries.append({**key, "card": environment["device"], "seconds": times})
    return entries


def check_reduced(shapes: Sequence[Shape], table: Table) -> list[str]:
    """Checks our kernel on shrunken shapes, interpreted, against float64; returns which are wrong."""
    wrong = []
    cases = [(dtype, limit, s) for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 2e-3)) for s in shapes]
    for i, (dtype, limit, shape) in enumerate(
        require("tqdm", "bench").tqdm(cases, leave=False, dynamic_ncols=True, disable=None)
    ):
        small = shape.reduced(130 + 7 * i)
        q, sources = inputs(small, torch.device("cpu"), dtype)
        out = own_kernel(q, sources)
        expected = exact_rows(q, sources, torch.arange(small.queries))
        error = ((out.double() - expected).norm() / expected.norm()).item()
        row = {"shape": shape.name, "dtype": str(dtype).removeprefix("torch."), "queries": small.queries}
        row |= {"keys": " + ".join(map(str, small.keys)), "error": error, "limit": limit}
        if not error < limit:
            wrong.append(f"{shape.name}, {dtype}: error {error:.1e}")
            row |= {"status": "wrong", "reason": f"more than {limit:.0e}"}
        table.add(row)
    return wrong
