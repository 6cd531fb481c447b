"""The choice between an operator's PyTorch reference and its Triton kernels, which :func:`explain` tells for any call.

``backend="auto"`` takes the kernels for CUDA tensors (and on the CPU under ``TRITON_INTERPRET=1``) and the reference
for everything that the kernels do not cover: other devices and dtypes, and calls that are differentiated or vectorised
(gradients, forward-mode derivatives, all transforms of ``torch.func``). The environment variable ``SWIFTI2V_BACKEND``
replaces ``auto`` for the whole process.

No operator depends on torch's global state: results have the dtypes that its documentation says, under autocast too.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .target import constant_when_traced, device_obstacle

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


class Question(str):
    """The ``backend`` of a call that is only asked what would compute it."""


#: The operators that have a kernel and so a choice: each ends in :func:`compute`, or answers a question itself.
_OPERATORS: set[Callable[..., Any]] = set()
#: Devices whose autocast changes the dtypes of torch's functions.
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
_asked: str | None = None


def public_operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates an operator: it runs without autocast, and :func:`explain` knows it if it has a ``backend``."""

    @functools.wraps(function)
    def operator(*args: Any, **kwargs: Any) -> Any:
        # Spelled out by a plain ``with``, which ``torch.compile`` traces.
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return operator(*args, **kwargs)
        return function(*args, **kwargs)

    if "backend" in inspect.signature(function).parameters:
        _OPERATORS.add(operator)
    return operator


def compute(
    call: Any,
    backend: str,
    *,
    preference: Callable[[Any], str | None] | None = None,
    told: Callable[[Any, str, str], Choice] | None = None,
) -> Any:
    """Returns what an operator's call gives: it is checked, a backend is chosen, and that one computes it.

    Args:
        call: a NamedTuple of the arguments, in the order of the registered operator, with the methods ``check()``,
            which raises the error of an argument that breaks the contract, ``obstacle()``, which returns why the
            kernels cannot take the call (None if they can), and ``by_torch()`` and ``by_kernel()``, which return the
            result.
        backend: the operator's argument. Of a :class:`Question` the answer is returned, a :class:`Choice`.
        preference: why ``auto`` takes PyTorch for a call that the kernels can take, or None if it does not.
        told: the choice of a call by backend and reason, where the two are not ``reference`` and ``fused kernel``.
    """
    call.check()
    obstacle = call.obstacle()
    preferred = preference(call) if preference is not None and obstacle is None and backend == "auto" else None
    chosen, reason = ("torch", preferred) if preferred else pick_backend(backend, obstacle)
    if isinstance(backend, Question):
        name = "reference" if chosen == "torch" else "fused kernel"
        return Choice(chosen, name, reason) if told is None else told(call, chosen, reason)
    return call.by_torch() if chosen == "torch" else call.by_kernel()


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
    if operator not in _OPERATORS:
        known = ", ".join(sorted(o.__name__ for o in _OPERATORS))
        raise ValueError(f"operator: expected one of {known}, got {getattr(operator, '__name__', operator)}")
    return operator(*args, **{**kwargs, "backend": Question(kwargs.get("backend", "auto"))})


def derivative_obstacle(tensors: Iterable[Tensor | None]) -> str | None:
    """Returns which derivative or transform is asked for, of which a kernel knows nothing, or None if there is none."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "an input needs gradients, which no kernel computes"
    return transform()


def transform() -> str | None:
    """Returns which transform of ``torch.func`` or forward mode is on, in words, or None.

    A kernel would see tensors without their tangents or batches. While a graph is traced it cannot be known which
    tensors have tangents, so the level alone decides.
    """
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active, which no kernel knows"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are on, which no kernel computes"
    return None


def kernel_obstacle(tensors: Iterable[Tensor | None]) -> str | None:
    """Returns why a forward kernel for 16 and 32 bits cannot take a call with these tensors, or None if it can."""
    present = [t for t in tensors if t is not None]
    reason = derivative_obstacle(present) or device_obstacle(present[0].device)
    if reason is not None:
        return reason
    odd = {str(t.dtype) for t in present if t.dtype not in KERNEL_DTYPES and t.is_floating_point()}
    return f"kernels exist for float16, bfloat16 and float32, got {', '.join(sorted(odd))}" if odd else None


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Replaces ``auto`` by this backend for all calls of the process while the block runs.

    It goes before the environment variable ``SWIFTI2V_BACKEND``, which does the same for the whole process. Calls that
    name a backend are not changed, and graphs that ``torch.compile`` has traced already keep theirs.

    Args:
        backend: ``torch``, or ``triton`` for the kernels wherever they can take a call, or ``auto``.

    Raises:
        ValueError: an unknown backend.

    Examples:
        >>> x = torch.randn(1, 6, 32)
        >>> with use_backend("torch"):
        ...     print(explain(norm_modulate, x))
        torch: reference (use_backend is 'torch')
    """
    global _asked
    before, _asked = _asked, _known_backend("backend", backend)
    try:
        yield
    finally:
        _asked = before


def default_backend() -> str:
    """Returns the backend that :func:`use_backend` or else the environment asks for; ``auto`` where neither does.

    Raises:
        ValueError: the environment names an unknown one.

    Examples:
        >>> with use_backend("torch"):
        ...     default_backend()
        'torch'
    """
    return _known_backend(ENVIRONMENT_VARIABLE, _environment())


# Constant for one process: under torch.compile it is read once, at trace time.
@constant_when_traced
def _environment() -> str:
    return _asked or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def _known_backend(source: str, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def pick_backend(requested: str, obstacle: str | None) -> tuple[str, str]:
    """Returns the backend that computes a call with this argument ``backend``, and the reason.

    ``obstacle`` is why the kernels cannot take the call; None if they can.

    Raises:
        ValueError: an unknown backend, or the kernels are asked for by name where they cannot run.
    """
    source, requested = "backend", _known_backend("backend", requested)
    if requested == "auto" and (default := default_backend()) != "auto":
        source, requested = "use_backend" if _asked else ENVIRONMENT_VARIABLE, default
    if requested == "torch":
        return "torch", f"{source} is 'torch'"
    # From the environment it is a preference for all calls, some of which have no kernel.
    if requested == "triton" and obstacle is not None and source == "backend":
        raise ValueError(f"backend: 'triton' cannot take this call: {obstacle}")
    if obstacle is not None:
        return "torch", obstacle
    return "triton", "the kernels cover this call" if requested == "auto" else f"{source} is 'triton'"
