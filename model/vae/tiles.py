"""Tiles of a frame that are computed exactly: every layer reads the halo that it needs, and no more.

A tile's pixels depend on pixels around it. Going backwards through the layers, each says which *region* of its input a
region of its output needs (:meth:`Region.grown` for a 3x3 convolution, :meth:`Region.halved` for an upsampling, ...),
cut off at the frame's borders, where a layer pads with zeros as it would for the whole frame. Every layer then computes
just what the next one reads, so a tile equals that part of the whole frame, at any size and position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Pixels ``start .. stop - 1`` of a frame of ``size`` pixels, along one axis."""

    start: int
    stop: int
    size: int

    def __len__(self) -> int:
        return self.stop - self.start


class Region(NamedTuple):
    """A rectangle of a frame: a span of its rows and one of its columns."""

    rows: Span
    columns: Span

    @classmethod
    def whole(cls, height: int, width: int) -> Region:
        """Returns the region that is all of a frame of ``height`` x ``width`` pixels."""
        return cls(Span(0, height, height), Span(0, width, width))

    @property
    def slices(self) -> tuple[slice, slice]:
        """The place of this region, rows and columns, in the whole frame."""
        return slice(self.rows.start, self.rows.stop), slice(self.columns.start, self.columns.stop)

    @property
    def pixels(self) -> int:
        """The number of pixels in this region."""
        return len(self.rows) * len(self.columns)

    def grown(self, pixels: int) -> Region:
        """Returns this region with ``pixels`` more on all sides, cut off at the frame's borders."""
        return Region(*(Span(max(s.start - pixels, 0), min(s.stop + pixels, s.size), s.size) for s in self))

    def scaled(self, factor: int) -> Region:
        """Returns the same place in a frame ``factor`` times as large on both axes."""
        return Region(*(Span(s.start * factor, s.stop * factor, s.size * factor) for s in self))

    def halved(self) -> Region:
        """Returns the pixels of a frame of half the size on both axes that cover these."""
        return Region(*(Span(s.start // 2, -(-s.stop // 2), s.size // 2) for s in self))

    def part_of(self, x: Tensor, have: Region) -> Tensor:
        """Returns a view of this region of frames ``x`` ``[B, T, h, w, C]`` over ``have``.

        Raises:
            ValueError: this region is not part of ``have``.
        """
        for axis, (s, held) in enumerate(zip(self, have, strict=True), start=2):
            if held.size != s.size or not held.start <= s.start < s.stop <= held.stop:
                raise ValueError(f"region: {s} is not within {held}")
            x = x.narrow(axis, s.start - held.start, len(s))
        return x


def conv_padding(have: Region, want: Region, halo: int = 1) -> tuple[int, int, int, int]:
    """Returns top, bottom, left and right padding of a convolution that makes ``want`` from ``have``.

    The convolution has ``2 * halo + 1`` taps on each axis. Padding is more than 0 only at the frame's borders; a
    negative number says how many pixels of the input are left out.
    """
    return tuple(
        side for h, w in zip(have, want, strict=True) for side in (h.start - w.start + halo, w.stop - h.stop + halo)
    )  # type: ignore[return-value]


@dataclass(frozen=True)
class VAEPlan:
    """A plan of how the VAE works through a clip: its tiles, and what is in memory at a time.

    Layers whose reach is the whole frame (next to the latents: the middle block attends over it) always run on whole
    frames. All others run tile by tile on a grid of ``rows`` x ``columns`` tiles of the latents. Tiles read their true
    surroundings, so every plan gives the same result but for rounding; it chooses between memory and time.

    Attributes:
        rows, columns: tiles of a frame, from top to bottom and from left to right.
        frames: the most frames that any layer handles at once.
        chunk: latent frames that go through a tile before the next tile; None: all that there are.
        park: whether that which waits (the tiles' states between chunks; features and frames of a chunk) is kept in
            host memory.

    Raises:
        ValueError: a number is below 1.

    Examples:
        >>> [(len(tile.rows), len(tile.columns)) for tile in VAEPlan(rows=2, columns=2).regions(height=5, width=8)]
        [(2, 4), (2, 4), (3, 4), (3, 4)]
    """

    rows: int = 1
    columns: int = 1
    frames: int = 4
    chunk: int | None = 1
    park: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk: expected at least 1, or None for the whole clip, got {self.chunk}")

    @property
    def tiles(self) -> int:
        """The number of tiles of a frame."""
        return self.rows * self.columns

    def regions(self, height: int, width: int) -> list[Region]:
        """Returns the tiles of a latent frame of this size, row by row; their sides differ by one at most.

        There are fewer than ``rows`` x ``columns`` where the frame has fewer latent pixels than that.
        """
        rows, columns = (
            [Span(size * i // n, size * (i + 1) // n, size) for i in range(n)]
            for size, n in ((height, min(self.rows, height)), (width, min(self.columns, width)))
        )
        return [Region(row, column) for row in rows for column in columns]


class VAEPlans(NamedTuple):
    """The plans of all places where a clip needs a VAE: Stage I's condition and result, the reference, the clip."""

    condition: VAEPlan
    motion: VAEPlan
    reference: VAEPlan
    decode: VAEPlan
    #: The dtype in which the reference is encoded.
    encode_dtype: torch.dtype
