"""Forwards for the modules of the original Wan code: attention, and the adaptive norms of the DiT's layers.

The original computes queries and keys in complex128 for the rotation, casts to 16 bits within ``flash_attention``, and
keeps the residual stream in float32 under bfloat16 autocast. Here norm and rotation are float32 and rounded once to the
dtype of the projection, which is what the original's attention rounds to.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ...norm.qk_norm_rope import norm_rope, qk_norm_rope
from ...norm.rope import Rope3D
from ..calls import AttentionCalls
from ..hooks import hooked
from ..norms import cross_layer
from ..sdpa import attend

#: The function in the original's attention module, and the name that its other modules import it under.
FUNCTION = "flash_attention"
HALF = (torch.float16, torch.bfloat16)

Forward = Callable[..., Any]


class Attention:
    """The attention of one accelerated model: the host's forwards with our ``flash_attention``, and its counts.

    Nothing in the host's modules is rebound, so other models of the process keep the host's function.
    """

    def __init__(self, calls: AttentionCalls, backend: str = "auto") -> None:
        self.calls, self.backend = calls, backend
        self._forwards: dict[type, FunctionType] = {}

    def function(self, host: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Returns the host's ``flash_attention`` with ours before it: same arguments, same result."""

        def flash_attention(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            q_lens: Tensor | None = None,
            k_lens: Tensor | None = None,
            dropout_p: float = 0.0,
            softmax_scale: float | None = None,
            q_scale: float | None = None,
            causal: bool = False,
            window_size: tuple[int, int] = (-1, -1),
            deterministic: bool = False,
            dtype: torch.dtype = torch.bfloat16,
            version: int | None = None,
        ) -> Tensor:
            if not self.calls.refuses(
                (q_lens is not None, "q_lens is given"),
                (dropout_p > 0, "dropout_p is not 0"),
                (causal, "causal"),
                (tuple(window_size) != (-1, -1), f"window_size {tuple(window_size)}"),
                (q.shape[2] != k.shape[2], "fewer heads of keys than of queries"),
            ):
                # As the host computes it: in 16 bits, and back to the dtype of the queries.
                half = v.dtype if v.dtype in HALF else dtype
                halves = [q.to(half) if q_scale is None else q.to(half) * q_scale, k.to(half), v.to(half)]
                out = self._serve(*halves, k_lens, softmax_scale)
                if out is not None:
                    return out.to(q.dtype)
            options = {"softmax_scale": softmax_scale, "q_scale": q_scale, "causal": causal, "window_size": window_size}
            options |= {"deterministic": deterministic, "dtype": dtype, "version": version}
            return host(q, k, v, q_lens, k_lens, dropout_p, **options)

        return flash_attention

    def forward(self, host_class: type[nn.Module]) -> FunctionType:
        """Returns the class's own ``forward`` in which the name ``flash_attention`` stands for ours.

        The other names of its module are those of the moment when it is first called.
        """
        if host_class not in self._forwards:
            original = own_forward(host_class)
            names = {**original.__globals__, FUNCTION: self.function(original.__globals__[FUNCTION])}
            code, defaults, closure = original.__code__, original.__defaults__, original.__closure__
            forward = FunctionType(code, names, original.__name__, defaults, closure)
            forward.__kwdefaults__ = original.__kwdefaults__
            self._forwards[host_class] = forward
        return self._forwards[host_class]

    def _serve(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float | None) -> Tensor | None:
        valid = None if lengths is None else torch.as_tensor(lengths)
        # The host keeps lengths on the CPU. Where they are equal, tokens from there on are not needed at all.
        if valid is not None and valid.device.type == "cpu" and len(same := set(valid.tolist())) == 1:
            (end,), valid = same, None
            k, v = k[:, :end], v[:, :end]
        valid = None if valid is None else valid.to(q.device)
        return attend(q, k, v, self.calls, scale=scale, valid_lengths=valid, backend=self.backend)


def own_forward(host_class: type[nn.Module]) -> FunctionType:
    """Returns the class's ``forward`` without its decorators."""
    return inspect.unwrap(host_class.forward)  # type: ignore[return-value]


def cross_attention_forward(attention: Attention) -> Forward:
    """Returns the host's own ``forward`` of a cross-attention, with our ``flash_attention`` in it.

    It is for ``WanT2VCrossAttention``, ``WanI2VCrossAttention`` and ``WanCrossAttention``.
    """

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return attention.forward(type(module))(module, *args, **kwargs)

    return forward


