"""The host's share of an operator's call: checks, the choice of what computes it, and the launcher up to the launch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from swifti2v_kernels.common.case import Case

CALLS = 50


@contextmanager
def without_launches() -> Iterator[None]:
    """Makes Triton kernels do nothing while the block runs: no compilation, no launch, no interpretation."""
    before = [(kind, kind.run) for kind in (JITFunction, InterpretedFunction)]
    for kind, _ in before:
        kind.run = _nothing
    try:
        yield
    finally:
        for kind, run in before:
            kind.run = run


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    return None


def host_seconds(case: Case, device: torch.device) -> float:
    """Returns the median time of the case's call on ``device`` with :func:`without_launches`, in seconds.

    What torch computes in place of a kernel, it computes.
    """
    args, kwargs = case.inputs(device)
    times = []
    with without_launches(), torch.no_grad():
        for _ in range(CALLS):
            begin = time.perf_counter()
            case.operator(*args, **kwargs)
            times.append(time.perf_counter() - begin)
    return statistics.median(times)
