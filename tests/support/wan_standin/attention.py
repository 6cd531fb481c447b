"""A stand-in for ``wan/modules/attention.py``: 16 bits inside, the dtype of ``q`` outside, lengths on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

#: Tests set it to compare what is around attention in float32.
ROUNDS = True
#: Queries, keys and values of every call since a test emptied it.
SEEN: list[tuple[Tensor, Tensor, Tensor]] = []


def flash_attention(
    q,
    k,
    v,
    q_lens=None,
    k_lens=None,
    dropout_p=0.0,
    softmax_scale=None,
    q_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
    dtype=torch.bfloat16,
    version=None,
):  # type: ignore[no-untyped-def]
    """Computes softmax in float32 of inputs and result in 16 bits; keys from ``k_lens`` on do not count."""
    SEEN.append((q, k, v))
    assert q_lens is None
    assert not dropout_p
    out_dtype = q.dtype
    v = v.to(dtype) if ROUNDS and v.dtype not in (torch.float16, torch.bfloat16) else v
    q, k = q.to(v.dtype), k.to(v.dtype)
    if q_scale is not None:
        q = q * q_scale
    logits = torch.einsum("blhd,bmhd->bhlm", q.float(), k.float())
    logits = logits * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    rows, columns = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
    left, right = window_size
    hidden = (columns > rows) if causal else torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    hidden = hidden | ((columns < rows - left) & (left >= 0)) | ((columns > rows + right) & (right >= 0))
    logits = logits.masked_fill(hidden, float("-inf"))
    if k_lens is not None:
        logits = logits.masked_fill((columns >= k_lens[:, None])[:, None, None], float("-inf"))
    out = torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v.float())
    return out.to(v.dtype).to(out_dtype)
