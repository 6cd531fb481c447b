"""RMSNorm of queries and keys, then rotary embedding over (block, row, column), in one pass.

    y = x / sqrt(mean(x^2) + eps) * weight          mean over all heads together (Wan), or over each head
    (a, b) of pair p -> (a cos - b sin, a sin + b cos)   by the angle position * theta^(-2j/d) of the pair's axis

A head's D channels make D / 2 pairs, the first for t, then h, then w: 22, 21 and 21 for D = 128 (axes of D - 4s, 2s and
2s channels with s = D // 6, as in Wan). Pair p is the channels (2p, 2p + 1), ``interleaved``, or (p, p + D/2),
``half``. The position of a token is (its block's index in the clip, row, column): a window made of blocks 0, 9, 10, 11
is rotated as in the whole clip.

| tensor       | shape        | dtype                          | layout                                        |
|--------------|--------------|--------------------------------|-----------------------------------------------|
| q, k         | [B, L, H*D]  | fp32, fp16, bf16 (fp64: torch) | any batch and token strides; channels contiguous |
| weights      | [H*D] or [D] | any float                      | contiguous                                    |
| rope.{t,h,w} | [n, d/2, 2]  | fp32 (cos, sin)                | contiguous                                    |
| out          | [B, L, H, D] | as the input                   | contiguous; in place: as the input            |

q and k are usually slices of a fused projection's output ``[B, L, 3*H*D]``: they are read there and, with ``inplace``,
written there, so that attention reads all three from one buffer. Angles are float64, their cosine and sine float32 and
tabled per axis (from other models also per token); the norm is float32 and rounded once, the rotation too.

Every head is turned by the same angles. What fusing saves, and the limits, are in docs/operators/norm.md. FLOPs: about
10 an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import Spec, check_targets, check_tensor
from ..common.dispatch import compute, kernel_obstacle, public_operator
from ..common.registration import kernel_operator
from .rope import Rope3D

LAYOUTS = ("interleaved", "half")
#: A token is held in registers.
MAX_CHANNELS = 16384


def norm_rope_reference(
    x: Tensor, weight: Tensor, rope: Rope3D | None, num_heads: int, start: int, eps: float, layout: str
) -> Tensor:
    """Computes the formula above for q or for k, differentiable: ``[B, L, H*D]`` to ``[B, L, H, D]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if weight.shape[0] != x.shape[2]:
        y = y.unflatten(2, (num_heads, -1))
    y = F.rms_norm(y, weight.shape, weight.to(wide), eps).flatten(2).to(x.dtype).unflatten(2, (num_heads, -1))
    if rope is None:
        return y
    token = torch.arange(start, start + x.shape[1], device=x.device)
    rows, columns = rope.h.shape[0], rope.w.shape[0]
    places = (token // (rows * columns), token // columns % rows, token % columns)
    turns = torch.cat([axis.to(wide)[place] for axis, place in zip(rope, places, strict=True)], dim=1)
    cos, sin = turns.unsqueeze(1).unbind(-1)  # [L, 1, D / 2]
    if layout == "interleaved":
        a, b = y.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a, b = y.to(wide).unflatten(-1, (2, -1)).unbind(-2)
    axis = -1 if layout == "interleaved" else -2
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=axis).flatten(-2).to(x.dtype)


