"""Measures layers, and says what measured rows say about the figures to be reached."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.dit.layer import COMPILED, LayerInputs, LayerProvider, Runner, exact_rows, layer_inputs
from bench.dit.shapes import Shape
from bench.dit.split import split_seconds, three_parts
from bench.harness.timing import Timer, peak_of
from bench.operators.check import relative_error
from bench.operators.compare import Ready, compare, inputs_failed
from swifti2v_kernels.common.shapes import WINDOWS

#: Relative L2 error against float64 above which a layer is wrong, of what it adds to the residual stream, which is
#: rounded about 30 times. diffusers' own layer comes to about 8e-3.
LAYER_TOLERANCE = 2.5e-2
#: Tokens of a layer that are compared with the exact result.
LAYER_CHECKED = 64
#: What must be reached: a fraction of the copy's bandwidth by memory-bound operators; the time of diffusers' compiled
#: layer over ours, and our peak over its, where the window has so many tokens.
COPY_TARGET, SPEED_TARGET, MEMORY_TARGET = 0.85, 1.25, 0.5
MEMORY_TOKENS = WINDOWS["CSG window 2560x1408, 1.3B"].tokens


def measure_layer(
    shape: Shape, timesteps: str, found: Sequence[LayerProvider], dtype: torch.dtype, device: torch.device, timer: Timer
) -> list[dict[str, Any]]:
    """Returns one row for every implementation of a layer; they are checked first, then timed in turns."""
    base = {"shape": shape.name, "tokens": shape.tokens, "timesteps": timesteps, "flops": shape.layer_flops}
    rows = {p.name: {**base, "provider": p.name, "ours": p.ours} for p in found}
    runners: dict[str, Runner] = {}
    try:
        inputs = layer_inputs(shape, device, dtype, timesteps)
        tokens = torch.linspace(0, shape.tokens - 1, min(LAYER_CHECKED, shape.tokens), device=device).long()
        expected = exact_rows(inputs, tokens)
    except Exception as error:
        return [row | inputs_failed(error) for row in rows.values()]

    def ready(provider: LayerProvider) -> Ready:
        runner = provider.prepare(inputs)
        runner.load()
        runner.step()  # compiles
        runner.drop()

        def layer() -> tuple[Tensor, ...]:
            runner.load()
            return runner.step()

        result, peak = peak_of(layer, device)
        error = _error(result, inputs, tokens, expected)
        runner.drop()
        runners[provider.name] = runner
        return Ready(runner.step, error, LAYER_TOLERANCE, peak)

    attempts = {p.name: functools.partial(ready, p) for p in found}
    compare(rows, attempts, device, timer, load=lambda name: runners[name].load())
    for name, row in rows.items():
        if "seconds" in row:
            row["tflops"] = row["flops"] / row["seconds"] / 1e12
            row |= _split(runners[name], device)
    return [*rows.values()]


def _error(result: tuple[Tensor, ...], inputs: LayerInputs, rows: Tensor, expected: tuple[Tensor, Tensor]) -> float:
    """Returns the error of a layer's update of the residual stream and, where it has one, of its norm."""
    before = inputs.x[:, rows].double()
    changes = [(result[0][:, rows].double() - before, expected[0] - before)]
    changes += [(norm[:, rows].double(), expected[1]) for norm in result[1:]]
    return relative_error(*zip(*changes, strict=True))


def _split(runner: Runner, device: torch.device) -> dict[str, Any]:
    """Returns the seconds of a layer by group of operators, where a profiler works."""
    try:
        found = split_seconds(runner.step, runner.attentions(), device)
    except Exception as error:  # a profiler that does not work here is no reason to lose the timing
        return {"split": {}, "split_error": str(error)[:300]}
    return {"split": found, **{f"{part}_seconds": seconds for part, seconds in three_parts(found).items()}}


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
