"""Compares implementations of one call: held against float64 first, then timed in turns; what fails is a row.

Operators, attention and whole layers are compared so. Fractions are of a copy's and a matmul's speed in the same run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.timing import Ceilings, Timer, peak_of
from bench.operators.check import exact, numbers, randomised, relative_error
from bench.operators.peers import Peer
from bench.records.outcome import failure
from model.machine.host import release
from swifti2v_kernels.common.case import Arguments, Case, Cost

#: How much more 8-bit matmuls may err than what they are to replace.
COARSE = 10


class Ready(NamedTuple):
    """An implementation that has run once: its call, its error against float64 and what is allowed, its peak."""

    call: Callable[[], Any]
    error: float
    limit: float
    peak_bytes: int


#: Returns, of a call's arguments, the exact results, the error that is allowed, and what of results is held to them.
Exact = Callable[[Case, Arguments], tuple[list[Tensor], float, Callable[[Any], list[Tensor]]]]


def by_reference(case: Case, inputs: Arguments) -> tuple[list[Tensor], float, Callable[[Any], list[Tensor]]]:
    """Returns the whole result of the operator's PyTorch path in float64."""
    return *exact(case.operator, *inputs), numbers


def compare_case(
    case: Case, found: Sequence[Peer], device: torch.device, timer: Timer, ceilings: Ceilings,
    how: Exact = by_reference, shared: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns one row for every implementation of a case's call at its real size.

    Args:
        case: the case, which has a real size.
        found: the implementations.
        device: where they run.
        timer: times the right ones.
        ceilings: what the device was measured to do in the same run.
        how: what results are held against.
        shared: whether all have the same inputs, since none writes to them; else each has its own.
    """
    assert case.real is not None
    inputs = functools.partial(randomised, case, device, real=True)
    inputs = functools.cache(inputs) if shared else inputs
    cost, rows = case.real.cost, {}
    copied = cost.bytes / ceilings.copy_bytes_per_second > cost.flops / (ceilings.matmul_tflops * 1e12)
    for peer in found:
        rows[peer.name] = {"shape": case.real.shape, "provider": peer.name, "ours": peer.ours, "exact": peer.exact}
        rows[peer.name] |= {"flops": cost.flops, "bytes": cost.bytes, "memory_bound": copied}
        rows[peer.name] |= {"note": peer.note} if peer.note else {}
    torch.compiler.reset()  # otherwise the limit of recompilations counts over all shapes
    try:
        with torch.no_grad():
            expected, limit, sampled = how(case, inputs())
    except Exception as error:
        return [row | inputs_failed(error) for row in rows.values()]

    def ready(peer: Peer) -> Ready:
        peer.call(case, *inputs())()  # compiles, and fills workspaces that stay
        call = peer.call(case, *inputs())  # the first may have written to its own
        result, peak = peak_of(call, device)
        return Ready(call, relative_error(sampled(result), expected), limit * (1 if peer.exact else COARSE), peak)

    with torch.no_grad():
        compare(rows, {peer.name: lambda peer=peer: ready(peer) for peer in found}, device, timer)
    for row in rows.values():
        if "seconds" in row:
            row |= rates(cost, row["seconds"], ceilings)
    return [*rows.values()]


def rates(cost: Cost, seconds: float, ceilings: Ceilings) -> dict[str, float]:
    """Returns bandwidth and rate of a call's least cost, and their fractions of what was measured in the same run."""
    rate, tflops = cost.bytes / seconds, cost.flops / seconds / 1e12
    return {
        "bytes_per_second": rate, "fraction_of_copy": rate / ceilings.copy_bytes_per_second, "tflops": tflops,
        "fraction_of_matmul": tflops / ceilings.matmul_tflops,
    }  # fmt: skip


def compare(
    rows: dict[str, dict[str, Any]],
    attempts: Mapping[str, Callable[[], Ready]],
    device: torch.device,
    timer: Timer,
    load: Callable[[str], object] = lambda name: None,
) -> None:
    """Fills rows by name: each attempt is checked, what is right is timed in turns, or alone where all do not fit.

    Args:
        rows: the rows to fill.
        attempts: by the same names, what makes an implementation ready.
        device: where they run.
        timer: times the right ones.
        load: called with a name before its call is timed.
    """
    calls = {}

    def guarded(name: str, one: Callable[[], Mapping[str, Any]]) -> None:
        # Compilers raise errors of their own kinds, so all are caught.
        try:
            rows[name] |= one()
        except Exception as error:
            rows[name] |= failure(error)
        finally:
            release(device)  # a graph of modules may hold memory that the next implementation needs

    def checked(name: str) -> dict[str, Any]:
        found = attempts[name]()
        row = {"error": found.error if math.isfinite(found.error) else None, "peak_bytes": found.peak_bytes}
        if not found.error < found.limit:
            return row | {"status": "wrong", "reason": f"error {found.error:.1e}, allowed {found.limit:.0e}; not timed"}
        calls[name] = found.call
        return row | {"status": "ok"}

    def timed(names: Iterable[str]) -> None:
        for name in names:
            load(name)
        for name, timing in timer({name: calls[name] for name in names}).items():
            rows[name] |= timing.row()

    for name in attempts:
        guarded(name, lambda name=name: checked(name))
    try:
        if calls:
            timed(calls)
    except Exception as error:
        reason = failure(error)["reason"][:60]
        for name in calls:
            guarded(name, lambda name=name: timed([name]) or {"warning": f"timed alone ({reason})"})


def inputs_failed(error: BaseException) -> dict[str, str]:
    """Returns status and reason of the rows of a call whose inputs, or exact results, cannot be had."""
    found = failure(error)
    return found | ({"reason": "the inputs alone do not fit"} if found["status"] == "out of memory" else {})
