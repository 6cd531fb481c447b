"""The work of a part of the pipeline: matmuls by kind, and the bytes that cross memory.

Convolutions and attention are matmuls too. Matmuls are counted exactly. Their operands cross memory once each
(``operand_bytes``), which the arithmetic of a good matmul hides. What lies between matmuls (norms, gates, rotations,
copies) is bound by memory and is counted by how it is written (:class:`Traffic`). Its arithmetic is not counted, as it
is nowhere in such counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

#: The kinds of matmuls. The *extent* of one is the size that its rate depends on.
KINDS: Mapping[str, str] = {
    "self_attention": "extent: keys",
    "cross_attention": "extent: keys",
    "linear": "extent: channels that are summed over",
    "convolution": "extent: input channels",
    "upsample": "a 3x3 convolution of an enlarged frame, folded into 4 of 36 taps a phase; extent: input channels",
    "last_convolution": "to few channels; extent: these",
    "frame_attention": "one wide head over the pixels of a frame; extent: its channels",
    "resize": "interpolation as matmuls in float32, without tensor cores; extent: pixels that are summed over",
}

#: The operations of an upsampling convolution that is not folded (3x3 taps over every pixel) over those of one that is.
UNFOLDED = 36 / 16


@dataclass(frozen=True)
class Matmul:
    """The operations of all matmuls of one kind and extent."""

    kind: str
    flops: int
    extent: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.flops < 0 or self.extent < 1:
            raise ValueError(f"flops, extent: expected at least 0 and 1, got {self.flops} and {self.extent}")


class Traffic(NamedTuple):
    """The bytes that move between matmuls, by how the code is written.

    ``fused``: the operators of ``swifti2v_kernels``. ``separate``: the leanest operators that do one thing each, around
    matmuls that fuse nothing, as for float32 in the VAE. ``eager``: plain PyTorch with its casts and copies.
    """

    fused: float = 0.0
    separate: float = 0.0
    eager: float = 0.0

    @classmethod
    def same(cls, moved: float) -> Traffic:
        """Returns the same bytes however the code is written."""
        return cls(moved, moved, moved)


@dataclass(frozen=True)
class Work:
    """The matmuls, one entry a kind and extent, and bytes. Works add up and can be repeated: ``4 * step + context``."""

    matmuls: tuple[Matmul, ...] = ()
    operand_bytes: float = 0.0
    between: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matmuls", _merged(self.matmuls))

    @property
    def flops(self) -> dict[str, int]:
        """The operations by kind, kinds without any left out."""
        totals: dict[str, int] = defaultdict(int)
        for matmul in self.matmuls:
            totals[matmul.kind] += matmul.flops
        return dict(totals)

    @property
    def total_flops(self) -> int:
        """The operations of all matmuls."""
        return sum(matmul.flops for matmul in self.matmuls)

    @property
    def bytes(self) -> int:
        """The bytes of the fused form: operands and results of matmuls, and what is between them."""
        return round(self.operand_bytes + self.between.fused)

    def __add__(self, other: Work) -> Work:
        between = Traffic(*(a + b for a, b in zip(self.between, other.between, strict=True)))
        return Work((*self.matmuls, *other.matmuls), self.operand_bytes + other.operand_bytes, between)

    def __mul__(self, times: float) -> Work:
        if times < 0:
            raise ValueError(f"times: expected at least 0, got {times}")
        matmuls = tuple(Matmul(p.kind, round(times * p.flops), p.extent) for p in self.matmuls)
        return Work(matmuls, times * self.operand_bytes, Traffic(*(times * moved for moved in self.between)))

    __rmul__ = __mul__


def total(works: Iterable[Work]) -> Work:
    """Returns the sum of works; that of none is no work."""
    return sum(works, Work())


def _merged(matmuls: Iterable[Matmul]) -> tuple[Matmul, ...]:
    totals: dict[tuple[str, int], int] = defaultdict(int)
    for matmul in matmuls:
        totals[matmul.kind, matmul.extent] += matmul.flops
    return tuple(Matmul(kind, flops, extent) for (kind, extent), flops in totals.items())
