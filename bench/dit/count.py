"""Counts what can be said of operators and layers without a GPU: bytes moved and bytes alive.

The counts are made on ``meta`` tensors of the real sizes, operator by operator. Traffic: every operator reads its
operands once and writes its results once, and no cache helps. Memory: what operators return is alive until its last
reference goes; what an operator allocates inside itself is not seen. Attention and RMSNorm are one operator each, as on
CUDA.

Our kernels are wrapped in operators of their own, which run on ``meta`` tensors where Triton's interpreter is on.

What ``torch.compile`` keeps alive is Inductor's choice: its CPU module is run on a small layer of the same proportions
and its allocations counted, in copies of the residual stream. Fusions on a GPU may differ.
"""

from __future__ import annotations

import bisect
import functools
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.dit.layer import COMPILED, LAYER_PROVIDERS, TIMESTEPS, layer_inputs
from bench.dit.shapes import ITEMSIZE, Shape
from bench.dit.split import group_of, quiet_stderr
from bench.operators.peers import PEERS
from bench.records.outcome import Unavailable
from model.machine.counted import TensorMemory
from swifti2v_kernels.common.case import Case
from swifti2v_kernels.common.target import interpreting

META = torch.device("meta")
#: Operators that touch as much of their first operand as they return or are given.
_INDEXED = ("index", "index_select", "index_copy_", "index_put_")


class Traffic(TorchDispatchMode):
    """A mode that counts the bytes that operators read and write: ``with Traffic() as traffic: ...; traffic.bytes``.

    The counts are by group of operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, written = _operands(func, args, kwargs)
        name = func.name()
        bare = name.split("::")[1].split(".")[0]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        owned = {t.untyped_storage()._cdata for t in given + written}
        fresh = [t for t in results if t.untyped_storage()._cdata not in owned]
        # Views and allocations move nothing, and our GELU in place is an epilogue of the matmul on CUDA.
        if not (written or fresh) or bare.startswith(("empty", "new_empty")) or bare == "gelu_":
            return result
        if bare in _INDEXED:
            moved = 2 * _nbytes(fresh) if fresh else 2 * _nbytes(given[-1:])
        else:
            in_place = bare.endswith("_") and bare not in ("copy_", "fill_", "zero_")
            moved = _nbytes(given) + _nbytes(written) * (2 if in_place else 1) + _nbytes(fresh)
        self.bytes[group_of([name])] += moved
        return result


class CudaOperators(TorchFunctionMode):
    """A mode in which attention and RMSNorm are single operators, as on CUDA; on ``meta`` torch takes them apart."""

    def __init__(self, traffic: Traffic | None = None) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        groups = {F.scaled_dot_product_attention: "attention", F.rms_norm: "other"}
        if func not in groups:
            return func(*args, **(kwargs or {}))
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        out = torch.empty_like(given[0])
        if self.traffic is not None:
            self.traffic.bytes[groups[func]] += _nbytes([*given, out])
        return out


def _operands(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the tensors that an operator reads, and those that it is given to write."""
    given: list[Tensor] = []
    written: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        write = argument.alias_info is not None and argument.alias_info.is_write
        (written if write else given).extend(tensors)
    return given, written


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors; of an expanded tensor only what is in memory counts."""
    return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors)


def eager_bytes(case: Case) -> int:
    """Returns the predicted traffic, in bytes, of a case's call at its real size, written in plain PyTorch."""
    assert case.real is not None
    args, options = case.real.inputs(torch.device("cpu"))  # memory that nobody touches is none
    eager = next(peer for peer in PEERS[case.operator] if peer.name == "eager")
    with torch.no_grad():
        call = eager.call(case, args, options)
        args, options = tree_map_only(Tensor, lambda x: x.to(META), (call.args, call.keywords))
        with Traffic() as traffic, CudaOperators(traffic):
            call.func(*args, **options)
    return sum(traffic.bytes.values())


