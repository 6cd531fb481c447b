"""Segment attention in plain PyTorch: the CPU path, the derivative, and what every kernel must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import BlockWindow, Source


def segment_attention_reference(
    q: Sequence[Tensor],
    sources: Sequence[Source],
    scale: float,
    valid_lengths: Sequence[Tensor | None],
    attends: Sequence[Sequence[int]],
    window: BlockWindow | None,
    return_lse: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Computes the formula of ``segment_attention.py``, differentiable, piece by piece of the queries.

    Queries of one piece see the same keys, so that masks are slices.
    """
    out, lse = [], []
    for view, visible in zip(q, attends, strict=True):
        results = []
        for start, stop, seen in _pieces(view.shape[1], sources, visible, window):
            k, v = (_joined([sources[j][i][:, a:b] for j, a, b in seen]) for i in range(2))
            valid = None
            if any(valid_lengths[j] is not None for j, _, _ in seen):
                valid = torch.cat([_valid_rows(valid_lengths[j], a, b, view) for j, a, b in seen], dim=1)
            results.append(_attend(view[:, start:stop], k, v, scale, valid, return_lse))
        out.append(_joined([o for o, _ in results]))
        if return_lse:
            lse.append(torch.cat([s for _, s in results if s is not None], dim=2))
    return out, lse


def _joined(views: list[Tensor]) -> Tensor:
    """Returns the views concatenated along the tokens; a single view is not copied."""
    return views[0] if len(views) == 1 else torch.cat(views, dim=1)


def _pieces(
    num_queries: int, sources: Sequence[Source], visible: Sequence[int], window: BlockWindow | None
) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Yields ranges of queries that see the same keys: (start, stop, [(source, first row, last row + 1)])."""
    everything = [(j, 0, sources[j][0].shape[1]) for j in visible]
    if window is None or num_queries == 0:
        yield 0, num_queries, everything
        return
    length = sources[0][0].shape[1]
    for i, start in enumerate(range(0, num_queries, window.block_len)):
        low = min(max(i - window.left, 0) * window.block_len, length)
        high = min((i + window.right + 1) * window.block_len, length)
        yield start, min(start + window.block_len, num_queries), [(0, low, high), *everything[1:]]


def _valid_rows(valid: Tensor | None, start: int, stop: int, like: Tensor) -> Tensor:
    rows = torch.arange(start, stop, device=like.device)
    if valid is None:
        return torch.ones_like(rows, dtype=torch.bool).expand(like.shape[0], -1)
    return rows < valid.unsqueeze(1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    if not return_lse and valid is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2), None
    wide = torch.promote_types(q.dtype, torch.float32)
    if valid is not None:  # whatever lies past a valid length, even NaN, must not count
        k, v = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (k, v))
    logits = scale * (q.to(wide) @ k.to(wide).transpose(2, 3))
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None, :], float("-inf"))
    lse = logits.logsumexp(-1)
    # A row without any valid key: weights 0, not NaN.
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
    return (weights @ v.to(wide)).to(v.dtype).transpose(1, 2), lse if return_lse else None
