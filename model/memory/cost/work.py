"""What a part of the pipeline has to do: matrix products by kind, and the bytes that cross memory.

Products are counted exactly. Their operands cross memory once each (``operand_bytes``), which a good product hides
behind its arithmetic. What lies between products (norms, gates, rotations, copies) is bound by memory and is counted by
how it is written (:class:`Traffic`). Its arithmetic is not counted, as it is nowhere in such counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

#: Kinds of products. The *extent* of one is what its rate depends on.
KINDS: Mapping[str, str] = {
    "self_attention": "extent: keys",
    "cross_attention": "extent: keys",
    "linear": "extent: channels that are summed over",
    "convolution": "extent: input channels",
    "upsample": "a 3x3 convolution of an enlarged frame, folded into 4 of 36 taps a phase; extent: input channels",
    "last_convolution": "to few channels; extent: these",
    "frame_attention": "one wide head over the pixels of a frame; extent: its channels",
    "resize": "interpolation as products in float32, without tensor cores; extent: pixels that are summed over",
}

#: Operations of an upsampling convolution that is not folded (3x3 taps over every pixel) over those of one that is.
UNFOLDED = 36 / 16


@dataclass(frozen=True)
class Product:
    """Operations of all products of one kind and extent."""

    kind: str
    flops: int
    extent: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.flops < 0 or self.extent < 1:
            raise ValueError(f"flops, extent: expected at least 0 and 1, got {self.flops} and {self.extent}")


class Traffic(NamedTuple):
    """Bytes that move between products, by how the code is written.

    ``fused``: the operators of ``swifti2v_kernels``. ``separate``: the leanest operators that do one thing each, around
    products that fuse nothing; what float32 takes in the VAE. ``eager``: plain PyTorch with its casts and copies.
    """

    fused: float = 0.0
    separate: float = 0.0
    eager: float = 0.0

    @classmethod
    def same(cls, moved: float) -> Traffic:
        """However it is written."""
        return cls(moved, moved, moved)


@dataclass(frozen=True)
class Work:
    """Products, one entry a kind and extent, and bytes. Works add up and can be repeated: ``4 * step + context``."""

    products: tuple[Product, ...] = ()
    operand_bytes: float = 0.0
    between: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        object.__setattr__(self, "products", _merged(self.products))

    @property
    def flops(self) -> dict[str, int]:
        """Operations by kind, kinds without any left out."""
        totals: dict[str, int] = defaultdict(int)
        for product in self.products:
            totals[product.kind] += product.flops
        return dict(totals)

    @property
    def total_flops(self) -> int:
        """Operations of all products."""
        return sum(product.flops for product in self.products)

    @property
    def bytes(self) -> int:
        """Traffic of the fused form: operands and results of products, and what is between them."""
        return round(self.operand_bytes + self.between.fused)

    def __add__(self, other: Work) -> Work:
        between = Traffic(*(a + b for a, b in zip(self.between, other.between, strict=True)))
        return Work((*self.products, *other.products), self.operand_bytes + other.operand_bytes, between)

    def __mul__(self, times: float) -> Work:
        if times < 0:
            raise ValueError(f"times: expected at least 0, got {times}")
        products = tuple(Product(p.kind, round(times * p.flops), p.extent) for p in self.products)
        return Work(products, times * self.operand_bytes, Traffic(*(times * moved for moved in self.between)))

    __rmul__ = __mul__


def total(works: Iterable[Work]) -> Work:
    """The sum; of none, no work."""
    return sum(works, Work())


def _merged(products: Iterable[Product]) -> tuple[Product, ...]:
    totals: dict[tuple[str, int], int] = defaultdict(int)
    for product in products:
        totals[product.kind, product.extent] += product.flops
    return tuple(Product(kind, flops, extent) for (kind, extent), flops in totals.items())
