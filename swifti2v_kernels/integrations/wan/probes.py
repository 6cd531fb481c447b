"""Trials of the replacements for modules that only their names tell (:mod:`~swifti2v_kernels.integrations.probing`).

Projections, the feed-forward network and, within a layer, attention are stand-ins: both codes call them as modules, and
their weights are large. ``flash_attention`` is another stand-in, for host and ours: the host's may not run here.

Cross-attention needs no trial, since it stays the host's own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import AttentionCalls
from ..probing import RETURNS, Forward, Outcome, Trial, magnitudes, twin
from .dit import Attention, self_attention_forward

#: Tokens, the last two of which are padding.
_TOKENS, _GRID = 14, (2, 2, 3)
_EXACT, _ROUNDED = 1e-4, 0.05


class _Tried(Attention):
    """An attention whose ``flash_attention`` is cheap, and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__(AttentionCalls())
        self.seen: list[Any] = []

    def function(self, host: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Returns a function of all that attention depends on."""
        signature = inspect.signature(super().function(host))

        def flash_attention(*args: Any, **kwargs: Any) -> Tensor:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            q, k, v, *others = bound.arguments.values()
            self.seen.append(others)
            length = bound.arguments["k_lens"]
            valid = 1.0 if length is None else (torch.arange(k.shape[1]) < length[:, None])[:, :, None, None]
            return (q * (k.float() * v.float() * valid).mean(1, keepdim=True)).to(q.dtype)

        return flash_attention


def self_attention_probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of ``WanSelfAttention``, in float32 and as under autocast."""
    made = twin(module, torch.float32, ("q", "k", "v", "o"))
    x = _tokens(made.num_heads * made.head_dim)
    angles = torch.rand(max(_GRID), made.head_dim // 2, generator=_generator(), dtype=torch.float64)
    given = x, torch.tensor([12, 9]), torch.tensor([_GRID, _GRID]), torch.polar(torch.ones_like(angles), 3 * angles)

    def run(ours: bool, casts: bool) -> Outcome:
        tried = _Tried()
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            out = self_attention_forward(tried)(made, *given) if ours else ""
            # What ours does not take is the host's.
            out = tried.forward(type(module))(made, *given) if isinstance(out, str) else out
        return {RETURNS: out, "it calls flash_attention in another way": tried.seen}

    for casts, tolerance in ((False, _EXACT), (True, _ROUNDED)):
        yield Trial(partial(run, False, casts), [partial(run, True, casts)], tolerance)


def layer_probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of ``WanAttentionBlock`` with ``e`` as in 2.1 and as in 2.2; a host takes one of them."""
    made = twin(module, torch.float32, ("self_attn", "cross_attn", "ffn"))
    x = _tokens(made.modulation.shape[-1])
    grids, freqs = torch.tensor([_GRID, _GRID]), torch.ones(3, 2, dtype=torch.complex128)
    others = torch.tensor([12, 9]), grids, freqs, 0.5 * x[:, :5], torch.tensor([5, 3])
    for shape in ((), (_TOKENS,)):
        e = 0.5 * torch.randn(2, *shape, 6, x.shape[2], generator=_generator(), dtype=torch.float32)
        for dtype, tolerance in ((torch.float32, _EXACT), (torch.bfloat16, _ROUNDED)):

            def run(call: Forward, dtype: torch.dtype = dtype, e: Tensor = e) -> Outcome:
                return {RETURNS: call(made, x.to(dtype, copy=True), e, *others)}

            yield Trial(partial(run, type(module).forward), [partial(run, forward)], tolerance)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tokens(channels: int) -> Tensor:
    """Returns random ``[2, L, C]`` whose tokens differ in magnitude."""
    x = torch.randn(2, _TOKENS, channels, generator=_generator(), dtype=torch.float32)
    return x * magnitudes(_TOKENS)[:, None]
