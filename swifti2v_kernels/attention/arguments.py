"""Arguments of segment attention: the masks that are given by structure, and the checks of a whole call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..common.checks import Spec, check_targets, check_tensor, check_values

#: Views of one call, queries or sources: their pointers are kernel arguments, and these have a limit in bytes.
MAX_VIEWS = 24

_QUERIES = Spec(("B*", "Lq*", "H*", "D"), None, last="head_dim")

Source = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BlockWindow:
    """A local mask over blocks of tokens, for the first source of :func:`swifti2v_kernels.segment_attention`.

    The queries of block i see the keys of blocks ``i - left .. i + right``. Other sources (an anchor, a text) are seen
    by all queries. No mask is stored: the kernels leave out the keys that a block does not see.

    Attributes:
        block_len: tokens of a block; the last block may be shorter.
        left: blocks before its own that a block sees.
        right: blocks after its own that a block sees.

    Examples:
        >>> q, k, v = torch.randn(3, 1, 12, 2, 64)
        >>> segment_attention(q, [(k, v)], window=BlockWindow(block_len=4, left=1)).shape
        torch.Size([1, 12, 2, 64])
    """

    block_len: int
    left: int
    right: int = 0


class SegmentCall(NamedTuple):
    """A checked call, in the order of the registered operators: without sources that are empty or seen by no query."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    valid_lengths: list[Tensor | None]
    scale: float
    #: Per query view, bit j says whether it sees source j.
    attends: list[int]
    #: (block_len, left, right) in source 0, for one query view; empty without a window.
    window: list[int]
    out: list[Tensor] | None = None
    #: Empty where it is not wanted.
    lse: Sequence[Tensor] = ()

    def check_written(self) -> None:
        """Checks that outputs overlap neither themselves, nor each other, nor an input."""
        inputs = {f"q[{i}]": x for i, x in enumerate(self.q)}
        for j, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            inputs |= {f"sources[{j}].k": k, f"sources[{j}].v": v}
        check_targets({f"out[{i}]": x for i, x in enumerate(self.out or ())}, inputs, ())

    def check_lengths(self) -> None:
        """Checks that no source has fewer keys than are said to count, which is known on the CPU."""
        for j, (x, k) in enumerate(zip(self.valid_lengths, self.k, strict=True)):
            if x is not None:
                check_values(f"valid_lengths[{j}]", x, 0, k.shape[1])


