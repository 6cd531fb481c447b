"""Measures operators and layers: held against float64 first, then timed; everything that fails is a row."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.attention_providers import Unavailable
from bench.dit_block import COMPILED, BlockInputs, BlockProvider, block_inputs, exact_rows
from bench.dit_ops import Op, relative_error
from bench.dit_providers import Provider
from bench.dit_shapes import Shape
from bench.dit_split import split_seconds
from bench.timing import Timer, failure, peak_of

#: Relative L2 error against float64 above which an operator is wrong: bf16 rounds a few times, with 2**-9 each.
TOLERANCE = 8e-3
#: The same for a layer, of what it adds to the residual stream: about 30 roundings lie behind it. diffusers' own block
#: comes to about 8e-3.
BLOCK_TOLERANCE = 2.5e-2
#: Tokens of a layer that are compared with the exact result.
BLOCK_CHECKED = 64
#: What must be reached: of the copy's bandwidth by operators that memory bounds; of the compiled layer's time and
#: memory by ours, memory where the window has so many tokens.
COPY_TARGET, SPEED_TARGET, MEMORY_TARGET, MEMORY_TOKENS = 0.85, 1.25, 0.5, 70_400


@dataclass(frozen=True)
class Machine:
    """Where it runs, and what the machine was measured to do in the same run."""

    device: torch.device
    timer: Timer
    copy_bytes_per_second: float
    matmul_tflops: float


def memory_bound(flops: int, nbytes: int, copy: float, matmul: float) -> bool:
    """Whether moving the bytes takes longer than the products, at the measured rates."""
    return nbytes / copy > flops / (matmul * 1e12)


def measure_op(
    op: Op, shape: Shape, found: Sequence[Provider], dtype: torch.dtype, machine: Machine, report: Callable[..., None]
) -> None:
    """One row for every implementation of an operator, each given to ``report`` as it is ready."""
    device, cost = machine.device, op.cost(shape)
    base = {"part": "op", "op": op.name, "shape": shape.name, "flops": cost.flops, "bytes": cost.bytes}
    bound = memory_bound(cost.flops, cost.bytes, machine.copy_bytes_per_second, machine.matmul_tflops)
    base["memory_bound"] = bound and not op.compute_bound
    torch.compiler.reset()  # otherwise the limit of recompilations counts over all shapes
    try:
        rows = op.rows(shape, device)
        expected = op.exact(op.make(shape, device, dtype), rows)
    except (RuntimeError, MemoryError) as error:
        _all_failed(error, [{**base, "provider": p.name, "ours": p.ours} for p in found], report)
        return
    for provider in found:
        row = {**base, "provider": provider.name, "ours": provider.ours, "note": provider.note}

        def one(provider: Provider = provider) -> dict[str, Any]:
            provider.prepare(op.make(shape, device, dtype))()  # compiles
            inputs = op.make(shape, device, dtype)  # the first call may have written to its own
            call = provider.prepare(inputs)
            result, peak = peak_of(call, device)
            error = relative_error(op.sample(inputs, result, rows), expected)
            del result
            return _timed({"error": error, "peak_bytes": peak}, TOLERANCE, call, machine)

        row |= _guarded(one, device)
        if row["status"] == "ok":
            row["bytes_per_second"] = cost.bytes / row["seconds"]
            row["fraction_of_copy"] = row["bytes_per_second"] / machine.copy_bytes_per_second
            row["tflops"] = cost.flops / row["seconds"] / 1e12
            row["fraction_of_matmul"] = row["tflops"] / machine.matmul_tflops
        report(row)


def measure_block(
    shape: Shape,
    timesteps: str,
    found: Sequence[BlockProvider],
    dtype: torch.dtype,
    machine: Machine,
    report: Callable[..., None],
) -> None:
    """One row for every implementation of a layer, each given to ``report`` as it is ready."""
    device = machine.device
    base = {"part": "block", "shape": shape.name, "tokens": shape.tokens, "timesteps": timesteps}
    base["flops"] = shape.block_flops
    try:
        inputs = block_inputs(shape, device, dtype, timesteps)
        rows = torch.linspace(0, shape.tokens - 1, min(BLOCK_CHECKED, shape.tokens), device=device).long()
        expected = exact_rows(inputs, rows)
    except (RuntimeError, MemoryError) as error:
        _all_failed(error, [{**base, "provider": p.name, "ours": p.ours} for p in found], report)
        return
    for provider in found:
        row = {**base, "provider": provider.name, "ours": provider.ours}

        def one(provider: BlockProvider = provider) -> dict[str, Any]:
            return _one_block(provider, inputs, rows, expected, machine)

        row |= _guarded(one, device)
        if row["status"] == "ok":
            row["tflops"] = row["flops"] / row["seconds"] / 1e12
        report(row)


def _one_block(
    provider: BlockProvider, inputs: BlockInputs, rows: Tensor, expected: tuple[Tensor, Tensor], machine: Machine
) -> dict[str, Any]:
    runner = provider.prepare(inputs)
    runner.load()
    runner.step()  # compiles
    runner.drop()

    def layer() -> tuple[Tensor, ...]:
        runner.load()
        return runner.step()

    result, peak = peak_of(layer, machine.device)
    before = inputs.x[:, rows].double()
    changes = [(result[0][:, rows].double() - before, expected[0] - before)]
    changes += [(norm[:, rows].double(), expected[1]) for norm in result[1:]]
    error = relative_error(*zip(*changes, strict=True))
    del result
    found = _timed({"error": error, "peak_bytes": peak}, BLOCK_TOLERANCE, runner.step, machine)
    if found["status"] == "ok":
        try:
            found["split"] = split_seconds(runner.step, runner.attentions(), machine.device)
        except Exception as error:  # a profiler that does not work here is no reason to lose the timing
            found |= {"split": {}, "split_error": str(error)[:300]}
    return found


def _timed(found: dict[str, Any], tolerance: float, call: Callable[[], Any], machine: Machine) -> dict[str, Any]:
    """Times what is right."""
    error = found["error"]
    if not error < tolerance:
        found["error"] = error if math.isfinite(error) else None
        return {**found, "status": "wrong", "reason": f"error {error:.1e} against float64; not timed"}
    seconds, low, high = machine.timer(call)
    return {**found, "status": "ok", "seconds": seconds, "seconds_20": low, "seconds_80": high}


def _guarded(one: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """The row's findings, or why there are none. Compilers raise errors of their own kinds, so all are caught."""
    try:
        return one()
    except Unavailable as reason:
        return {"status": "not available", "reason": str(reason)}
    except Exception as error:
        return failure(error)
    finally:
        # A graph of modules and closures may hold memory that the next implementation needs.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _all_failed(error: BaseException, rows: list[dict[str, Any]], report: Callable[..., None]) -> None:
    found = failure(error)
    if found["status"] == "out of memory":
        found["reason"] = "the inputs alone do not fit"
    for row in rows:
        report({**row, **found})


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the measured rows say about the figures to be reached."""
    found: list[dict[str, Any]] = []

    def add(what: str, shape: str, unit: str, value: float, wanted: float | None, met: bool | None) -> None:
        found.append({"what": what, "shape": shape, "unit": unit, "value": value, "wanted": wanted, "met": met})

    measured = [row for row in rows if row["status"] == "ok"]
    for row in measured:
        if row["part"] == "op" and row["ours"] and row["memory_bound"]:
            value, what = row["fraction_of_copy"], f"{row['op']} ({row['provider']})"
            add(what, row["shape"], "of the copy's bandwidth", value, COPY_TARGET, value >= COPY_TARGET)
    layers = [row for row in measured if row["part"] == "block"]
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
