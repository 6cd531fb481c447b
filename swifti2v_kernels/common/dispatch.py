"""The choice between an operator's PyTorch reference and its Triton kernels, which :func:`explain` tells for any call.

``backend="auto"`` takes the kernels for CUDA tensors (and on the CPU under ``TRITON_INTERPRET=1``) and the reference
for everything that the kernels do not cover: other devices and dtypes, and inputs that need gradients. The environment
variable ``SWIFTI2V_BACKEND`` replaces ``auto`` for the whole process.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .target import device_obstacle
from .tracing import constant_when_traced

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT_VARIABLE = "SWIFTI2V_BACKEND"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """The answer of :func:`swifti2v_kernels.explain`: what computes a call, and why.

    Attributes:
        backend: ``torch`` or ``triton``, as operators take it as their argument.
        implementation: the kernel or the library function of that backend, such as ``hopper`` or ``reference``.
        reason: why it is this one, such as ``the kernels cover this call``.
    """

    backend: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.implementation} ({self.reason})"


_CHOOSERS: dict[Callable[..., Any], Callable[..., Choice]] = {}


def explained_by(chooser: Callable[..., Choice]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator for operators; ``chooser`` takes all arguments of a call by name and gives its choice."""

    def mark(operator: Callable[..., Any]) -> Callable[..., Any]:
        _CHOOSERS[operator] = chooser
        return operator

    return mark


def explain(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Returns what would compute ``operator(*args, **kwargs)``, without computing it.

    Args:
        operator: a function of this library, such as :func:`swifti2v_kernels.segment_attention`.
        *args: positional arguments of the call in question.
        **kwargs: keyword arguments of the call in question.

    Returns:
        The backend, the implementation and the reason; printed, one line.

    Raises:
        ValueError: the operator has one implementation only, or the arguments break its contract.

    Examples:
        >>> q = torch.randn(1, 5, 2, 64)
        >>> print(explain(segment_attention, q, [(q, q)]))
        torch: reference (kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got cpu)
    """
    if operator not in _CHOOSERS:
        known = ", ".join(sorted(o.__name__ for o in _CHOOSERS))
        raise ValueError(f"operator: expected one of {known}, got {getattr(operator, '__name__', operator)}")
    bound = inspect.signature(operator).bind(*args, **kwargs)
    bound.apply_defaults()
    return _CHOOSERS[operator](**bound.arguments)


def kernel_obstacle(tensors: Iterable[Tensor | None]) -> str | None:
    """Returns why a forward kernel for 16 and 32 bits cannot take a call with these tensors, or None if it can."""
    present = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in present):
        return "an input needs gradients, and the kernel has no backward"
    if (reason := device_obstacle(present[0].device)) is not None:
        return reason
    odd = {str(t.dtype) for t in present if t.is_floating_point() and t.dtype not in KERNEL_DTYPES}
    return f"kernels exist for float16, bfloat16 and float32, got {', '.join(sorted(odd))}" if odd else None


# Constant for one process: under torch.compile it is read once, at trace time.
@constant_when_traced
def environment_backend() -> str:
    """Returns the backend that the environment asks for; ``auto`` where it asks for none."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto")


def pick_backend(requested: str, obstacle: str | None) -> tuple[str, str]:
    """Returns the backend that computes a call, and the reason.

    Args:
        requested: the operator's ``backend`` argument.
        obstacle: why the kernels cannot take this call; None if they can.

    Raises:
        ValueError: an unknown backend, or the kernels are asked for by name where they cannot run.
    """
    source = "backend"
    if requested == "auto":
        environment = environment_backend()
        if environment != "auto":
            source, requested = ENVIRONMENT_VARIABLE, environment
    if requested not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "torch":
        return "torch", f"{source} is 'torch'"
    if requested == "triton":
        # From the environment it is a preference for all calls, some of which have no kernel.
        if obstacle is not None and source == "backend":
            raise ValueError(f"backend: 'triton' cannot take this call: {obstacle}")
        return ("torch", obstacle) if obstacle is not None else ("triton", f"{source} is 'triton'")
    return ("torch", obstacle) if obstacle is not None else ("triton", "the kernels cover this call")
