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
calls are served and not counted (:mod:`~swifti2v_kernels.integrations.calls`), which the printed counts say. Dynamo
breaks graphs at some tensor methods (``unflatten``) under any mode, so ``fullgraph=True`` may refuse there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention.segment_attention import segment_attention
from ..common.dispatch import BACKENDS, explain
from ..common.tracing import constant_when_traced
from .calls import AttentionCalls


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
    """Returns attention ``[B, L, H, D]`` by our operator, or None if it cannot serve the call; counted either way.

    Args:
        q: queries ``[B, L, H, D]``, of any kind that a host may have.
        k: keys, likewise.
        v: values, likewise.
        calls: the counts that the call is added to.
        scale: factor on the logits; default ``D ** -0.5``.
        valid_lengths: None or integers ``[B]``, how many keys of each entry count.
        backend: ``auto``, ``torch`` or ``triton``, as for :func:`replace_sdpa`.
    """
    reason = _misfit(q, k, v, scale)
    if reason is None:
        call: dict[str, Any] = {"scale": scale, "valid_lengths": [valid_lengths], "backend": backend}
        choice = explain(segment_attention, q, [(k, v)], **call)
        if choice.backend == "triton" or backend == "torch":
            calls.serve(choice.implementation)
            return segment_attention(q, [(k, v)], **call)
        reason = choice.reason
    calls.decline(reason)
    return None


class _Routing(TorchFunctionMode):
    """The mode that routes calls, for one thread.

    A mode is a thread's own, hooks are not: a forward in another thread must not open this one.
    """

    def __init__(self, calls: AttentionCalls, backend: str, everywhere: bool) -> None:
        super().__init__()
        self.calls, self.backend = calls, backend
        #: Number of the module's forwards that run now, nested; one that never ends stands for everywhere.
        self.depth = 1 if everywhere else 0
        self.thread = _thread()

    def step(self, by: int) -> None:
        """Counts a forward of the module that begins or ends, from a hook, and changes nothing."""
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
        if func is not F.scaled_dot_product_attention or not self.depth:
            return func(*args, **kwargs)
        out = _sdpa(self.calls, self.backend, *args, **kwargs)
        return func(*args, **kwargs) if out is None else out


# Constant for a trace; another thread has another stack of modes, so it does not take the same graph.
@constant_when_traced
def _thread() -> int:
    return threading.get_ident()


def _sdpa(
    calls: AttentionCalls,
    backend: str,
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
    """Returns the attention ``[B, H, L, D]`` of a call of torch's function, or None if our operator cannot serve it."""
    if calls.refuses(
        (attn_mask is not None, "attn_mask is given"),
        (is_causal, "is_causal"),
        (dropout_p > 0, "dropout_p is not 0"),
        (enable_gqa and query.shape[-3] != key.shape[-3], "enable_gqa: fewer heads of keys than of queries"),
        (not query.ndim == key.ndim == value.ndim == 4, "not [B, H, L, D]"),
    ):
        return None
    q, k, v = (autocast(x).transpose(1, 2) for x in (query, key, value))
    out = attend(q, k, v, calls, scale=scale, backend=backend)
    return None if out is None else out.transpose(1, 2)


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
