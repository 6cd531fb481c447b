"""Tiles of a frame that are computed exactly: every layer reads the halo that it needs, and no more.

A tile's pixels depend on pixels around it. Going backwards through the layers, each says which *region* of its input a
region of its output needs (:meth:`Span.grown` for a 3x3 convolution, :meth:`Span.halved` for an upsampling, ...), cut
off at the frame's borders, where a layer pads with zeros as it would for the whole frame. Every layer then computes
just what the next one reads, so a tile equals that part of the whole frame, at any size and position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Span:
    """Pixels ``start .. stop - 1`` of a frame of ``size`` pixels, along one axis."""

    start: int
    stop: int
    size: int

    def __len__(self) -> int:
        return self.stop - self.start

    def grown(self, pixels: int) -> Span:
        """With so many more on both sides, within the frame."""
        return Span(max(self.start - pixels, 0), min(self.stop + pixels, self.size), self.size)

    def scaled(self, factor: int) -> Span:
        """The same place in a frame ``factor`` times as large."""
        return Span(self.start * factor, self.stop * factor, self.size * factor)

    def halved(self) -> Span:
        """The pixels of a frame of half the size that cover these."""
        return Span(self.start // 2, -(-self.stop // 2), self.size // 2)

    def within(self, other: Span) -> slice:
        """Where these are in memory that holds ``other``."""
        if other.size != self.size or not other.start <= self.start < self.stop <= other.stop:
            raise ValueError(f"span: {self} is not within {other}")
        return slice(self.start - other.start, self.stop - other.start)


class Region(NamedTuple):
    """Rows and columns of a frame."""

    rows: Span
    columns: Span

    @classmethod
    def whole(cls, height: int, width: int) -> Region:
        """All of a frame."""
        return cls(Span(0, height, height), Span(0, width, width))

    @property
    def pixels(self) -> int:
        """How many."""
        return len(self.rows) * len(self.columns)

    def grown(self, pixels: int) -> Region:
        """:meth:`Span.grown` of both."""
        return Region(self.rows.grown(pixels), self.columns.grown(pixels))

    def scaled(self, factor: int) -> Region:
        """:meth:`Span.scaled` of both."""
        return Region(self.rows.scaled(factor), self.columns.scaled(factor))

    def halved(self) -> Region:
        """:meth:`Span.halved` of both."""
        return Region(self.rows.halved(), self.columns.halved())

    def within(self, other: Region) -> tuple[slice, slice]:
        """:meth:`Span.within` of both."""
        return self.rows.within(other.rows), self.columns.within(other.columns)


def conv_padding(have: Region, want: Region, halo: int = 1) -> tuple[int, int, int, int]:
    """Top, bottom, left and right padding (negative: pixels left out) of a convolution of ``2 * halo + 1`` taps whose
    input holds ``have`` and whose output is ``want``. More than 0 only at the frame's borders."""
    return tuple(
        side for h, w in zip(have, want, strict=True) for side in (h.start - w.start + halo, w.stop - h.stop + halo)
    )  # type: ignore[return-value]


@dataclass(frozen=True)
class VAEPlan:
    """How the VAE works through a clip.

    Layers whose reach is the whole frame (next to the latents: the middle block attends over it) always run on whole
    frames. All others run tile by tile on a grid of ``rows x columns`` tiles of the latents, and so many frames at a
    time.
    """

    rows: int = 1
    columns: int = 1
    #: The most frames that any layer handles at once.
    frames: int = 4
    #: Latent frames that go through a tile before the next tile; None: all that there are.
    chunk: int | None = 1
    #: What waits (the tiles' states between chunks; features and frames of a chunk) lies in host memory.
    park: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk: expected at least 1, or None for the whole clip, got {self.chunk}")

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.rows * self.columns

    def regions(self, height: int, width: int) -> list[Region]:
        """The tiles of latent frames of this size, by row and column; sizes differ by one at most."""
        rows, columns = (
            [Span(size * i // n, size * (i + 1) // n, size) for i in range(n)]
            for size, n in ((height, min(self.rows, height)), (width, min(self.columns, width)))
        )
        return [Region(row, column) for row in rows for column in columns]


class VAEPlans(NamedTuple):
    """One plan for each place where a clip needs a VAE: Stage I's condition, its result, the reference, the clip."""

    condition: VAEPlan
    motion: VAEPlan
    reference: VAEPlan
    decode: VAEPlan
    #: What the reference is encoded in.
    encode_dtype: torch.dtype
