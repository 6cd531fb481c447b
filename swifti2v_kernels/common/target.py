"""The GPU that a launch is for: its capability, the card that this is judged by, and what is constant in a trace."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .cards import by_capability

#: The card that compiled code of each compute capability is judged by.
TARGETS = by_capability()

_pretended: int | None = None


def constant_when_traced(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function whose result ``torch.compile`` reads once, at trace time, as a constant of the graph.

    ``torch.compiler.assume_constant_result`` does the same, but imports ``torch._dynamo`` first, which would be four
    fifths of the time that this library takes to import.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


@contextmanager
def pretend_gpu(capability: int) -> Iterator[None]:
    """Makes calls with CPU or ``meta`` tensors choose as on a GPU of this capability while the block runs.

    With ``meta`` tensors nothing runs: planners see which operators would, and what they return. Launches on CPU
    tensors are for compilers' reports, which catch them.

    Args:
        capability: the compute capability as two digits, 90 for 9.0.

    Examples:
        >>> q = torch.empty(1, 512, 8, 128, dtype=torch.bfloat16, device="meta")
        >>> with pretend_gpu(80):
        ...     print(explain(segment_attention, q, [(q, q)]))
        triton: portable (capability 8.0)
    """
    global _pretended
    before, _pretended = _pretended, capability
    try:
        yield
    finally:
        _pretended = before


def interpreting() -> bool:
    """Returns whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability_of(device: torch.device) -> int | None:
    """Returns the compute capability that a launch on ``device`` is for, as two digits (90 for 9.0).

    For the interpreter that is None.

    Raises:
        ValueError: kernels cannot run on this device; the message says what would let them.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if interpreting():
        return None
    if _pretended is not None:
        return _pretended
    raise ValueError(f"device: Triton kernels need a CUDA device (or TRITON_INTERPRET=1), got {device}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one while the block runs, since Triton launches there and not by the tensors.

    Where kernels are interpreted, it also repairs the interpreter before the first of them.
    """
    if interpreting():
        from .interpreter import repair_interpreter

        repair_interpreter()
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def for_gpu(device: torch.device) -> bool:
    """Returns whether a call with tensors on ``device`` is one on a GPU, or stands for one (:func:`pretend_gpu`)."""
    return device.type == "cuda" or (_pretended is not None and not interpreting())


# Constant for a device: under torch.compile it is read once, at trace time.
@constant_when_traced
def device_obstacle(device: torch.device) -> str | None:
    """Returns why no kernel of this library runs on ``device``, or None if they do."""
    if device.type != "cuda":
        if interpreting():
            from .interpreter import version_obstacle

            return version_obstacle()
        if _pretended is not None:
            return None
        return f"kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got {device}"
    if torch.version.hip is not None:
        return "kernels are for NVIDIA GPUs, this is an AMD one"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = capability_of(device)
    if capability is not None and capability < 80:
        return f"kernels exist for compute capability 8.0 and newer, this device has {capability / 10:.1f}"
    return None
