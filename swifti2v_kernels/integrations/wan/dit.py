"""Forwards for the modules of the original Wan code: attention, and the adaptive norms of the DiT's layers.

The original computes queries and keys in complex128 for the rotation, casts to 16 bits within ``flash_attention``, and
keeps the residual stream in float32 under bfloat16 autocast. Here norm and rotation are float32 and rounded once to the
dtype of the projection, which is what the original's attention rounds to.

Only their names tell what these modules are, so both codes are tried (:mod:`~swifti2v_kernels.integrations.probing`).
Projections, the feed-forward network and, within a layer, attention are stand-ins there: both codes call them as
modules, and their weights are large. ``flash_attention`` is another stand-in, for host and ours: the host's may not run
on the CPU. Cross-attention needs no trial, since it stays the host's own code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ...norm.qk_norm_rope import qk_norm_rope
from ...norm.rope import Rope3D
from ..norms import alike, cross_layer, modulation_rows, rms_parameters
from ..probing import Forward, Trial, magnitudes, twin
from ..sdpa import AttentionCalls, attend

#: The function in the original's attention module, and the name that its other modules import it under.
FUNCTION = "flash_attention"
HALF = (torch.float16, torch.bfloat16)
#: Tokens of a trial, the last two of which are padding, and what may differ in it in float32 and in 16 bits.
_TOKENS, _GRID = 14, (2, 2, 3)
_EXACT, _ROUNDED = 1e-4, 0.05


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
            **others: Any,
        ) -> Tensor:
            if not self.calls.refuses(
                (q_lens is not None, "q_lens is given"),
                (dropout_p > 0, "dropout_p is not 0"),
                (causal, "causal"),
                (tuple(window_size) != (-1, -1), f"window_size {tuple(window_size)}"),
                (q.shape[2] != k.shape[2], "fewer heads of keys than of queries"),
            ):
                # As the host computes it: in 16 bits, and back to the dtype of the queries.
                half = v.dtype if v.dtype in HALF else others.get("dtype", torch.bfloat16)
                halves = [q.to(half) if q_scale is None else q.to(half) * q_scale, k.to(half), v.to(half)]
                out = self._serve(*halves, k_lens, softmax_scale)
                if out is not None:
                    return out.to(q.dtype)
            others |= {"softmax_scale": softmax_scale, "q_scale": q_scale, "causal": causal, "window_size": window_size}
            return host(q, k, v, q_lens=q_lens, k_lens=k_lens, dropout_p=dropout_p, **others)

        return flash_attention

    def forward(self, host_class: type[nn.Module]) -> FunctionType:
        """Returns the class's own ``forward`` in which the name ``flash_attention`` stands for ours.

        The other names of its module are those of the moment when it is first called.
        """
        if host_class not in self._forwards:
            original: Any = host_class.forward
            names = {**original.__globals__, FUNCTION: self.function(original.__globals__[FUNCTION])}
            code, defaults, closure = original.__code__, original.__defaults__, original.__closure__
            forward = FunctionType(code, names, original.__name__, defaults, closure)
            forward.__kwdefaults__ = original.__kwdefaults__
            self._forwards[host_class] = forward
        return self._forwards[host_class]

    def cross_attention(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replaces the ``forward`` of a cross-attention by itself, with our ``flash_attention`` in it."""
        return self.forward(type(module))(module, *args, **kwargs)

    def self_attention(
        self, module: Any, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor
    ) -> Tensor | str:
        """Replaces the ``forward`` of ``WanSelfAttention``: norm and rotation of q and k in one pass, then ours.

        What it does not take is for :meth:`forward`.
        """
        grids = {tuple(grid) for grid in grid_sizes.tolist()}
        if len(grids) != 1 or math.prod(grid := grids.pop()) != x.shape[1]:
            return "norm and rotation: grids that differ, or padding after them"
        norm_q, norm_k = rms_parameters(module.norm_q, x), rms_parameters(module.norm_k, x)
        if not alike(norm_q, norm_k):
            return "norm and rotation: its norms have hooks, are elsewhere or not as in Wan"
        if (rope := _tables(freqs, grid, module.head_dim, x.device)) is None:
            return "norm and rotation: its tables are not as in Wan"
        options = {"eps": norm_q[1], "inplace": not torch.is_grad_enabled()}
        q, k = qk_norm_rope(module.q(x), module.k(x), norm_q[0], norm_k[0], rope, module.num_heads, **options)
        out = self.forward(type(module)).__globals__[FUNCTION](
            q, k, module.v(x).unflatten(2, q.shape[2:]), k_lens=seq_lens, window_size=module.window_size
        )
        return module.o(out.flatten(2))

    def _serve(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float | None) -> Tensor | None:
        valid = None if lengths is None else torch.as_tensor(lengths)
        # The host keeps lengths on the CPU. Where they are equal, tokens from there on are not needed at all.
        if valid is not None and valid.device.type == "cpu" and len(same := set(valid.tolist())) == 1:
            (end,), valid = same, None
            k, v = k[:, :end], v[:, :end]
        valid = None if valid is None else valid.to(q.device)
        return attend(q, k, v, self.calls, scale=scale, valid_lengths=valid, backend=self.backend)


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
    if module.training and getattr(module, "gradient_checkpointing", False):
        return "gradient checkpointing"
    row = modulation_rows(module.modulation[0], e if e.ndim == 4 else e.unsqueeze(1))
    x = x.to(torch.promote_types(x.dtype, torch.result_type(module.modulation, e))).contiguous()
    norms = module.norm1, module.norm3, module.norm2
    attentions = (
        lambda y: module.self_attn(y, seq_lens, grid_sizes, freqs),
        lambda y: module.cross_attn(y, context, context_lens),
    )
    return cross_layer(x, row, norms, attentions, module.ffn)


