"""Calls of attention as models make them, with which its kernels are compiled, checked, timed and tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.case import Arguments, Case, Cost, RealSize, Work
from ..common.shapes import WINDOWS
from .arguments import BlockWindow
from .merge_attention import merge_attention
from .segment_attention import KERNEL_HEAD_DIMS, segment_attention


def cost(batch: int, heads: int, head_dim: int, query_len: int, key_len: int, pairs: int | None = None) -> Cost:
    """Returns the least cost of one call in 16 bits; ``pairs`` (query, key) per head and batch entry, default all."""
    rows = 2 * batch * heads * head_dim
    pairs = query_len * key_len if pairs is None else pairs
    return Cost(4 * batch * heads * head_dim * pairs, rows * (query_len + 2 * key_len), rows * query_len)


class AttentionInputs(NamedTuple):
    """The tensors of one case, all of them slices of fused qkv buffers ``[B, L, 3, H, D]``, as the model has them."""

    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    query_lens: tuple[int, ...] = (299,)
    key_lens: tuple[int, ...] = (333,)
    valid: bool = False
    lse: bool = False
    window: BlockWindow | None = None
    #: Elements between the heads of one token beyond head_dim; 1 leaves nothing aligned.
    gap: int = 0
    attend_all: bool = False
    batch: int = 2
    heads: int = 2
    new: Callable[..., Tensor] = torch.ones

    def __call__(self, device: torch.device) -> Arguments:
        def views(length: int) -> list[Tensor]:
            size = self.batch, length, 3, self.heads, self.head_dim + self.gap
            buffer = self.new(size, dtype=self.dtype, device=device)
            return [buffer[:, :, i, :, : self.head_dim] for i in range(3)]

        q = [views(n)[0] for n in self.query_lens]
        sources = [tuple(views(n)[1:]) for n in self.key_lens]
        options: dict[str, object] = {"return_lse": self.lse, "window": self.window, "backend": "triton"}
        if self.valid:
            options["valid_lengths"] = [torch.full((self.batch,), n - 1, device=device) for n in self.key_lens]
        if len(q) > 1 and not self.attend_all:
            options["attends"] = [range(min(i + 1, len(sources))) for i in range(len(q))]
        return (q if len(q) > 1 else q[0], sources), options


def _attention_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work on one tile of keys: two matrix multiplications, and k and v loaded.

    The Hopper kernel's two consumers do not wait for each other.
    """
    tile = constants["BLOCK_N"] * constants["BLOCK_D"]
    return Work(2 * constants["BLOCK_M"] * tile, 2 * 2 * tile, 2 if "NUM_K" in constants else 1)


def _attention_cases() -> list[Case]:
    calls: dict[str, AttentionInputs] = {"fp16": AttentionInputs(128, torch.float16)}
    for d in KERNEL_HEAD_DIMS:
        calls |= {
            f"d{d}": AttentionInputs(d),
            f"d{d} lse": AttentionInputs(d, lse=True),
            f"d{d} 2 sources": AttentionInputs(d, key_lens=(333, 77)),
            f"d{d} 2 sources, padded, lse": AttentionInputs(d, key_lens=(333, 77), valid=True, lse=True),
            f"d{d} 4 sources, padded": AttentionInputs(d, key_lens=(333, 77, 77, 20), valid=True),
            f"d{d} joint, 2 sources": AttentionInputs(d, query_lens=(333, 77), key_lens=(333, 77), attend_all=True),
            f"d{d} causal, 3 sources": AttentionInputs(d, query_lens=(77, 150), key_lens=(77, 150, 40), lse=True),
            f"d{d} 5 sources": AttentionInputs(d, key_lens=(333, 77, 77, 128, 1)),
            f"d{d} block window": AttentionInputs(d, query_lens=(333,), key_lens=(333, 77), window=BlockWindow(100, 1)),
            f"d{d} unaligned": AttentionInputs(d, gap=1),
        }
    ltx, clip = WINDOWS["LTX-Video 1216x704, 121 frames"], WINDOWS["Stage I 640x352, 1.3B"]
    large, small = WINDOWS["CSG window 2560x1408, 5B"], WINDOWS["CSG window 1280x704, 1.3B"]
    heads, block = small.model.heads, small.block_len
    real = {
        "d64 lse": _attention_real("1216x704, 121 frames, LTX-Video", calls["d64 lse"], ltx.model.heads, ltx.tokens),
        "d128 lse": _attention_real(large.name, calls["d128 lse"], large.model.heads, large.tokens),
        "d128 2 sources": _attention_real(small.name, calls["d128 2 sources"], heads, 4 * block, block),
        "d128 5 sources": _attention_real(small.name, calls["d128 5 sources"], heads, *[block] * 5),
        "d128 block window": _attention_real(
            "640x352, 81 frames", calls["d128 block window"], clip.model.heads, clip.tokens, 512
        ),
    }
    return [
        Case(f"segment_attention {name}", segment_attention, inputs, _attention_work, real.get(name))
        for name, inputs in calls.items()
    ]


def _attention_real(shape: str, inputs: AttentionInputs, heads: int, *key_lens: int) -> RealSize:
    """Returns a case's call at real size.

    There are as many queries as keys, or under a window of 3 of 21 blocks as many as the first source has.
    """
    queries = key_lens[0] if inputs.window else sum(key_lens)
    window = None if inputs.window is None else BlockWindow(queries // 21, 1, 1)
    whole = inputs._replace(
        batch=1, heads=heads, query_lens=(queries,), key_lens=key_lens, window=window, new=torch.empty
    )
    pairs = None if window is None else queries * (3 * queries // 21 + sum(key_lens[1:]))
    return RealSize(shape, whole, cost(1, heads, inputs.head_dim, queries, sum(key_lens), pairs=pairs))


def _merge_inputs(
    head_dim: int, dtype: torch.dtype, parts: int, batch: int = 2, length: int = 299, heads: int = 3
) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        outputs = [torch.ones(batch, length, heads, head_dim, dtype=dtype, device=device) for _ in range(parts)]
        lses = [torch.zeros(batch, heads, length, device=device) for _ in range(parts)]
        return (outputs, lses), {"backend": "triton"}

    return make


_2K = WINDOWS["CSG window 2560x1408, 1.3B"]
_2K_ROWS = _2K.tokens * _2K.model.heads
_MERGE_REAL = RealSize(
    _2K.name,
    _merge_inputs(128, torch.bfloat16, 2, 1, _2K.tokens, _2K.model.heads),
    Cost(2 * 2 * 128 * _2K_ROWS, 2 * (2 * 128 + 4) * _2K_ROWS, (2 * 128 + 4) * _2K_ROWS),
)


def _merge_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one program: two parts of 16 bits read and one written."""
    return Work(0, 3 * constants["BLOCK"] * (2 * constants["HEAD_DIM"] + 4))


_MERGE_CASES = [
    Case(
        f"merge_attention d{d} {parts} parts {str(t).removeprefix('torch.')}",
        merge_attention,
        _merge_inputs(d, t, parts),
        _merge_work,
        _MERGE_REAL if d == 128 else None,
    )
    for d, t, parts in ((128, torch.bfloat16, 2), (96, torch.float16, 3), (64, torch.float32, 2))
]

CASES = [*_attention_cases(), *_MERGE_CASES]
