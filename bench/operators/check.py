"""Every case of every operator against float64, with memory that nobody has written poisoned.

The reference is the operator's own PyTorch path on the same numbers in float64, which the test suite holds against
independent implementations. Floating-point memory that is allocated while the kernel runs is filled with NaN first, so
that what a kernel leaves unwritten shows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from bench.dit.ops import relative_error
from bench.operators.discover import operator_name
from bench.records.outcome import failure
from swifti2v_kernels.common.case import Case
from swifti2v_kernels.linear.rows import QuantizedRows, quantized_reference

#: Relative L2 error against float64 above which a result is wrong: the coarsest dtype among the inputs is rounded a few
#: times. uint8 frames are rounded to whole numbers.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
WEIGHTS = ("weight", "phases")
#: Arguments that are float32 by contract, whatever the others are.
FLOAT32 = ("mask", "rope", "scales", "window")
#: The least limit of results in 8 bits: a number in the middle between two values goes to either, by its last bit.
EIGHT_BITS_LIMIT = 1e-3
#: The functions that give memory that nobody has written.
_UNWRITTEN: dict[Any, tuple[str, ...]] = {
    torch: ("empty", "empty_like", "empty_strided"),
    Tensor: ("new_empty", "new_empty_strided"),
}


def check_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Checks one case and returns its row: the largest error of its results, and what is allowed."""
    row: dict[str, Any] = {"case": case.name, "operator": operator_name(case), "limit": None}
    try:
        args, kwargs = randomised(case, device)
        coarse = _coarsest((args, kwargs))
        row["limit"] = TOLERANCE[coarse]
        expected = _result(case, *_double(case, args, kwargs))
        if any(isinstance(x, QuantizedRows) for x in leaves(expected)):
            row["limit"] = max(row["limit"], EIGHT_BITS_LIMIT)
        with poisoned():
            found = _result(case, args, kwargs)
        error = relative_error(numbers(found), numbers(expected))
    except Exception as error:  # compilers and launchers raise errors of their own kinds: all of them are findings
        return row | failure(error)
    row["error"] = error if math.isfinite(error) else None
    if not error < row["limit"]:
        return row | {"status": "wrong", "reason": f"error {error:.1e} against float64, allowed {row['limit']:.0e}"}
    return row | {"status": "ok"}


def randomised(case: Case, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a case's inputs with numbers that are not all alike."""
    torch.manual_seed(0)
    args, kwargs = case.inputs(device)
    fill(case, args, kwargs)
    return args, kwargs


def fill(case: Case, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Fills all floating-point inputs with numbers of usual size, weights scaled by their fan-in."""
    bound = inspect.signature(case.operator).bind(*args, **kwargs)
    for name, value in bound.arguments.items():
        if isinstance(value, QuantizedRows):
            _fill_rows(value, *((0, value.values.shape[-1] ** -0.5) if name in WEIGHTS else (0.1, 0.8)))
            continue
        for x in (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)):
            if x.dtype == torch.int8:
                x.random_(-127, 128)
            elif not x.is_floating_point():
                continue  # indices
            elif x.itemsize == 1:
                x.copy_(torch.empty_like(x, dtype=torch.float32).normal_(0.1, 0.8))
            elif name in WEIGHTS and x.ndim > 1:
                outputs = x.shape[1] if name == "phases" else x.shape[0]
                fan_in = x.numel() // (outputs * (x.shape[0] if name == "phases" else 1))
                x.normal_(0, fan_in**-0.5)
            elif x.ndim == 0:
                continue  # a step, or the like, whose value has a meaning
            elif "rope" in name:
                x.uniform_(-1, 1)
            else:
                x.normal_(0.1, 0.8)


def _fill_rows(rows: QuantizedRows, mean: float, deviation: float) -> None:
    """Fills rows with quantised numbers of usual size: random codes would be of any size."""
    wide = torch.empty(rows.values.shape, device=rows.values.device).normal_(mean, deviation)
    for x, made in zip(rows, quantized_reference(wide, rows.values.dtype), strict=True):
        x.copy_(made)


def _double(case: Case, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies arguments in float64, for the PyTorch path; tensors that are one remain one (``out`` and ``residual``)."""
    copies: dict[int, Tensor] = {}

    def copy(x: Tensor) -> Tensor:
        if id(x) not in copies:
            wide = x.double() if x.is_floating_point() and x.itemsize > 1 else x.clone()
            if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
                wide = wide.contiguous(memory_format=torch.channels_last_3d)
            copies[id(x)] = wide.clone(memory_format=torch.preserve_format) if wide is x else wide
        return copies[id(x)]

    bound = inspect.signature(case.operator).bind(*args, **kwargs)
    for name, value in bound.arguments.items():
        if name not in FLOAT32:
            bound.arguments[name] = tree_map_only(Tensor, copy, value)
    return bound.args, bound.kwargs | {"backend": "torch"}


def _result(case: Case, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return case.operator(*args, **kwargs)


def leaves(result: Any) -> list[Tensor | QuantizedRows]:
    """Returns the tensors that an operator returned, one by one."""
    flat, _ = tree_flatten(result, is_leaf=lambda x: isinstance(x, QuantizedRows))
    return [x for x in flat if isinstance(x, (Tensor, QuantizedRows))]


def numbers(result: Any) -> list[Tensor]:
    """Returns an operator's results in float64; quantised rows as the numbers that they stand for."""
    return [
        x.values.double() * x.scales.double().unsqueeze(-1) if isinstance(x, QuantizedRows) else x.double()
        for x in leaves(result)
    ]


def _coarsest(inputs: Any) -> torch.dtype:
    """Returns the coarsest dtype among the inputs and, where the call names it, of the result."""
    flat = tree_flatten(inputs)[0]
    dtypes = {x.dtype if isinstance(x, Tensor) else x for x in flat if isinstance(x, (Tensor, torch.dtype))}
    return max(dtypes & TOLERANCE.keys(), key=lambda dtype: TOLERANCE[dtype])


@contextmanager
def poisoned() -> Iterator[None]:
    """Makes floating-point tensors hold NaN until they are written, where they are allocated while the block runs."""

    def filled(new: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            x = new(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() and not x.requires_grad else x

        return call

    with ExitStack() as stack:
        for where, names in _UNWRITTEN.items():
            for name in names:
                stack.enter_context(patch.object(where, name, filled(getattr(where, name))))
        yield
