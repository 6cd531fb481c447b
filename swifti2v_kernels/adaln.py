"""Adaptive layer norm and gated residual of a DiT block, modulated per block of tokens.

    norm_modulate:  y = LayerNorm(x) * (1 + scale[b(t)]) + shift[b(t)]        (no affine)
    gated_residual: y = x + update * gate[b(t)]

``b(t)`` is the block of token ``t``: the L tokens are T consecutive blocks of L / T tokens (one block is one latent
frame). The modulation is stored per block and never expanded per token: at 2560x1408 that is 6 * T * C numbers instead
of 6 * 14,080 * T * C.

| tensor             | shape              | dtype                                    |
|--------------------|--------------------|------------------------------------------|
| x, update, y       | [B, L, C]          | fp32, fp16, bf16                         |
| shift, scale, gate | [B, T, C], T \\| L | fp32 (the modulation is never rounded)   |

Statistics, modulation and sum are float32 (float64 for float64 input), rounded once to the dtype of ``x``. Bytes: x
and update read once, y written once; about 8 FLOPs an element.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift`` with ``shift`` and ``scale`` chosen per block.

    Args:
        x: tokens ``[B, L, C]``.
        shift, scale: ``[B, T, C]``; ``T`` divides ``L`` (``T = 1``: one timestep for the whole sequence).
        eps: added to the variance.

    Returns:
        ``[B, L, C]`` in the dtype of ``x``.

    Raises:
        ValueError: a modulation tensor does not fit ``x``.

    Source: AdaLN-zero of DiT; order of operations and roundings of Wan (diffusers ``WanTransformerBlock``).
    """
    shift, scale = _per_block("shift", shift, x), _per_block("scale", scale, x)
    blocks = _wide(x).unflatten(1, (shift.shape[1], -1))
    return (F.layer_norm(blocks, x.shape[-1:], eps=eps) * (1 + scale) + shift).flatten(1, 2).to(x.dtype)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """``x + update * gate`` with ``gate`` chosen per block.

    Args:
        x, update: tokens ``[B, L, C]``.
        gate: ``[B, T, C]``; ``T`` divides ``L``.

    Returns:
        ``[B, L, C]`` in the dtype of ``x``.

    Raises:
        ValueError: ``update`` or ``gate`` does not fit ``x``.

    Source: AdaLN-zero of DiT; order of operations and roundings of Wan (diffusers ``WanTransformerBlock``).
    """
    if update.shape != x.shape:
        raise ValueError(f"update: expected {tuple(x.shape)} as x, got {tuple(update.shape)}")
    gate = _per_block("gate", gate, x)
    num_blocks = gate.shape[1]
    blocks, updates = (_wide(y).unflatten(1, (num_blocks, -1)) for y in (x, update))
    return (blocks + updates * gate).flatten(1, 2).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_block(name: str, modulation: Tensor, x: Tensor) -> Tensor:
    """Checks ``modulation`` against ``x`` [B, L, C] and returns it as [B, T, 1, C], in float32 at least."""
    if x.ndim != 3:
        raise ValueError(f"x: expected [B, L, C], got shape {tuple(x.shape)}")
    batch, length, width = x.shape
    if modulation.ndim != 3 or modulation.shape[0] != batch or modulation.shape[2] != width:
        raise ValueError(f"{name}: expected [{batch}, T, {width}], got {tuple(modulation.shape)}")
    if modulation.shape[1] == 0 or length % modulation.shape[1]:
        raise ValueError(f"{name}: {modulation.shape[1]} blocks do not divide {length} tokens")
    return _wide(modulation).unsqueeze(2)
