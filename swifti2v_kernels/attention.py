"""Bidirectional attention over keys and values that live in several buffers.

    out = softmax(scale * q @ concat(k_1 .. k_n)^T) @ concat(v_1 .. v_n)

A window of Conditional Segment-wise Generation, a cached context, the text of an MMDiT block and plain cross-attention
are all this one operation: the softmax runs over the union of the sources, so their order does not matter.

| tensor   | shape          | dtype            | layout                          |
|----------|----------------|------------------|---------------------------------|
| q        | [B, Lq, H, D]  | fp32, fp16, bf16 | any strides                     |
| k_i, v_i | [B, L_i, H, D] | as q             | any strides, L_i may be 0       |
| out      | [B, Lq, H, D]  | as q             | contiguous tokens               |

FLOPs: 4 * B * H * Lq * sum(L_i) * D. Least traffic: q, every k_i and v_i read once, out written once. The PyTorch path
below concatenates the sources when there are several, which copies 2 * B * sum(L_i) * H * D elements; with one source
it copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_attention_reference(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """The formula above by ``scaled_dot_product_attention``; differentiable; shapes as in :func:`segment_attention`."""
    k = sources[0][0] if len(sources) == 1 else torch.cat([k for k, _ in sources], dim=1)
    v = sources[0][1] if len(sources) == 1 else torch.cat([v for _, v in sources], dim=1)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def segment_attention(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]], *, scale: float | None = None) -> Tensor:
    """Attention of ``q`` to the union of several key/value sources, without a mask.

    Args:
        q: queries ``[B, Lq, H, D]``.
        sources: pairs ``(k, v)``, each ``[B, L_i, H, D]``; ``L_i`` may differ and may be 0, but not all of them.
        scale: factor on the logits; default ``D ** -0.5``.

    Returns:
        ``[B, Lq, H, D]`` in the dtype of ``q``.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the source.

    Example:
        >>> q = torch.randn(1, 5, 2, 8)
        >>> window, text = torch.randn(2, 1, 7, 2, 8), torch.randn(2, 1, 3, 2, 8)
        >>> segment_attention(q, [tuple(window), tuple(text)]).shape
        torch.Size([1, 5, 2, 8])

    Source: CSG self-attention of SwiftI2V (arXiv 2605.06356); joint attention of MMDiT models.
    """
    _check(q, sources)
    return segment_attention_reference(q, sources, q.shape[-1] ** -0.5 if scale is None else scale)


def _check(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]]) -> None:
    if q.ndim != 4:
        raise ValueError(f"q: expected [B, Lq, H, D], got shape {tuple(q.shape)}")
    if not sources:
        raise ValueError("sources: expected at least one (k, v) pair, got none")
    batch, _, heads, head_dim = q.shape
    for i, (k, v) in enumerate(sources):
        for name, x in (("k", k), ("v", v)):
            if x.ndim != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (batch, heads, head_dim):
                raise ValueError(
                    f"sources[{i}].{name}: expected [{batch}, L, {heads}, {head_dim}] to match q, got {tuple(x.shape)}"
                )
            if x.dtype != q.dtype or x.device != q.device:
                raise ValueError(
                    f"sources[{i}].{name}: expected {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}"
                )
        if k.shape[1] != v.shape[1]:
            raise ValueError(f"sources[{i}]: k has {k.shape[1]} tokens and v has {v.shape[1]}")
    if all(k.shape[1] == 0 for k, _ in sources):
        raise ValueError("sources: every source is empty (0 keys), so the softmax is undefined")
