"""Every case of every operator against float64, with memory that nobody has written poisoned.

The reference is the operator's own PyTorch path on the same numbers in float64, which the test suite holds against
independent implementations. Floating-point memory that is allocated while the kernel runs is filled with NaN first, so
that what a kernel leaves unwritten shows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from bench.operators.discover import operator_name
from bench.records.outcome import failure
from swifti2v_kernels.common.case import Arguments, Case
from swifti2v_kernels.linear.quantize_rows import QuantizedRows, quantized_reference

#: Relative L2 error against float64 above which a result is wrong: the coarsest dtype among the inputs is rounded a few
#: times. uint8 frames are rounded to whole numbers.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
WEIGHTS = ("weight", "phases")
#: Arguments that are float32 by contract, whatever the others are.
FLOAT32 = ("mask", "rope", "scales", "window")
#: The least limit of results in 8 bits: a number in the middle between two values goes to either, by its last bit. The
#: share of such numbers grows with that bit, and so the error with its root.
EIGHT_BITS_LIMIT, EIGHT_BITS_SHARE = 1e-3, 0.2
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
        expected, row["limit"] = exact(case.operator, args, kwargs)
        with poisoned(), torch.no_grad():
            found = case.operator(*args, **kwargs)
        error = relative_error(numbers(found), expected)
    except Exception as error:  # compilers and launchers raise errors of their own kinds: all of them are findings
        return row | failure(error)
    row["error"] = error if math.isfinite(error) else None
    if not error < row["limit"]:
        return row | {"status": "wrong", "reason": f"error {error:.1e} against float64, allowed {row['limit']:.0e}"}
    return row | {"status": "ok"}


@torch.no_grad()
def exact(operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], float]:
    """Returns the results of a call in float64, by the operator's PyTorch path, and the error that is allowed."""
    wide_args, wide_kwargs = _double(operator, args, kwargs)
    expected, limit = operator(*wide_args, **wide_kwargs), TOLERANCE[_coarsest((args, kwargs))]
    if any(isinstance(x, QuantizedRows) for x in leaves(expected)):
        limit = max(limit, EIGHT_BITS_LIMIT, EIGHT_BITS_SHARE * limit**0.5)
    return numbers(expected), limit


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest relative L2 error of the results; NaN if a result holds one."""
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def randomised(case: Case, device: torch.device, real: bool = False) -> Arguments:
    """Returns a case's inputs, or those of its real size, with numbers that are not all alike."""
    torch.manual_seed(0)
    args, kwargs = (case.real if real and case.real else case).inputs(device)
    for name, value in inspect.signature(case.operator).bind(*args, **kwargs).arguments.items():
        for leaf in leaves(value):
            _fill(name, leaf)
    return args, kwargs


def _fill(name: str, x: Tensor | QuantizedRows) -> None:
    """Fills an input with numbers of usual size, weights scaled by their fan-in; whole numbers are left alone."""
    if isinstance(x, QuantizedRows):  # random codes would be of any size
        wide = torch.empty(x.values.shape, device=x.values.device)
        wide.normal_(*((0, wide.shape[-1] ** -0.5) if name in WEIGHTS else (0.1, 0.8)))
        for part, made in zip(x, quantized_reference(wide, x.values.dtype), strict=True):
            part.copy_(made)
    elif x.dtype == torch.int8:
        x.random_(-127, 128)
    elif not x.is_floating_point():
        return  # indices
    elif x.itemsize == 1:
        x.copy_(torch.empty_like(x, dtype=torch.float32).normal_(0.1, 0.8))
    elif name in WEIGHTS and x.ndim > 1:
        outputs = x.shape[0] * x.shape[1] if name == "phases" else x.shape[0]
        x.normal_(0, (x.numel() // outputs) ** -0.5)
    elif "rope" in name:
        x.uniform_(-1, 1)
    elif x.ndim > 0:  # a step, or the like, has a meaning
        x.normal_(0.1, 0.8)


def _double(operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Copies arguments in float64, for the PyTorch path; tensors that are one remain one (``out`` and ``residual``)."""
    copies: dict[int, Tensor] = {}

    def copy(x: Tensor) -> Tensor:
        if id(x) not in copies:
            wide = x.double() if x.is_floating_point() and x.itemsize > 1 else x.clone()
            if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
                wide = wide.contiguous(memory_format=torch.channels_last_3d)
            copies[id(x)] = wide.clone(memory_format=torch.preserve_format) if wide is x else wide
        return copies[id(x)]

    bound = inspect.signature(operator).bind(*args, **kwargs)
    for name, value in bound.arguments.items():
        if name not in FLOAT32:
            bound.arguments[name] = tree_map_only(Tensor, copy, value)
    choice = {"backend": "torch"} if "backend" in inspect.signature(operator).parameters else {}
    return bound.args, bound.kwargs | choice


def leaves(result: Any) -> list[Tensor | QuantizedRows]:
    """Returns the tensors that an operator is given or returns, one by one."""
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
