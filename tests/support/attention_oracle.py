"""Attention in float64, written as plainly as it can be: the judge of every implementation. Masks are dense here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns ``[B, L, H, D]`` in float64 and the log-sum-exp ``[B, H, L]``; ``mask`` [B, Lq, Lk] is True if seen."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    logits = scale * q @ k.transpose(2, 3)
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
    return (weights @ v).transpose(1, 2), lse


def cat_attention(
    q: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    scale: float | None = None,
    valid_lengths: Sequence[Tensor | None] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the same over concatenated sources; keys past a valid length are masked and their values zeroed."""
    batch = q.shape[0]
    keys, values, masks = [], [], []
    for (k, v), n in zip(sources, valid_lengths or [None] * len(sources), strict=True):
        inside = torch.ones(batch, k.shape[1], dtype=torch.bool)
        if n is not None:
            inside = torch.arange(k.shape[1]) < n.cpu().unsqueeze(1)
        keep = inside[:, :, None, None].to(k.device)
        keys.append(torch.where(keep, k, 0))
        values.append(torch.where(keep, v, 0))
        masks.append(inside)
    seen = torch.cat(masks, dim=1).to(q.device).unsqueeze(1).expand(-1, q.shape[1], -1)
    if mask is not None:
        seen = seen & mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dense_attention(q, torch.cat(keys, dim=1), torch.cat(values, dim=1), scale, seen)
