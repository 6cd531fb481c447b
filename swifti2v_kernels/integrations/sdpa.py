"""Any model's attention on our kernels: calls of torch's own attention are routed, none of torch's names is replaced.

    with replace_sdpa(model) as calls:
        model(x)
    print(calls)

Within the block, ``torch.nn.functional.scaled_dot_product_attention`` of this thread passes through a
``TorchFunctionMode``. It sees the call whatever name the caller imported it under, nests, and ends with the block.
A call that the kernels can serve goes to :func:`swifti2v_kernels.segment_attention`; every other one goes to torch as
it came, and its reason is counted. Masks are such a reason: whether one is a mere padding cannot be known without
reading it, which would stop the GPU.

Not seen: calls in other threads, and those inside functions that a mode sees as a whole
(``torch.nn.MultiheadAttention``, ``torch.jit`` code, compiled C++). ``torch.compile`` takes the mode as part of the
state that it guards: a compiled model is compiled once more inside the block and has its own graph back after it. Its
calls are served and not counted: what traced code reads is guarded, so a count that grows would have it compiled anew
at every call. Dynamo breaks graphs at some tensor methods (``unflatten``) under any mode, so ``fullgraph=True`` may
refuse there.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention.segment_attention import segment_attention
from ..common.dispatch import BACKENDS, explain
from ..common.target import constant_when_traced


@dataclass
class AttentionCalls:
    """Counts of a model's attention calls outside compiled code; printed, one line for each kind of call.

    Attributes:
        implementations: the calls that our operator served, by the implementation that computed them.
        not_served: the other calls, by the reason; they went where they would have gone anyway.
    """

    implementations: Counter[str] = field(default_factory=Counter)
    not_served: Counter[str] = field(default_factory=Counter)

    @property
    def served(self) -> int:
        """The number of calls that our operator served."""
        return self.implementations.total()

    def count(self, served: bool, kind: str) -> None:
        """Counts a call, by the implementation that serves it or by the reason why it goes where it would have gone."""
        if not torch.compiler.is_compiling():
            (self.implementations if served else self.not_served)[kind] += 1

    def refuses(self, *reasons: tuple[bool, str]) -> bool:
        """Returns whether one of these reasons holds, whose call goes where it would have gone; counts the first."""
        reason = next((reason for holds, reason in reasons if holds), None)
        if reason is not None:
            self.count(False, reason)
        return reason is not None

    def __str__(self) -> str:
        rows = [(n, f"served by {name}") for name, n in self.implementations.most_common()]
        rows += [(n, f"not served: {reason}") for reason, n in self.not_served.most_common()]
        rows = rows or [(0, "counted; calls in compiled code are not")]
        return "\n".join(["attention calls", *(f"{n:>8}  {text}" for n, text in rows)])


@contextmanager
def replace_sdpa(module: nn.Module | None = None, *, backend: str = "auto") -> Iterator[AttentionCalls]:
    """Routes calls of torch's attention to our kernels while the block runs.

    Every call of ``torch.nn.functional.scaled_dot_product_attention`` that the kernels can serve goes to
    :func:`swifti2v_kernels.segment_attention`, and every other one to torch.

    Args:
        module: a module to which the routing is confined: only calls while its ``forward`` runs are routed. Default:
            all calls of this thread.
        backend: backend of :func:`swifti2v_kernels.segment_attention`. ``auto`` serves what the kernels take;
            ``triton`` also raises where they cannot take a call that fits the operator; ``torch`` serves with the
            operator's reference.

    Yields:
        The counts of the calls, which grow while the block runs.

    Raises:
        TypeError: ``module`` is not a module.
        ValueError: an unknown backend.

    Examples:
        >>> q = torch.randn(1, 2, 5, 64)
        >>> with replace_sdpa(backend="torch") as calls:
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> calls.served
        1
    """
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module or None, got {type(module).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    routing = _Routing(AttentionCalls(), backend, everywhere=module is None)
    hooks = []
    if module is not None:
        # First and always, so that every beginning is seen and every end, an exception's too.
        hooks.append(module.register_forward_pre_hook(lambda *_: routing.step(1), prepend=True))
        hooks.append(module.register_forward_hook(lambda *_: routing.step(-1), always_call=True))
    try:
        with routing:
            yield routing.calls
    finally:
        for hook in hooks:
            hook.remove()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calls: AttentionCalls,
    *,
    scale: float | None = None,
    valid_lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | None:
    """Returns attention ``[B, L, H, D]`` by our operator, or None if it cannot serve the call; ``calls`` counts either.

    Queries, keys and values ``[B, L, H, D]`` may be of any kind that a host has, ``valid_lengths`` are integers ``[B]``
    (how many keys of each entry count), and ``backend`` is as for :func:`replace_sdpa`.
    """
    reason = _misfit(q, k, v, scale)
    if reason is None:
        call: dict[str, Any] = {"scale": scale, "valid_lengths": [valid_lengths], "backend": backend}
        choice = explain(segment_attention, q, [(k, v)], **call)
        if choice.backend == "triton" or backend == "torch":
            calls.count(True, choice.implementation)
            return segment_attention(q, [(k, v)], **call)
        reason = choice.reason
    calls.count(False, reason)
    return None


class _Routing(TorchFunctionMode):
    """The mode that routes the calls of one thread."""

    def __init__(self, calls: AttentionCalls, backend: str, everywhere: bool) -> None:
        super().__init__()
        self.calls, self.backend = calls, backend
        #: Number of the module's forwards that run now, nested; one that never ends stands for everywhere.
        self.depth = 1 if everywhere else 0
        self.thread = _thread()

    def step(self, by: int) -> None:
        """Counts a forward of the module that begins or ends in this thread, from a hook, and changes nothing."""
        if _thread() == self.thread:
            self.depth += by

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        routed = func is F.scaled_dot_product_attention and self.depth
        out = self._serve(*args, **kwargs) if routed else None
        return func(*args, **kwargs) if out is None else out

    def _serve(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """Returns the attention ``[B, H, L, D]`` of a call of torch's function, or None if ours cannot serve it."""
        if self.calls.refuses(
            (attn_mask is not None, "attn_mask is given"),
            (is_causal, "is_causal"),
            (dropout_p > 0, "dropout_p is not 0"),
            (enable_gqa and query.shape[-3] != key.shape[-3], "enable_gqa: fewer heads of keys than of queries"),
            (not query.ndim == key.ndim == value.ndim == 4, "not [B, H, L, D]"),
        ):
            return None
        q, k, v = (autocast(x).transpose(1, 2) for x in (query, key, value))
        out = attend(q, k, v, self.calls, scale=scale, backend=self.backend)
        return None if out is None else out.transpose(1, 2)


# Constant for a trace; another thread has another stack of modes, so it does not take the same graph.
@constant_when_traced
def _thread() -> int:
    return threading.get_ident()


def autocast(x: Tensor) -> Tensor:
    """Returns ``x`` as torch's own operators are given it under autocast, for calls that come to us before."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _misfit(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> str | None:
    """Returns why a call is not one of the operator's, or None if it is; torch's attention takes more kinds."""
    if any(type(x) not in (Tensor, nn.Parameter) for x in (q, k, v)):
        return "a subclass of Tensor"
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        return "q, k and v differ in dtype or device"
    if not q.is_floating_point():
        return f"dtype {q.dtype}"
    if any((x.shape[0], *x.shape[2:]) != (q.shape[0], *q.shape[2:]) for x in (k, v)) or k.shape[1] != v.shape[1]:
        return "q, k and v differ in batch, heads or head_dim"
    if k.shape[1] == 0 or q.shape[3] == 0:
        return "no keys or no channels"
    if any(x.shape[3] > 1 and x.stride(3) != 1 for x in (q, k, v)):
        return "channels that are not contiguous"
    if scale is not None and not 0 < scale < float("inf"):
        return "scale is not positive"
    return None
