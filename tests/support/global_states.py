"""Global states of torch that a program may have set before it calls an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

State = Callable[[], AbstractContextManager[object]]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _all_at_once() -> Iterator[None]:
    with ExitStack() as stack:
        for state in STATES.values():
            if state is not _all_at_once:
                stack.enter_context(state())
        yield


STATES: dict[str, State] = {
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default dtype bfloat16": lambda: _default_dtype(torch.bfloat16),
    # What is made without a device has no values.
    "default device meta": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "deterministic algorithms": _deterministic,
    "inference mode": torch.inference_mode,
    "all at once": _all_at_once,
}
