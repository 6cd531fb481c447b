"""Independent formulations of the window operators in float64, block by block, and stores to call them with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def store(
    z: int, blocks: int, size: tuple[int, int], dtype: torch.dtype, batch: int = 2, device: str = "cpu"
) -> Tensor:
    """Returns ``[B, z, blocks, h, w]`` inside a buffer of NaN with gaps on every axis; blocks are outermost but one."""
    buffer = torch.full((batch, blocks + 1, z + 2, size[0] + 1, size[1] + 2), float("nan"), dtype=dtype, device=device)
    inner = buffer[:, :blocks, 1:-1, :-1, 1:-1]
    inner.copy_(torch.randn(inner.shape))
    return inner.transpose(1, 2)


def int32(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def convolved(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reference: Tensor | None = None,
    latent_index: Tensor | None = None,
    reference_index: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns what ``embed_window`` returns, by ``torch.cat`` and ``conv3d``."""
    frames = range(latents.shape[2]) if latent_index is None else latent_index.tolist()
    shown = range(len(frames)) if reference_index is None else reference_index.tolist()
    blocks = []
    for i, (frame, given) in enumerate(zip(frames, shown, strict=True)):
        parts = [latents[:, :, frame] if frame >= 0 else reference[:, :, given]]
        if weight.shape[1] > latents.shape[1]:
            if mask is not None:
                channels = weight.shape[1] - latents.shape[1] - reference.shape[1]
                parts.append(mask[i].expand(len(latents), channels, *latents.shape[3:]))
            parts.append(reference[:, :, given])
        blocks.append(torch.cat([x.to(weight.dtype).double() for x in parts], dim=1))
    x = F.conv3d(
        torch.stack(blocks, dim=2), weight.double(), None if bias is None else bias.double(), stride=weight.shape[2:]
    )
    return x.flatten(2).transpose(1, 2)


def stepped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    latent_index: Tensor | None = None,
    block_map: Tensor | None = None,
    step: float | Tensor | None = None,
    patch_size: Sequence[int] = (1, 2, 2),
    eps: float = 1e-6,
) -> Tensor:
    """Returns what ``project_step`` leaves in ``out``, in float64 and elsewhere."""
    result = out.double().clone()
    slots = range(out.shape[2]) if latent_index is None else latent_index.tolist()
    rows = (
        block_map.tolist() if block_map is not None else [0] * len(slots) if shift.shape[1] == 1 else range(len(slots))
    )
    height, width = out.shape[3] // patch_size[1], out.shape[4] // patch_size[2]
    for tokens, slot, row in zip(x.split(height * width, dim=1), slots, rows, strict=True):
        if slot < 0:
            continue
        y = F.layer_norm(tokens.double(), x.shape[-1:], eps=eps)
        y = y * (1 + scale[:, row].double().unsqueeze(1)) + shift[:, row].double().unsqueeze(1)
        velocity = F.linear(y.to(x.dtype).double(), weight.double(), None if bias is None else bias.double())
        pattern = "b (y x) (p q c) -> b c (y p) (x q)"
        velocity = rearrange(velocity, pattern, y=height, p=patch_size[1], q=patch_size[2])
        result[:, :, slot] = velocity if step is None else result[:, :, slot] + float(step) * velocity
    return result