def self_attention_forward(attention: Attention) -> Forward:
    """Returns a ``forward`` for ``WanSelfAttention``: norm and rotation of q and k in one pass, then our function.

    What it does not take is for :meth:`Attention.forward`.
    """

    def forward(module: Any, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor | str:
        grids = {tuple(grid) for grid in grid_sizes.tolist()}
        if len(grids) != 1 or math.prod(grid := grids.pop()) > x.shape[1]:
            return "norm and rotation: grids that differ or have more tokens than there are"
        if (eps := _norm_eps(module, x)) is None:
            return "norm and rotation: its norms have hooks, are elsewhere or not as in Wan"
        if (rope := _tables(freqs, grid, module.head_dim, x.device)) is None:
            return "norm and rotation: its tables are not as in Wan"
        q, k = _normed(module, module.q(x), module.k(x), rope, eps)
        out = attention.forward(type(module)).__globals__[FUNCTION](
            q, k, module.v(x).unflatten(2, q.shape[2:]), k_lens=seq_lens, window_size=module.window_size
        )
        return module.o(out.flatten(2))

    return forward


def _norm_eps(module: Any, x: Tensor) -> float | None:
    """Returns the epsilon of the norms of queries and keys, or None where the fused operator cannot take them over."""
    norms = module.norm_q, module.norm_k
    if any(type(norm).__name__ != "WanRMSNorm" or hooked(norm) or norm.weight.device != x.device for norm in norms):
        return None
    return norms[0].eps if norms[0].eps == norms[1].eps and norms[0].weight.dtype == norms[1].weight.dtype else None


def _tables(freqs: Tensor, grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Rope3D | None:
    """Returns the tables of the host's complex ``[positions, head_dim / 2]``, or None if that is not what it has.

    Its columns are the pairs of t, h and w.
    """
    pairs = head_dim // 2
    if not freqs.is_complex() or freqs.shape[1] != pairs or max(grid) > freqs.shape[0]:
        return None
    axes = freqs.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
    return Rope3D(
        *(torch.view_as_real(x[:n]).to(device, torch.float32).contiguous() for x, n in zip(axes, grid, strict=True))
    )


def _normed(module: Any, q: Tensor, k: Tensor, rope: Rope3D, eps: float) -> tuple[Tensor, Tensor]:
    """Returns q and k normed and rotated, ``[B, L, H*D]`` to ``[B, L, H, D]``.

    Tokens after the grid are padding, which is normed and not rotated.
    """
    weights, heads = (module.norm_q.weight, module.norm_k.weight), module.num_heads
    tokens, length = math.prod(table.shape[0] for table in rope), q.shape[1]
    # Both are fresh outputs of their projections; with gradients they are left as they are.
    inplace = not torch.is_grad_enabled()
    if tokens == length:
        return qk_norm_rope(q, k, *weights, rope, heads, eps=eps, inplace=inplace)
    q_head, k_head = qk_norm_rope(q[:, :tokens], k[:, :tokens], *weights, rope, heads, eps=eps, inplace=inplace)
    tails = [
        norm_rope(x[:, tokens:], weight, None, heads, eps=eps, inplace=inplace)
        for x, weight in zip((q, k), weights, strict=True)
    ]
    if inplace:
        return q.unflatten(2, (heads, -1)), k.unflatten(2, (heads, -1))
    return torch.cat((q_head, tails[0]), dim=1), torch.cat((k_head, tails[1]), dim=1)


def layer_forward(
    module: Any,
    x: Tensor,
    e: Tensor,
    seq_lens: Tensor,
    grid_sizes: Tensor,
    freqs: Tensor,
    context: Tensor,
    context_lens: Tensor | None,
) -> Tensor | str:
    """Computes a layer, in place of the ``forward`` of ``WanAttentionBlock``.

    ``e`` is ``[B, 6, C]`` (2.1) or ``[B, L, 6, C]`` (2.2), float32. The residual stream has the dtype that the host's
    sums have from the first one on, float32 beside a float32 ``e``.
    """
    if hooked(module.norm1) or hooked(module.norm2):
        return "a hook on norm1 or norm2"
    table = module.modulation if e.ndim == 3 else module.modulation.unsqueeze(0)
    table = (table + e).unsqueeze(2) if e.ndim == 3 else table + e
    rows = table.unbind(1 if e.ndim == 3 else 2)
    x = x.to(torch.promote_types(x.dtype, table.dtype)).contiguous()
    norms = module.norm1, module.norm3, module.norm2
    attentions = (
        lambda y: module.self_attn(y, seq_lens, grid_sizes, freqs),
        lambda y: module.cross_attn(y, context, context_lens),
    )
    return cross_layer(x, rows.__getitem__, norms, attentions, module.ffn, (module.norm3, module.cross_attn))
