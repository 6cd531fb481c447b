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

Why fused: q and k are read once and written once, 4 * B * L * H * D elements; eager PyTorch in 16 bits, with its
float32 intermediates and strided copies, moves 35 * B * L * H * D. FLOPs: about 10 an element.

Limits: the kernel takes an even head_dim and up to 16,384 channels a token on NVIDIA GPUs of compute capability 8.0 or
newer and has no derivative: the PyTorch reference, which has one, computes all other calls. Every head is turned by the
same angles. Timed on an NVIDIA H200 only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import check_targets
from ..common.cost import Cost
from ..common.dispatch import Choice, kernel_obstacle, pick_backend, public_operator
from ..common.registration import add_op_namespace_prefix
from ..common.target import on_device
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
    grid, pairs = tuple(axis.shape[0] for axis in rope), tuple(axis.shape[1] for axis in rope)
    # Over whole blocks every table is broadcast over the other two axes; a part of them looks its tokens up.
    whole = start == 0 and x.shape[1] == grid[0] * grid[1] * grid[2]
    lead = grid if whole else (x.shape[1],)
    if layout == "interleaved":
        first, second = y.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = y.to(wide).unflatten(-1, (2, -1)).unbind(-2)
    rotated = []
    for axis, parts in enumerate(
        zip(*(z.unflatten(1, lead).split(pairs, dim=-1) for z in (first, second)), strict=True)
    ):
        table = rope[axis].to(wide)
        if whole:
            shape = [1, 1, 1, 1, pairs[axis], 2]
            shape[axis] = grid[axis]
            table = table.view(shape)
        else:
            token = torch.arange(start, start + x.shape[1], device=x.device)
            place = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])[axis]
            table = table[place].unsqueeze(1)
        cos, sin = table.unbind(-1)
        a, b = parts
        rotated.append(torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1))
    y = torch.cat(rotated, dim=-2)
    y = y.flatten(-2) if layout == "interleaved" else y.transpose(-1, -2).flatten(-2)
    return y.flatten(1, len(lead)).to(x.dtype)


@torch.library.custom_op(
    add_op_namespace_prefix("norm_rope"),
    mutates_args=("q_out", "k_out"),
    schema=(
        "(Tensor q, Tensor? k, Tensor q_weight, Tensor? k_weight, Tensor[] rope, SymInt num_heads, SymInt start,"
        " float eps, bool interleaved, Tensor(a!) q_out, Tensor(b!)? k_out) -> ()"
    ),
)
def _norm_rope_op(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    rope: list[Tensor],
    num_heads: int,
    start: int,
    eps: float,
    interleaved: bool,
    q_out: Tensor,
    k_out: Tensor | None,
) -> None:
    _check_outputs(q, k, q_weight, k_weight, rope, q_out, k_out)
    if q.numel() or (k is not None and k.numel()):
        from .qk_norm_rope_kernel import launch_norm_rope

        with on_device(q.device):
            launch_norm_rope(
                q, k, q_weight, k_weight, tuple(rope) if rope else None, q_out, k_out,
                heads=num_heads, start=start, eps=eps, interleaved=interleaved,
            )  # fmt: skip


@_norm_rope_op.register_fake
def _(q, k, q_weight, k_weight, rope, num_heads, start, eps, interleaved, q_out, k_out):  # type: ignore[no-untyped-def]
    return None


def _check_outputs(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    rope: Sequence[Tensor],
    q_out: Tensor,
    k_out: Tensor | None,
) -> None:
    """Checks that outputs overlap nothing that is still to be read.

    A program reads its whole token before it writes it, so in place is safe; others read weights and tables.
    """
    tables = {f"rope.{axis}": table for axis, table in zip("thw", rope, strict=False)}
    parameters = {"q_weight": q_weight, "k_weight": k_weight, **tables}
    check_targets({"q": q_out}, {"q": q, "k": k, **parameters}, ("q",))
    check_targets({"k": k_out}, {"k": k, "q": q, **parameters}, ("k",))


def _choose(backend: str, tensors: Sequence[Tensor], num_heads: int) -> Choice:
    chosen, reason = pick_backend(backend, _obstacle(tensors, num_heads))
    return Choice(chosen, "reference" if chosen == "torch" else "fused kernel", reason)


def _choose_pair(*, q, k, q_weight, k_weight, rope, num_heads, eps, layout, inplace, backend) -> Choice:  # type: ignore[no-untyped-def]
    _check_pair(q, k, q_weight, k_weight, rope, num_heads, layout)
    return _choose(backend, (q, k, q_weight, k_weight, *(rope or ())), num_heads)


def _choose_one(*, x, weight, rope, num_heads, start, eps, layout, inplace, backend) -> Choice:  # type: ignore[no-untyped-def]
    _check("x", x, weight, rope, num_heads, start, layout, whole=False)
    return _choose(backend, (x, weight, *(rope or ())), num_heads)


