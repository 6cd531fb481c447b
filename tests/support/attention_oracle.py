"""Attention in float64, written as plainly as it can be: the judge of every implementation. Masks are dense here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cat_attention(
    q: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    scale: float | None = None,
    valid_lengths: Sequence[Tensor | None] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns ``[B, Lq, H, D]`` in float64 and the log-sum-exp ``[B, H, Lq]``, over concatenated sources.

    ``mask`` [B, Lq, Lk] is True if seen. Keys past a valid length are masked and their values zeroed.
    """
    keys, values, masks = [], [], []
    for (k, v), n in zip(sources, valid_lengths or [None] * len(sources), strict=True):
        inside = torch.ones(k.shape[:2], dtype=torch.bool)
        if n is not None:
            inside = torch.arange(k.shape[1]) < n.cpu().unsqueeze(1)
        inside = inside.to(k.device)
        keys.append(torch.where(inside[:, :, None, None], k, 0))
        values.append(torch.where(inside[:, :, None, None], v, 0))
        masks.append(inside)
    seen = torch.cat(masks, dim=1).unsqueeze(1).expand(-1, q.shape[1], -1)
    seen = seen if mask is None else seen & mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.double().transpose(1, 2) for x in (q, torch.cat(keys, dim=1), torch.cat(values, dim=1)))
    logits = (scale * q @ k.transpose(2, 3)).masked_fill(~seen.unsqueeze(1), float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
    return (weights @ v).transpose(1, 2), lse