class RopeCall(NamedTuple):
    """The arguments of the registered operator, for q and k or one tensor alone, then whether these are overwritten."""

    x: Sequence[Tensor]
    weights: Sequence[Tensor]
    #: Empty without rotation.
    rope: Sequence[Tensor]
    num_heads: int
    start: int
    eps: float
    layout: str
    out: Sequence[Tensor] = ()
    inplace: bool = False

    def names(self) -> list[tuple[str, str]]:
        """Returns what messages call the tensors and their weights."""
        return [("x", "weight")] if len(self.x) == 1 else [("q", "q_weight"), ("k", "k_weight")]

    def check(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected {' or '.join(LAYOUTS)}, got {self.layout!r}")
        for (name, label), x, weight in zip(self.names(), self.x, self.weights, strict=True):
            self._check(name, label, x, weight)
        if len(self.x) == 2:
            (q, k), (q_weight, k_weight) = self.x, self.weights
            check_tensor("k", k, Spec((q.shape[0], "L*", q.shape[2]), q.dtype), q.device)
            check_tensor("k_weight", k_weight, Spec(q_weight.shape, q_weight.dtype, whole=True), q.device)

    def _check(self, name: str, label: str, x: Tensor, weight: Tensor) -> None:
        check_tensor(name, x, Spec(("B*", "L*", f"{self.num_heads} * D*"), None))
        if self.num_heads < 1 or x.shape[2] % self.num_heads:
            raise ValueError(f"{name}: expected [B, L, {self.num_heads} * D], got {list(x.shape)}")
        head_dim = x.shape[2] // self.num_heads
        if not isinstance(weight, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(weight).__name__}")
        if weight.shape not in (x.shape[2:], (head_dim,)) or not weight.is_contiguous() or weight.device != x.device:
            raise ValueError(
                f"{label}: expected [{x.shape[2]}] or [{head_dim}], contiguous, on {x.device},"
                f" got {list(weight.shape)} on {weight.device}"
            )
        if self.start < 0:
            raise ValueError(f"start: expected 0 or more, got {self.start}")
        if not self.rope:
            return
        for axis, table in zip("thw", self.rope, strict=True):
            check_tensor(f"rope.{axis}", table, Spec(("n", "pairs*", 2), torch.float32, whole=True), x.device)
        grid, pairs = ([axis.shape[i] for axis in self.rope] for i in (0, 1))
        tokens, last = grid[0] * grid[1] * grid[2], self.start + x.shape[1]
        if (last > tokens) if len(self.x) == 1 else (last != tokens):
            given = f"{name} has {x.shape[1]}" + (f", from {self.start} on" if self.start else "")
            raise ValueError(f"rope: tables for {grid[0]} x {grid[1]} x {grid[2]} tokens, but {given}")
        if 2 * sum(pairs) != head_dim:
            raise ValueError(f"rope: tables for head_dim {2 * sum(pairs)}, but {name} has {head_dim}")

    def check_written(self) -> None:
        """Checks that outputs overlap nothing that is still to be read.

        A program reads its whole token before it writes it, so in place is safe; others read weights and tables.
        """
        names, labels = zip(*self.names(), strict=True)
        inputs = dict(zip((*names, *labels), (*self.x, *self.weights), strict=True))
        inputs |= {f"rope.{axis}": table for axis, table in zip("thw", self.rope, strict=False)}
        for name, target in zip(names, self.x if self.inplace else self.out, strict=True):
            check_targets({name: target}, inputs, (name,))

    def obstacle(self) -> str | None:
        if (reason := kernel_obstacle((*self.x, *self.weights, *self.rope))) is not None:
            return reason
        channels = self.x[0].shape[2]
        if channels > MAX_CHANNELS:
            return f"kernels exist for up to {MAX_CHANNELS} channels, got {channels}"
        if channels // self.num_heads % 2:
            return f"kernels exist for an even head_dim, got {channels // self.num_heads}"
        return None

    def by_torch(self) -> Tensor | tuple[Tensor, ...]:
        rest = (Rope3D(*self.rope) if self.rope else None, *self[3:7])
        if self.inplace:
            self.check_written()
        results = [norm_rope_reference(x, weight, *rest) for x, weight in zip(self.x, self.weights, strict=True)]
        if self.inplace:
            for x, y in zip(self.x, results, strict=True):
                x.copy_(y.flatten(2))
            return self._split(self.x)
        return results[0] if len(results) == 1 else tuple(results)

    def by_kernel(self) -> Tensor | tuple[Tensor, ...]:
        out = self.x if self.inplace else [x.new_empty(x.shape) for x in self.x]
        _norm_rope_op(*self[:7], out)
        return self._split(out)

    def _split(self, results: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Returns the results as they are handed out, each as a view by heads."""
        views = tuple(y.unflatten(2, (self.num_heads, -1)) for y in results)
        return views[0] if len(views) == 1 else views


_norm_rope_op = kernel_operator(
    "norm_rope",
    "(Tensor[] x, Tensor[] weights, Tensor[] rope, SymInt num_heads, SymInt start, float eps, str layout,"
    " Tensor(a!)[] out)",
    RopeCall,
)


@public_operator
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Rope3D | None,
    num_heads: int,
    *,
    eps: float = 1e-6,
    layout: str = "interleaved",
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Norms queries and keys (RMSNorm), splits them into heads and rotates them (3D RoPE), by one launch.

    Norm: ``y = x / sqrt(mean(x^2) + eps) * weight``. Rotation: each pair of channels (a, b) becomes
    ``(a cos - b sin, a sin + b cos)`` by the angle of its token's position (block, row, column).

    Args:
        q: queries ``[B, L, H * D]``, the output of their projection, channels contiguous.
        k: keys ``[B, L, H * D]`` in the dtype of ``q``. Without ``rope`` the lengths of q and k may differ.
        q_weight: norm weight of the queries, ``[H * D]`` (the mean is over all heads, Wan) or ``[D]`` (over each head).
        k_weight: norm weight of the keys, shaped as ``q_weight``.
        rope: tables of :func:`swifti2v_kernels.rope_3d` with ``L = blocks * height * width`` or of
            :func:`swifti2v_kernels.rope_from_tokens`, or None (cross-attention).
        num_heads: ``H``.
        eps: added to the mean square.
        layout: layout of the pairs, ``interleaved`` (Wan, HunyuanVideo, LTX-Video) or ``half`` (Cosmos, most language
            models).
        inplace: whether to overwrite ``q`` and ``k``; the results are then views of them.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        The pair ``(q, k)``, each ``[B, L, H, D]`` in the dtype of its input.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Examples:
        >>> q, k, v = torch.randn(1, 3 * 2 * 4, 3 * 96).chunk(3, dim=2)  # views of a fused projection
        >>> rope = rope_3d([0, 9, 10], 2, 4, head_dim=24)
        >>> q, k = qk_norm_rope(q, k, torch.ones(96), torch.ones(96), rope, num_heads=4, inplace=True)
        >>> q.shape
        torch.Size([1, 24, 4, 24])

    Source: Wan self-attention (diffusers ``WanAttnProcessor``).
    """
    tables = [] if rope is None else list(rope)
    call = RopeCall([q, k], [q_weight, k_weight], tables, num_heads, 0, eps, layout, inplace=inplace)
    return compute(call, backend)


@public_operator
def norm_rope(
    x: Tensor,
    weight: Tensor,
    rope: Rope3D | None,
    num_heads: int,
    *,
    start: int = 0,
    eps: float = 1e-6,
    layout: str = "interleaved",
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Norms queries or keys (RMSNorm), splits them into heads and rotates them (3D RoPE), for a part of the tokens.

    It is :func:`swifti2v_kernels.qk_norm_rope` for one tensor, whose tokens may be those of a window from ``start`` on.

    Args:
        x: queries or keys ``[B, L, H * D]``, channels contiguous.
        weight: norm weight ``[H * D]`` (the mean is over all heads) or ``[D]`` (over each head).
        rope: tables of the whole window, or None.
        num_heads: ``H``.
        start: position of the first token of ``x`` in the window.
        eps: added to the mean square.
        layout: layout of the pairs, ``interleaved`` or ``half``.
        inplace: whether to overwrite ``x``; the result is then a view of it.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        ``[B, L, H, D]`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Examples:
        >>> rope = rope_3d([0, 9, 10], 2, 4, head_dim=24)
        >>> norm_rope(torch.randn(1, 10, 96), torch.ones(96), rope, num_heads=4, start=14).shape
        torch.Size([1, 10, 4, 24])

    Source: Wan self-attention (diffusers ``WanAttnProcessor``).
    """
    tables = [] if rope is None else list(rope)
    return compute(RopeCall([x], [weight], tables, num_heads, start, eps, layout, inplace=inplace), backend)
