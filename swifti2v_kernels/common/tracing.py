"""A mark for functions that ``torch.compile`` calls once instead of tracing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_when_traced(fn: F) -> F:
    """Marks a function whose result ``torch.compile`` reads once, at trace time, as a constant of the graph.

    ``torch.compiler.assume_constant_result`` does the same, but imports ``torch._dynamo`` first, which would be four
    fifths of the time that this library takes to import.
    """
    fn._dynamo_marked_constant = True
    return fn
