"""The activations of one DiT step: planned once from shapes, allocated once, and then used by every layer and step.

What must hold all tokens of a window is the residual stream ``x``, its normed copy ``n`` and one layer's ``k`` and
``v``: 4 tensors of [B, L, C]. Everything else of a layer is computed for a *part* of the tokens at a time (its queries
attend to all keys), so that the feed-forward's hidden activation, 4 to 6 times as wide as the stream, exists for one
part only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from model.config import DiTConfig
from swifti2v_kernels import QuantizedRows

#: Tokens of a part, at most: 22 tiles of 128 rows, a fifth of a block at 2560x1408. So many rows still fill a GPU with
#: matmuls (264 tiles of 128 x 128 for 1,536 channels, two for each of the 132 multiprocessors of an H200; not
#: yet tuned on hardware), and the hidden activation of Wan 1.3B at 70,400 tokens is a quarter row of the stream.
MAX_PART_TOKENS = 2816


@dataclass(frozen=True)
class Part:
    """The tokens ``start .. stop - 1`` of batch entry ``batch``, in equal shares of blocks ``first .. last - 1``."""

    batch: int
    start: int
    stop: int
    first: int
    last: int


def plan_parts(batch: int, block_len: int, blocks: Iterable[int], max_tokens: int = MAX_PART_TOKENS) -> list[Part]:
    """Cuts the given blocks of a window into parts: several neighbouring blocks each, or one share of a large block.

    A part never holds a piece of one block beside another block, since one modulation row is chosen for every block.
    """
    spans: list[tuple[int, int, int, int]] = []
    wanted = sorted(blocks)
    starts = [i for i, block in enumerate(wanted) if i == 0 or wanted[i - 1] + 1 != block]
    for i, j in zip(starts, [*starts[1:], len(wanted)], strict=False):  # without blocks there are no runs
        first, last = wanted[i], wanted[j - 1] + 1
        if block_len > max_tokens:
            share = -(-block_len // -(-block_len // max_tokens))
            for block in range(first, last):
                stop = (block + 1) * block_len
                spans += [(s, min(s + share, stop), block, block + 1) for s in range(block * block_len, stop, share)]
        else:
            step = max_tokens // block_len
            for block in range(first, last, step):
                end = min(block + step, last)
                spans.append((block * block_len, end * block_len, block, end))
    return [Part(b, *span) for b in range(batch) for span in spans]


@dataclass(frozen=True)
class Workspace:
    """The named buffers of a step, each as large as its largest use; :meth:`take` shapes one for a use."""

    buffers: dict[str, Tensor] = field(repr=False)
    #: The dtype of what is quantised before a matmul; None where matmuls are in the model's dtype.
    eight_bits: torch.dtype | None = None

    @classmethod
    def plan(
        cls,
        config: DiTConfig,
        batch: int,
        num_blocks: int,
        block_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_tokens: int = MAX_PART_TOKENS,
        eight_bits: torch.dtype | None = None,
    ) -> Workspace:
        """Allocates the buffers for windows of up to ``num_blocks`` blocks of ``block_len`` tokens.

        With ``eight_bits`` the normed stream is kept quantised to that dtype, and ``rows`` is a part's input of a
        matmul.
        """
        tokens = batch * num_blocks * block_len
        parts = plan_parts(1, block_len, range(num_blocks), max_tokens)
        part = max(part.stop - part.start for part in parts)
        sizes = dict.fromkeys(("x", "n", "k", "v"), tokens * config.dim)
        sizes |= {"a": part * config.dim, "b": part * config.dim, "hidden": part * max(config.ffn_dim, config.dim)}
        kinds = dict.fromkeys(sizes, dtype)
        if eight_bits is not None:
            sizes |= {"n.scales": tokens, "rows": sizes["hidden"], "rows.scales": part}
            kinds |= {"n": eight_bits, "rows": eight_bits} | dict.fromkeys(("n.scales", "rows.scales"), torch.float32)
        return cls(
            {name: torch.empty(size, dtype=kinds[name], device=device) for name, size in sizes.items()}, eight_bits
        )

    def take(self, name: str, *shape: int) -> Tensor:
        """Returns the first elements of a buffer as a contiguous tensor of ``shape``.

        Raises:
            ValueError: the workspace was planned for less.
        """
        if prod(shape) > self.buffers[name].numel():
            held = self.buffers[name].numel()
            raise ValueError(
                f"workspace: {name} holds {held:,} elements and {list(shape)} are needed; plan a larger one"
            )
        return self.buffers[name][: prod(shape)].view(shape)

    def take_rows(self, name: str, *shape: int) -> QuantizedRows:
        """Returns a quantised buffer: values of ``shape`` and a scale for each of their rows."""
        return QuantizedRows(self.take(name, *shape), self.take(f"{name}.scales", *shape[:-1]))

    def normed(self, name: str, *shape: int) -> Tensor | QuantizedRows:
        """Returns the buffer for a norm that only matmuls read.

        It is quantised if these are in 8 bits: ``rows``, or ``n`` for ``n``.
        """
        if self.eight_bits is None:
            return self.take(name, *shape)
        return self.take_rows(name if name == "n" else "rows", *shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers together."""
        return sum(buffer.nbytes for buffer in self.buffers.values())