def op_rows(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Returns rows of every case's least cost at its real size, and the predicted traffic of its eager form."""
    rows = []
    for case in cases:
        assert case.real is not None
        cost, eager = case.real.cost, eager_bytes(case)
        row = {"op": case.name, "shape": case.real.shape, "flops": cost.flops, "bytes": cost.bytes}
        rows.append(row | {"eager_bytes": eager, "ratio": eager / cost.bytes})
    return rows


def layer_rows(shapes: Iterable[Shape], with_compiled: bool) -> list[dict[str, Any]]:
    """Returns rows of the counted peak of activations and the traffic of one layer in bf16, one an implementation.

    A row is "not available" where nothing can be counted: with our kernels without Triton's interpreter, of diffusers
    where it is not installed, of compiled code unless ``with_compiled``.
    """
    rows = []
    for shape in shapes:
        stream = shape.tokens * shape.config.dim * ITEMSIZE
        for timesteps in TIMESTEPS:
            mine = []
            for provider in LAYER_PROVIDERS:
                row = {"shape": shape.name, "timesteps": timesteps, "provider": provider.name, "basis": "counted"}
                mine.append(row | {"tokens": shape.tokens, "flops": shape.layer_flops})
                peak, traffic = None, None
                if provider.name == COMPILED and with_compiled:
                    streams = compiled_peak(proportions(shape), timesteps)
                    peak = None if streams is None else round(streams * stream)
                elif not provider.compiled and (interpreting() or not provider.kernels):
                    with suppress(Unavailable):  # diffusers is not installed: not counted
                        peak, traffic = count_layer(provider.prepare, shape, timesteps, META)
                if peak is None:
                    mine[-1] |= {"status": "not available", "reason": "not counted"}
                    continue
                mine[-1] |= {"peak_bytes": peak, "streams": peak / stream}
                if traffic is not None:
                    linear = traffic.get("linear", 0)
                    small = sum(n for group, n in traffic.items() if "attention" not in group) - linear
                    mine[-1] |= {"linear_bytes": linear, "other_bytes": small}
            compiled = next((r.get("peak_bytes") for r in mine if r["provider"] == COMPILED), None)
            rows += [r | {"ratio": r["peak_bytes"] / compiled} if compiled and "peak_bytes" in r else r for r in mine]
    return rows


def count_layer(prepare: Any, shape: Shape, timesteps: str, device: torch.device) -> tuple[int, dict[str, int]]:
    """Returns the predicted peak of activations of one call, and its traffic by group, in bytes."""
    inputs = layer_inputs(shape, device, torch.bfloat16, timesteps)
    with torch.no_grad(), CudaOperators():
        runner = prepare(inputs)
        known = [*inputs.tensors(), *_tensors(vars(runner))]
        with TensorMemory(known) as memory:
            before = memory.live
            runner.load()
            runner.step()
        peak = memory.peak - before
        with Traffic() as traffic, CudaOperators(traffic):
            runner.step()
    return peak, dict(traffic.bytes)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def proportions(shape: Shape) -> Shape:
    """Returns a small layer whose hidden features, blocks and text are to its stream what those of ``shape`` are."""
    config = shape.config
    hidden = round(128 * config.ffn_dim / config.dim)
    small = replace(config, num_heads=2, head_dim=64, num_layers=1, ffn_dim=hidden)
    return Shape("proportions", small, 5, 8, 16, 3, text=round(640 * shape.text / shape.tokens), part=64)


@functools.cache
def compiled_peak(shape: Shape, timesteps: str) -> float | None:
    """Returns the predicted peak of diffusers' compiled layer, in residual streams; None where Inductor cannot run."""
    provider = next(p for p in LAYER_PROVIDERS if p.name == COMPILED)
    try:
        with torch.no_grad():
            runner = provider.prepare(layer_inputs(shape, torch.device("cpu"), torch.bfloat16, timesteps))
            runner.load()
            runner.step()
            runner.drop()
            run = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with quiet_stderr():
                run.start()
            runner.load()
            runner.step()
            with quiet_stderr():
                run.stop()
        events = run.profiler.kineto_results.events()
    except Exception as error:  # no compiler, no diffusers, another profiler: no number then, and the rest goes on
        warnings.warn(f"torch.compile's peak is not counted: {error}", RuntimeWarning, stacklevel=2)
        return None
    return peak_of_events(events) / (shape.tokens * shape.config.dim * ITEMSIZE)


def peak_of_events(events: Iterable[Any]) -> int:
    """Returns the most bytes alive between operators; what an operator frees itself is the CPU's and not counted."""
    spans: list[tuple[int, int]] = []
    memory = []
    for event in sorted(events, key=lambda e: e.start_ns()):
        start = event.start_ns()
        if event.name() == "[memory]":
            memory.append((start, event.nbytes()))
        elif event.name().startswith("aten::") and not (spans and start < spans[-1][1]):
            spans.append((start, start + event.duration_ns()))
    live = peak = 0
    inside = -1
    for time, nbytes in memory:
        i = bisect.bisect(spans, (time, float("inf"))) - 1
        span = i if i >= 0 and time <= spans[i][1] else -1
        if span != inside or span == -1:
            peak = max(peak, live)
        inside = span
        live += nbytes
        peak = max(peak, live) if span == -1 else peak
    return max(peak, live)