class _Tried(Attention):
    """An attention whose ``flash_attention`` is cheap, and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__(AttentionCalls())
        self.seen: list[Any] = []

    def function(self, host: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Returns a function of all that attention depends on."""
        signature = inspect.signature(super().function(host))

        def flash_attention(*args: Any, **kwargs: Any) -> Tensor:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            q, k, v, *others = bound.arguments.values()
            self.seen.append(others)
            length = bound.arguments["k_lens"]
            scores = torch.einsum("blhd,bmhd->bhlm", q.float(), k.float()) / q.shape[-1]
            if length is not None:
                scores = scores.masked_fill(torch.arange(k.shape[1]) >= length[:, None, None, None], -torch.inf)
            return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v.float()).to(q.dtype)

        return flash_attention


def self_attention_probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of ``WanSelfAttention``, in float32 and as under autocast, with padding and without."""
    made = twin(module, torch.float32, ("q", "k", "v", "o"))
    angles = torch.rand(max(_GRID), made.head_dim // 2, generator=_generator(), dtype=torch.float64)
    freqs, grids = torch.polar(torch.ones_like(angles), 3 * angles), torch.tensor([_GRID, _GRID])

    def run(casts: bool, padded: bool, code: Forward) -> Any:
        tried, x = _Tried(), _tokens(made.num_heads * made.head_dim)
        given = (x, torch.tensor([12, 9]), grids) if padded else (x[:1, :12], torch.tensor([12]), grids[:1])
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            out = tried.self_attention(made, *given, freqs) if code is forward else ""
            # What ours does not take is the host's.
            out = tried.forward(type(module))(made, *given, freqs) if isinstance(out, str) else out
        return out, tried.seen, given

    for casts, tolerance in ((False, _EXACT), (True, _ROUNDED)):
        for padded in (True, False):
            yield Trial(partial(run, casts, padded), tolerance)


def layer_probe(module: nn.Module, forward: Forward) -> Iterator[Trial]:
    """Yields the trials of ``WanAttentionBlock``, with padding and without.

    ``e`` is as in 2.1 or as in 2.2, which also has no lengths of the context; a host takes one of them.
    """
    made = twin(module, torch.float32, ("self_attn", "cross_attn", "ffn"))
    grids, freqs = torch.tensor([_GRID, _GRID]), torch.ones(3, 2, dtype=torch.complex128)

    def run(per_token: bool, dtype: torch.dtype, case: str, code: Forward) -> Any:
        x = _tokens(made.modulation.shape[-1])
        shape = (2, *([_TOKENS] if per_token else []), 6, x.shape[2])
        e = 0.5 * torch.randn(shape, generator=_generator(), dtype=torch.float32)
        context, y, lengths = 0.5 * x[:, :5], x.to(dtype), torch.tensor([5, 3]) if case == "text lengths" else None
        given = y, e, torch.tensor([12, 9]), grids, freqs, context, lengths
        if case == "no padding":
            one = e[:1, :12] if per_token else e[:1]
            given = y[:1, :12], one, torch.tensor([12]), grids[:1], freqs, context[:1], None
        return code(made, *given), given

    for per_token in (False, True):
        for dtype, tolerance in ((torch.float32, _EXACT), (torch.bfloat16, _ROUNDED)):
            for case in ("text lengths", "no text lengths", "no padding"):
                yield Trial(partial(run, per_token, dtype, case), tolerance)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tokens(channels: int) -> Tensor:
    """Returns random ``[2, L, C]`` whose tokens differ in magnitude."""
    x = torch.randn(2, _TOKENS, channels, generator=_generator(), dtype=torch.float32)
    return x * magnitudes(_TOKENS)[:, None]
