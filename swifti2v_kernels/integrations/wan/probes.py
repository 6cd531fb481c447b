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
from ..probing import CHANGES, RETURNS, Forward, Outcome, Trial, magnitudes, twin
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
            scores = torch.einsum("blhd,bmhd->bhlm", q.float(), k.float()) / q.shape[-1]
            if length is not None:
                scores = scores.masked_fill(torch.arange(k.shape[1]) >= length[:, None, None, None], -torch.inf)
            return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v.float()).to(q.dtype)

        return flash_attention


def self_attention_probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of ``WanSelfAttention``, in float32 and as under autocast, with padding and without."""
    made = twin(module, torch.float32, ("q", "k", "v", "o"))
    x = _tokens(made.num_heads * made.head_dim)
    angles = torch.rand(max(_GRID), made.head_dim // 2, generator=_generator(), dtype=torch.float64)
    freqs = torch.polar(torch.ones_like(angles), 3 * angles)
    grids = torch.tensor([_GRID, _GRID])
    padded, full = (x, torch.tensor([12, 9]), grids, freqs), (x[:1, :12], torch.tensor([12]), grids[:1], freqs)

    def run(ours: bool, casts: bool, tensors: tuple[Tensor, ...]) -> Outcome:
        tried, given = _Tried(), [t.clone() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            out = self_attention_forward(tried)(made, *given) if ours else ""
            # What ours does not take is the host's.
            out = tried.forward(type(module))(made, *given) if isinstance(out, str) else out
        return {RETURNS: out, "it calls flash_attention in another way": tried.seen, CHANGES: given}

    for casts, tolerance in ((False, _EXACT), (True, _ROUNDED)):
        for given in (padded, full):
            yield Trial(partial(run, False, casts, given), [partial(run, True, casts, given)], tolerance)


def layer_probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of ``WanAttentionBlock``, with padding and without.

    ``e`` is as in 2.1 or as in 2.2, which also has no lengths of the context; a host takes one of them.
    """
    made = twin(module, torch.float32, ("self_attn", "cross_attn", "ffn"))
    x = _tokens(made.modulation.shape[-1])
    grids, freqs = torch.tensor([_GRID, _GRID]), torch.ones(3, 2, dtype=torch.complex128)
    context, lengths = 0.5 * x[:, :5], torch.tensor([5, 3])

    def run(call: Forward, *given: Tensor | None) -> Outcome:
        mine = [None if t is None else t.clone() for t in given]
        return {RETURNS: call(made, *mine), CHANGES: mine}

    for shape in ((), (_TOKENS,)):
        e = 0.5 * torch.randn(2, *shape, 6, x.shape[2], generator=_generator(), dtype=torch.float32)
        one = e[:1] if e.ndim == 3 else e[:1, :12]
        for dtype, tolerance in ((torch.float32, _EXACT), (torch.bfloat16, _ROUNDED)):
            y = x.to(dtype)
            for given in (
                (y, e, torch.tensor([12, 9]), grids, freqs, context, lengths),
                (y, e, torch.tensor([12, 9]), grids, freqs, context, None),
                (y[:1, :12], one, torch.tensor([12]), grids[:1], freqs, context[:1], None),
            ):
                yield Trial(partial(run, type(module).forward, *given), [partial(run, forward, *given)], tolerance)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tokens(channels: int) -> Tensor:
    """Returns random ``[2, L, C]`` whose tokens differ in magnitude."""
    x = torch.randn(2, _TOKENS, channels, generator=_generator(), dtype=torch.float32)
    return x * magnitudes(_TOKENS)[:, None]