@public_operator(_choose_pair)
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
    _check_pair(q, k, q_weight, k_weight, rope, num_heads, layout)
    tables = [] if rope is None else list(rope)
    if _choose(backend, (q, k, q_weight, k_weight, *tables), num_heads).backend == "torch":
        if inplace:
            _check_outputs(q, k, q_weight, k_weight, tables, q, k)
        results = [
            norm_rope_reference(x, w, rope, num_heads, 0, eps, layout) for x, w in ((q, q_weight), (k, k_weight))
        ]
        return tuple(_into(x if inplace else None, y) for x, y in zip((q, k), results, strict=True))  # type: ignore[return-value]
    q_out, k_out = (x if inplace else x.new_empty(x.shape) for x in (q, k))
    _norm_rope_op(q, k, q_weight, k_weight, tables, num_heads, 0, eps, layout == "interleaved", q_out, k_out)
    return q_out.unflatten(2, (num_heads, -1)), k_out.unflatten(2, (num_heads, -1))


@public_operator(_choose_one)
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
    _check("x", x, weight, rope, num_heads, start, layout, whole=False)
    tables = [] if rope is None else list(rope)
    if _choose(backend, (x, weight, *tables), num_heads).backend == "torch":
        if inplace:
            _check_outputs(x, None, weight, None, tables, x, None)
        return _into(x if inplace else None, norm_rope_reference(x, weight, rope, num_heads, start, eps, layout))
    out = x if inplace else x.new_empty(x.shape)
    _norm_rope_op(x, None, weight, None, tables, num_heads, start, eps, layout == "interleaved", out, None)
    return out.unflatten(2, (num_heads, -1))


def _into(target: Tensor | None, result: Tensor) -> Tensor:
    return result if target is None else target.copy_(result.flatten(2)).unflatten(2, result.shape[2:])


def _check_pair(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope3D | None, num_heads: int, layout: str
) -> None:
    _check("q", q, q_weight, rope, num_heads, 0, layout, whole=True)
    _check("k", k, k_weight, rope, num_heads, 0, layout, whole=True)
    if (q.shape[0], q.shape[2], q.dtype, q.device) != (k.shape[0], k.shape[2], k.dtype, k.device):
        raise ValueError(
            f"k: expected [{q.shape[0]}, L, {q.shape[2]}] {q.dtype} on {q.device} as q,"
            f" got {list(k.shape)} {k.dtype} on {k.device}"
        )
    if q_weight.shape != k_weight.shape or q_weight.dtype != k_weight.dtype:
        raise ValueError(
            f"k_weight: expected {list(q_weight.shape)} {q_weight.dtype} as q_weight,"
            f" got {list(k_weight.shape)} {k_weight.dtype}"
        )


def _check(
    name: str, x: Tensor, weight: Tensor, rope: Rope3D | None, num_heads: int, start: int, layout: str, whole: bool
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if num_heads < 1 or x.ndim != 3 or x.shape[2] % num_heads:
        raise ValueError(f"{name}: expected [B, L, {num_heads} * D], got {tuple(x.shape)}")
    if x.shape[2] > 1 and x.stride(2) != 1:
        raise ValueError(f"{name}: expected the channels to be contiguous (stride 1), got stride {x.stride(2)}")
    label = "weight" if name == "x" else f"{name}_weight"
    head_dim = x.shape[2] // num_heads
    if not isinstance(weight, Tensor):
        raise TypeError(f"{label}: expected a tensor, got {type(weight).__name__}")
    if weight.shape not in (x.shape[2:], (head_dim,)) or not weight.is_contiguous() or weight.device != x.device:
        raise ValueError(
            f"{label}: expected [{x.shape[2]}] or [{head_dim}], contiguous, on {x.device},"
            f" got {list(weight.shape)} on {weight.device}"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected {' or '.join(LAYOUTS)}, got {layout!r}")
    if start < 0:
        raise ValueError(f"start: expected 0 or more, got {start}")
    if rope is None:
        return
    grid = tuple(axis.shape[0] for axis in rope)
    pairs = tuple(axis.shape[1] for axis in rope)
    tokens, last = grid[0] * grid[1] * grid[2], start + x.shape[1]
    if (last != tokens) if whole else (last > tokens):
        given = f"{name} has {x.shape[1]}" + (f", from {start} on" if start else "")
        raise ValueError(f"rope: tables for {grid[0]} x {grid[1]} x {grid[2]} tokens, but {given}")
    if 2 * sum(pairs) != head_dim:
        raise ValueError(f"rope: tables for head_dim {2 * sum(pairs)}, but {name} has {head_dim}")
    for axis, table in zip("thw", rope, strict=True):
        if table.shape[2:] != (2,) or table.dtype != torch.float32 or table.device != x.device:
            raise ValueError(
                f"rope.{axis}: expected [n, pairs, 2] float32 on {x.device},"
                f" got {list(table.shape)} {table.dtype} on {table.device}"
            )
        if not table.is_contiguous():
            raise ValueError(f"rope.{axis}: expected a contiguous table, got strides {table.stride()}")


def _obstacle(tensors: Sequence[Tensor], num_heads: int) -> str | None:
    if (reason := kernel_obstacle(tensors)) is not None:
        return reason
    channels = tensors[0].shape[2]
    if channels > MAX_CHANNELS:
        return f"kernels exist for up to {MAX_CHANNELS} channels, got {channels}"
    if channels // num_heads % 2:
        return f"kernels exist for an even head_dim, got {channels // num_heads}"
    return None


def cost(batch: int, length: int, channels: int, *, tensors: int = 2, itemsize: int = 2) -> Cost:
    """Returns the least cost of one call for one or both (``tensors``) of q and k.

    Weights and tables are negligible.
    """
    elements = tensors * batch * length * channels
    return Cost(10 * elements, elements * itemsize, elements * itemsize)
