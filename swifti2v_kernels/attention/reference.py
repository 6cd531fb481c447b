"""Segment attention in plain PyTorch: the CPU path, the derivative, and what every kernel must equal.

Torch's own attention computes all but two kinds of calls, which it cannot: those that return a log-sum-exp, and
derivatives by transforms of ``torch.func`` or in forward mode. The formula itself computes these, in pieces of the
queries, so that few logits exist at a time; in the backward pass each piece is computed again. ``torch.compile`` has
one piece, since it would unroll the loop, and ``torch.func`` keeps the pieces for its gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common.dispatch import transform
from .arguments import SegmentCall

#: Logits of a piece: what stays in the caches of a CPU, and enough for a GPU to be busy.
PIECE = {"cpu": 1 << 22, "cuda": 1 << 26}
#: Queries of a piece, at least.
LEAST_ROWS = 16

Range = tuple[int, int, int]


def segment_attention_reference(call: SegmentCall, return_lse: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Computes the formula of ``segment_attention.py``, differentiable.

    Queries of one block of a window see the same keys, so that masks are slices.
    """
    out, lse = [], []
    last: list[Range] = []
    for view, mask in zip(call.q, call.attends, strict=True):
        results = []
        for start, stop, seen in _blocks(call, view.shape[1], mask):
            if seen != last:  # views that see the same keys share one copy of them
                last, keys = seen, _keys(call, seen)
            results.append(_attend(view[:, start:stop], *keys, call.scale, return_lse))
        out.append(_joined([o for o, _ in results]))
        if return_lse:
            lse.append(torch.cat([s for _, s in results if s is not None], dim=2))
    return out, lse


def _keys(call: SegmentCall, seen: Sequence[Range]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the keys and values of these ranges, each [B, L, H, D], and which of them count, [B, L] (None: all)."""
    padded = any(call.valid_lengths[j] is not None for j, _, _ in seen)
    keys, values, masks = [], [], []
    for j, start, stop in seen:
        k, v, valid = call.k[j][:, start:stop], call.v[j][:, start:stop], call.valid_lengths[j]
        if valid is not None:
            masks.append(torch.arange(start, stop, device=k.device) < valid.unsqueeze(1))
            # What does not count may be NaN, which no mask would stop.
            k, v = (x.masked_fill(~masks[-1][:, :, None, None], 0.0) for x in (k, v))
        elif padded:
            masks.append(torch.ones(k.shape[:2], dtype=torch.bool, device=k.device))
        keys.append(k)
        values.append(v)
    return _joined(keys), _joined(values), torch.cat(masks, dim=1) if padded else None


def _joined(views: list[Tensor]) -> Tensor:
    """Returns the views concatenated along the tokens; a single view is not copied."""
    return views[0] if len(views) == 1 else torch.cat(views, dim=1)


def _blocks(call: SegmentCall, num_queries: int, mask: int) -> Iterator[tuple[int, int, list[Range]]]:
    """Yields ranges of queries that see the same keys: (start, stop, [(source, first row, last row + 1)])."""
    everything = [(j, 0, k.shape[1]) for j, k in enumerate(call.k) if mask >> j & 1]
    if not call.window or num_queries == 0:
        yield 0, num_queries, everything
        return
    block_len, left, right = call.window
    length = call.k[0].shape[1]
    for i, start in enumerate(range(0, num_queries, block_len)):
        low = min(max(i - left, 0) * block_len, length)
        high = min((i + right + 1) * block_len, length)
        yield start, min(start + block_len, num_queries), [(0, low, high), *everything[1:]]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    transformed = transform() is not None
    if not return_lse and not transformed:
        # An entry without any valid key has zeros for values, so whichever it attends to, its result is 0.
        mask = None if valid is None else (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).contiguous(), None
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    piece = functools.partial(_formula, valid=valid, scale=scale)
    if needs_gradients and not transformed:
        piece = functools.partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False)
    logits_of_a_row = q.shape[0] * q.shape[1] * k.shape[2]
    rows = max(PIECE.get(q.device.type, PIECE["cuda"]) // max(logits_of_a_row, 1), LEAST_ROWS)
    queries = [q] if torch.compiler.is_compiling() else q.split(rows, dim=2)
    results = [piece(part, k, v) for part in queries]
    out, lse = (torch.cat([result[i] for result in results], dim=2) for i in (0, 1))
    return out.transpose(1, 2).contiguous(), lse if return_lse else None


def _formula(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the attention [B, H, Lq, D] and its log-sum-exp, from all logits at once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = scale * (q.to(wide) @ k.to(wide).transpose(2, 3))
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None, :], float("-inf"))
    lse = logits.logsumexp(-1)
    # A row without any valid key: weights 0, not NaN.
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
    return (weights @ v.to(wide)).to(v.dtype), lse
