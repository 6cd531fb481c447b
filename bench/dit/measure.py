"""Measures operators and layers: held against float64 first, then timed; everything that fails is a row."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.dit.layer import COMPILED, LayerInputs, LayerProvider, Runner, exact_rows, layer_inputs
from bench.dit.ops import Op, relative_error
from bench.dit.providers import Provider
from bench.dit.shapes import Shape
from bench.dit.split import split_seconds
from bench.harness.timing import Timer, peak_of
from bench.records.outcome import FAILURES, failure

#: Relative L2 error against float64 above which an operator is wrong: bf16 rounds a few times, with 2**-9 each.
TOLERANCE = 8e-3
#: The same for a layer, of what it adds to the residual stream, which is rounded about 30 times. diffusers' own layer
#: comes to about 8e-3.
LAYER_TOLERANCE = 2.5e-2
#: Tokens of a layer that are compared with the exact result.
LAYER_CHECKED = 64
#: What must be reached: a fraction of the copy's bandwidth by memory-bound operators; the time of diffusers' compiled
#: layer over ours, and our peak over its, where the window has so many tokens.
COPY_TARGET, SPEED_TARGET, MEMORY_TARGET, MEMORY_TOKENS = 0.85, 1.25, 0.5, 70_400


@dataclass(frozen=True)
class Machine:
    """The device, its timer, and what it was measured to do in the same run."""

    device: torch.device
    timer: Timer
    copy_bytes_per_second: float
    matmul_tflops: float


def memory_bound(flops: int, nbytes: int, copy: float, matmul: float) -> bool:
    """Returns whether moving the bytes takes longer than the operations, at the measured rates."""
    return nbytes / copy > flops / (matmul * 1e12)


def measure_op(
    op: Op, shape: Shape, found: Sequence[Provider], dtype: torch.dtype, machine: Machine, report: Callable[..., Any]
) -> None:
    """Reports one row for every implementation of an operator; they are checked first, then timed in turns."""
    device, cost = machine.device, op.cost(shape)
    base = {"op": op.name, "shape": shape.name, "flops": cost.flops, "bytes": cost.bytes}
    bound = memory_bound(cost.flops, cost.bytes, machine.copy_bytes_per_second, machine.matmul_tflops)
    base["memory_bound"] = bound and not op.compute_bound
    torch.compiler.reset()  # otherwise the limit of recompilations counts over all shapes
    rows = {p.name: {**base, "provider": p.name, "ours": p.ours, "note": p.note} for p in found}
    calls: dict[str, Callable[[], Any]] = {}
    try:
        tokens = op.rows(shape, device)
        expected = op.exact(op.make(shape, device, dtype), tokens)
    except FAILURES as error:
        _all_failed(error, rows.values(), report)
        return
    for provider in found:

        def one(provider: Provider = provider) -> dict[str, Any]:
            provider.prepare(op.make(shape, device, dtype))()  # compiles
            inputs = op.make(shape, device, dtype)  # the first call may have written to its own
            call = provider.prepare(inputs)
            result, peak = peak_of(call, device)
            error = relative_error(op.sample(inputs, result, tokens), expected)
            calls[provider.name] = call
            return _judged({"error": error, "peak_bytes": peak}, TOLERANCE)

        rows[provider.name] |= _guarded(one, device)
    for row in _timed(rows, calls, machine):
        row["bytes_per_second"] = cost.bytes / row["seconds"]
        row["fraction_of_copy"] = row["bytes_per_second"] / machine.copy_bytes_per_second
        row["tflops"] = cost.flops / row["seconds"] / 1e12
        row["fraction_of_matmul"] = row["tflops"] / machine.matmul_tflops
    for row in rows.values():
        report(row)


def measure_layer(
    shape: Shape,
    timesteps: str,
    found: Sequence[LayerProvider],
    dtype: torch.dtype,
    machine: Machine,
    report: Callable[..., Any],
) -> None:
    """Reports one row for every implementation of a layer; they are checked first, then timed in turns."""
    device = machine.device
    base = {"shape": shape.name, "tokens": shape.tokens, "timesteps": timesteps, "flops": shape.layer_flops}
    rows = {p.name: {**base, "provider": p.name, "ours": p.ours} for p in found}
    runners: dict[str, Runner] = {}
    try:
        inputs = layer_inputs(shape, device, dtype, timesteps)
        tokens = torch.linspace(0, shape.tokens - 1, min(LAYER_CHECKED, shape.tokens), device=device).long()
        expected = exact_rows(inputs, tokens)
    except FAILURES as error:
        _all_failed(error, rows.values(), report)
        return
    for provider in found:

        def one(provider: LayerProvider = provider) -> dict[str, Any]:
            found, runners[provider.name] = _checked_layer(provider, inputs, tokens, expected, device)
            return found

        rows[provider.name] |= _guarded(one, device)
    calls = {name: runner.step for name, runner in runners.items()}
    for row in _timed(rows, calls, machine, load=lambda name: runners[name].load()):
        row["tflops"] = row["flops"] / row["seconds"] / 1e12
        row |= _split(runners[row["provider"]], device)
    for row in rows.values():
        report(row)


def _checked_layer(
    provider: LayerProvider, inputs: LayerInputs, rows: Tensor, expected: tuple[Tensor, Tensor], device: torch.device
) -> tuple[dict[str, Any], Runner]:
    runner = provider.prepare(inputs)
    runner.load()
    runner.step()  # compiles
    runner.drop()

    def layer() -> tuple[Tensor, ...]:
        runner.load()
        return runner.step()

    result, peak = peak_of(layer, device)
    before = inputs.x[:, rows].double()
    changes = [(result[0][:, rows].double() - before, expected[0] - before)]
    changes += [(norm[:, rows].double(), expected[1]) for norm in result[1:]]
    error = relative_error(*zip(*changes, strict=True))
    runner.drop()
    return _judged({"error": error, "peak_bytes": peak}, LAYER_TOLERANCE), runner


def _split(runner: Runner, device: torch.device) -> dict[str, Any]:
    """Returns the seconds of a layer by group of operators, where a profiler works."""
    try:
        found = split_seconds(runner.step, runner.attentions(), device)
    except Exception as error:  # a profiler that does not work here is no reason to lose the timing
        return {"split": {}, "split_error": str(error)[:300]}
    attention = sum(seconds for group, seconds in found.items() if "attention" in group)
    other = sum(found.values()) - attention - found.get("linear", 0.0)
    return {"split": found, "attention_seconds": attention, "linear_seconds": found.get("linear", 0.0),
            "other_seconds": other}  # fmt: skip


def _judged(found: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Adds a status to the findings: only what is right is ``ok`` and may be timed."""
    error = found["error"]
    if error < tolerance:
        return {**found, "status": "ok"}
    found["error"] = error if math.isfinite(error) else None
    return {**found, "status": "wrong", "reason": f"error {error:.1e} against float64; not timed"}