def check_call(
    q: Tensor | Sequence[Tensor],
    sources: Sequence[Source],
    scale: float | None = None,
    valid_lengths: Sequence[Tensor | None] | None = None,
    attends: Sequence[Sequence[int]] | None = None,
    window: BlockWindow | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> SegmentCall:
    """Returns the call as lists, or raises an error that says which argument is wrong."""
    queries = [q] if isinstance(q, Tensor) else list(q)
    if not 1 <= len(queries) <= MAX_VIEWS:
        raise ValueError(f"q: expected a tensor or 1 to {MAX_VIEWS} of them, got {len(queries)}")
    first = queries[0]
    check_tensor("q" if len(queries) == 1 else "q[0]", first, _QUERIES)
    view, device = Spec((first.shape[0], "L*", *first.shape[2:]), first.dtype, last="head_dim"), first.device
    for i in range(1, len(queries)):
        check_tensor(f"q[{i}]", queries[i], view, device)
    if not 1 <= len(sources) <= MAX_VIEWS:
        raise ValueError(f"sources: expected 1 to {MAX_VIEWS} (k, v) pairs, got {len(sources)}")
    for i, pair in enumerate(sources):
        if isinstance(pair, Tensor) or len(pair) != 2:
            given = type(pair).__name__ if isinstance(pair, Tensor) else f"{len(pair)} items"
            raise TypeError(f"sources[{i}]: expected a pair (k, v), got {given}")
        check_tensor(f"sources[{i}].k", pair[0], view, device)
        check_tensor(f"sources[{i}].v", pair[1], view, device)
        if pair[0].shape[1] != pair[1].shape[1]:
            raise ValueError(f"sources[{i}]: k has {pair[0].shape[1]} tokens and v has {pair[1].shape[1]}")
    lengths = [k.shape[1] for k, _ in sources]
    if all(n == 0 for n in lengths):
        raise ValueError("sources: every source is empty (0 keys), so the softmax is undefined")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a positive number, got {scale}")
    valid = _check_valid_lengths(valid_lengths, len(sources), first)
    visible = _check_attends(attends, len(queries), lengths)
    if window is not None:
        _check_window(window, [x.shape[1] for x in queries], lengths[0], visible[0])
    targets = None
    if out is not None:
        targets = [out] if isinstance(out, Tensor) else list(out)
        if len(targets) != len(queries) or isinstance(out, Tensor) != isinstance(q, Tensor):
            raise ValueError(f"out: expected {len(queries)} view(s), as many as q, got {len(targets)}")
        for i, (x, y) in enumerate(zip(targets, queries, strict=True)):
            check_tensor(f"out[{i}]", x, Spec(y.shape, y.dtype, last="head_dim"), device)
    # What no query sees is left out, so that a single query view sees all that is kept. A window speaks of the first
    # source, which stays.
    wanted = {j for seen in visible for j in seen}
    kept = [j for j, n in enumerate(lengths) if (n and j in wanted) or (j == 0 and window is not None)]
    return SegmentCall(
        queries,
        [sources[j][0] for j in kept],
        [sources[j][1] for j in kept],
        [valid[j] for j in kept],
        first.shape[3] ** -0.5 if scale is None else float(scale),
        [sum([1 << i for i, j in enumerate(kept) if j in seen]) for seen in visible],
        [] if window is None else [window.block_len, window.left, window.right],
        targets,
    )


def _check_valid_lengths(valid_lengths: Sequence[Tensor | None] | None, sources: int, q: Tensor) -> list[Tensor | None]:
    if valid_lengths is None:
        return [None] * sources
    if isinstance(valid_lengths, Tensor) or len(valid_lengths) != sources:
        given = "a tensor" if isinstance(valid_lengths, Tensor) else f"{len(valid_lengths)} entries"
        raise ValueError(f"valid_lengths: expected a list of {sources} entries, one a source, got {given}")
    spec = Spec(q.shape[:1], (torch.int32, torch.int64), last="")
    for j, x in enumerate(valid_lengths):
        if x is not None:
            check_tensor(f"valid_lengths[{j}]", x, spec, q.device)
    return [None if x is None else x.contiguous() for x in valid_lengths]


def _check_attends(attends: Sequence[Sequence[int]] | None, views: int, lengths: Sequence[int]) -> list[list[int]]:
    """Returns the sources that each view of the queries sees; ``lengths`` are the sources' keys."""
    if attends is None:
        return [list(range(len(lengths)))] * views
    if len(attends) != views:
        raise ValueError(f"attends: expected {views} lists, one a query view, got {len(attends)}")
    for i, seen in enumerate(attends):
        if len(set(seen)) != len(seen) or any(not 0 <= j < len(lengths) for j in seen):
            raise ValueError(f"attends[{i}]: expected different indices in 0..{len(lengths) - 1}, got {list(seen)}")
        if all(lengths[j] == 0 for j in seen):
            raise ValueError(f"attends[{i}]: expected at least one source with keys, got {list(seen)}")
    return [sorted(seen) for seen in attends]


def _check_window(window: BlockWindow, queries: Sequence[int], keys: int, visible: Sequence[int]) -> None:
    """Checks a window over so many keys of the first source, for views of so many queries."""
    if window.block_len < 1 or window.left < 0 or window.right < 0:
        raise ValueError(f"window: expected block_len >= 1, left >= 0 and right >= 0, got {window}")
    if len(queries) != 1 or queries[0] != keys:
        raise ValueError(f"window: expected one query view as long as the first source, {keys}, got lengths {queries}")
    if 0 not in visible:
        raise ValueError(f"attends: expected the first source among those seen, since window masks it, got {visible}")


def aligned(*views: Tensor) -> bool:
    """Returns whether all rows begin at a multiple of 16 bytes, as TMA and torch's attention need it.

    Fake tensors have no address; the offset of the view in its storage stands for it.
    """
    return all(
        (x.storage_offset() * x.itemsize if type(x) is not Tensor and is_fake(x) else x.data_ptr()) % 16 == 0
        and all(s * x.itemsize % 16 == 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1)
        for x in views
    )
