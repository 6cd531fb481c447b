"""The calls of real models that ``python -m bench attention`` compares, and our own kernels as implementations."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.operators.peers import PEERS, Peer
from bench.records.outcome import Unavailable
from swifti2v_kernels import segment_attention
from swifti2v_kernels.attention import choice
from swifti2v_kernels.attention.arguments import check_call
from swifti2v_kernels.attention.cases import AttentionInputs, cost
from swifti2v_kernels.common.case import Case, RealSize, Work
from swifti2v_kernels.common.shapes import WINDOWS, Model

Sources = Sequence[tuple[Tensor, Tensor]]


def call_of(name: str, model: Model, queries: int, *keys: int) -> Case:
    """Returns one call in bf16 for one batch entry, its tensors slices of fused buffers; ``keys`` are the sources'."""
    heads, head_dim = model.heads, model.head_dim
    inputs = AttentionInputs(head_dim, batch=1, heads=heads, query_lens=(queries,), key_lens=keys, new=torch.empty)
    real = RealSize(name, inputs, cost(1, heads, head_dim, queries, sum(keys)))
    return Case(name, segment_attention, inputs, lambda constants: Work(0, 0), real)


_WINDOWS = [window for name, window in WINDOWS.items() if name.startswith("CSG window")]
_2K, _14B = WINDOWS["CSG window 2560x1408, 1.3B"], WINDOWS["Stage I 640x352, 14B"]
_HUNYUAN, _LTX = WINDOWS["HunyuanVideo 1280x720, 61 frames"], WINDOWS["LTX-Video 1216x704, 121 frames"]
SHAPES = (
    *(call_of(window.name, window.model, window.tokens, window.tokens) for window in _WINDOWS),
    call_of("CSG window 2560x1408, 3 sources", _2K.model, _2K.tokens, *(n * _2K.block_len for n in (1, 1, 3))),
    call_of("CSG causal 2560x1408, noisy queries", _2K.model, *(n * _2K.block_len for n in (3, 2, 3))),
    call_of("CSG cross-attention 2560x1408", _2K.model, _2K.tokens, 512),
    call_of("Stage I 640x352, 81 frames, 14B", _14B.model, _14B.tokens, _14B.tokens),
    call_of(f"{_HUNYUAN.name}, joint", _HUNYUAN.model, _HUNYUAN.tokens, _HUNYUAN.tokens, 256),
    call_of(_LTX.name, _LTX.model, _LTX.tokens, _LTX.tokens),
)
_720 = _WINDOWS[0]
QUICK_SHAPES = (
    SHAPES[0],
    call_of("CSG window 1280x704, 3 sources", _720.model, _720.tokens, *(n * _720.block_len for n in (1, 1, 3))),
)


def providers(quick: bool) -> list[Peer]:
    """Returns all implementations that there may be; what is not installed says so when it is called."""
    own, others = functools.partial(Peer, ours=True), PEERS[segment_attention]
    return [
        own("swifti2v", own_kernel),
        own("swifti2v, portable kernel", functools.partial(own_kernel, portable=True)),
        # It leaves dense calls to torch where that is faster.
        own("swifti2v, public function", lambda q, sources: segment_attention(q, sources)),
        *(others[:2] if quick else others),
    ]


def own_kernel(q: Tensor, sources: Sources, portable: bool = False) -> Tensor:
    """Calls our own kernel, without the dispatch of dense calls to torch.

    Raises:
        Unavailable: ``portable`` is asked for where it is the only kernel, which would then be listed twice.
    """
    call = check_call(q, sources, out=torch.empty_like(q, memory_format=torch.contiguous_format))
    kernel, _ = choice.own_kernel(call)
    if portable:
        if kernel == "portable":
            raise Unavailable("the portable kernel is the only one here")
        kernel = "portable"
    choice.launch(call, kernel)
    return call.out[0]