def _timed(
    rows: dict[str, dict[str, Any]],
    calls: dict[str, Callable[[], Any]],
    machine: Machine,
    load: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Measures the times of what is right, in turns, or alone where all together do not fit; returns their rows."""
    right = {name: call for name, call in calls.items() if rows[name]["status"] == "ok"}

    def timed(names: Iterable[str]) -> None:
        for name in names if load is not None else ():
            load(name)
        for name, timing in machine.timer({name: right[name] for name in names}).items():
            rows[name] |= timing.row()

    try:
        if right:
            timed(list(right))
    except Exception as error:
        for name in right:
            rows[name] |= _guarded(lambda name=name: timed([name]) or {"status": "ok"}, machine.device)
            if rows[name]["status"] == "ok":
                rows[name]["warning"] = f"timed alone ({failure(error)['reason'][:60]})"
    return [row for row in rows.values() if "seconds" in row]


def _guarded(one: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Returns what ``one`` found, or why it failed. Compilers raise errors of their own kinds, so all are caught."""
    try:
        return one()
    except Exception as error:
        return failure(error)
    finally:
        # A graph of modules and closures may hold memory that the next implementation needs.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _all_failed(error: BaseException, rows: Iterable[dict[str, Any]], report: Callable[..., Any]) -> None:
    found = failure(error)
    if found["status"] == "out of memory":
        found["reason"] = "the inputs alone do not fit"
    for row in rows:
        report({**row, **found})


def targets(ops: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what the measured rows say about the figures to be reached."""
    found: list[dict[str, Any]] = []

    def add(what: str, shape: str, unit: str, value: float, wanted: float | None, met: bool | None) -> None:
        found.append({"what": what, "shape": shape, "unit": unit, "value": value, "wanted": wanted, "met": met})

    for row in ops:
        if row["status"] == "ok" and row["ours"] and row["memory_bound"]:
            value, what = row["fraction_of_copy"], f"{row['op']} ({row['provider']})"
            add(what, row["shape"], "of the copy's bandwidth", value, COPY_TARGET, value >= COPY_TARGET)
    layers = [row for row in layers if row["status"] == "ok"]
    for row in layers:
        same = [r for r in layers if (r["shape"], r["timesteps"]) == (row["shape"], row["timesteps"])]
        compiled = next((r for r in same if r["provider"] == COMPILED), None)
        if not row["ours"] or compiled is None:
            continue
        shape, unit = f"{row['shape']}, timestep: {row['timesteps']}", "x compiled diffusers"
        value = compiled["seconds"] / row["seconds"]
        add("layer, speed", shape, unit, value, SPEED_TARGET, value >= SPEED_TARGET)
        if compiled["peak_bytes"]:
            value = row["peak_bytes"] / compiled["peak_bytes"]
            wanted = MEMORY_TARGET if row["tokens"] >= MEMORY_TOKENS else None
            met = None if wanted is None else value <= wanted
            add("layer, peak of activations", shape, unit, value, wanted, met)
    return found
