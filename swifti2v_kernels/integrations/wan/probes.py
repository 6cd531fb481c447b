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

from ..probing import Forward, Trial, magnitudes, twin
from ..sdpa import AttentionCalls
from .dit import Attention

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
    angles = torch.rand(max(_GRID), made.head_dim // 2, generator=_generator(), dtype=torch.float64)
    freqs, grids = torch.polar(torch.ones_like(angles), 3 * angles), torch.tensor([_GRID, _GRID])

    def run(casts: bool, padded: bool, code: Forward) -> Any:
        tried, x = _Tried(), _tokens(made.num_heads * made.head_dim)
        given = (x, torch.tensor([12, 9]), grids) if padded else (x[:1, :12], torch.tensor([12]), grids[:1])
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            out = tried.self_attention(made, *given, freqs) if code is forward else ""
            # What ours does not take is the host's.
            out = tried.forward(type(module))(made, *given, freqs) if isinstance(out, str) else out
        return out, tried.seen, given

    for casts, tolerance in ((False, _EXACT), (True, _ROUNDED)):
        for padded in (True, False):
            yield Trial(partial(run, casts, padded), tolerance)


def layer_probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of ``WanAttentionBlock``, with padding and without.

    ``e`` is as in 2.1 or as in 2.2, which also has no lengths of the context; a host takes one of them.
    """
    made = twin(module, torch.float32, ("self_attn", "cross_attn", "ffn"))
    grids, freqs = torch.tensor([_GRID, _GRID]), torch.ones(3, 2, dtype=torch.complex128)

    def run(per_token: bool, dtype: torch.dtype, case: str, code: Forward) -> Any:
        x = _tokens(made.modulation.shape[-1])
        shape = (2, *([_TOKENS] if per_token else []), 6, x.shape[2])
        e = 0.5 * torch.randn(shape, generator=_generator(), dtype=torch.float32)
        context, y, lengths = 0.5 * x[:, :5], x.to(dtype), torch.tensor([5, 3]) if case == "text lengths" else None
        given = y, e, torch.tensor([12, 9]), grids, freqs, context, lengths
        if case == "no padding":
            one = e[:1, :12] if per_token else e[:1]
            given = y[:1, :12], one, torch.tensor([12]), grids[:1], freqs, context[:1], None
        return code(made, *given), given

    for per_token in (False, True):
        for dtype, tolerance in ((torch.float32, _EXACT), (torch.bfloat16, _ROUNDED)):
            for case in ("text lengths", "no text lengths", "no padding"):
                yield Trial(partial(run, per_token, dtype, case), tolerance)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tokens(channels: int) -> Tensor:
    """Returns random ``[2, L, C]`` whose tokens differ in magnitude."""
    x = torch.randn(2, _TOKENS, channels, generator=_generator(), dtype=torch.float32)
    return x * magnitudes(_TOKENS)[:, None]
