"""The work of a part of the pipeline: matmuls by kind, and the bytes that cross memory.

Convolutions and attention are matmuls too. Matmuls are counted exactly. Their operands cross memory once each
(``operand_bytes``), which the arithmetic of a good matmul hides. What lies between matmuls (norms, gates, rotations,
copies) is bound by memory. Its arithmetic is not counted, as it is nowhere in such counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Matmul(NamedTuple):
    """The operations of all matmuls of one kind and *extent*, the size that their rate depends on.

    Kinds and extents are ``self_attention`` and ``cross_attention`` (keys), ``linear`` (channels that are summed over),
    ``convolution`` (input channels), ``upsample`` (a 3x3 convolution of an enlarged frame, folded into 4 of 36 taps a
    phase; input channels), ``last_convolution`` (to few channels: these), ``frame_attention`` (one wide head over the
    pixels of a frame; its channels), and ``resize`` (interpolation as matmuls in float32, without tensor cores; pixels
    that are summed over).
    """

    kind: str
    flops: int
    extent: int


@dataclass(frozen=True)
class Work:
    """The matmuls, one entry a kind and extent, and bytes. Works add up and can be repeated: ``4 * step + context``.

    Between matmuls ``fused`` bytes are moved by the operators of ``swifti2v_kernels``, and ``separate`` bytes by the
    leanest operators that do one thing each, around matmuls that fuse nothing, as for float32 in the VAE.
    """

    matmuls: tuple[Matmul, ...] = ()
    operand_bytes: float = 0.0
    fused: float = 0.0
    separate: float = 0.0

    def __post_init__(self) -> None:
        totals: Counter[tuple[str, int]] = Counter()
        for matmul in self.matmuls:
            totals[matmul.kind, matmul.extent] += matmul.flops
        merged = tuple(Matmul(kind, flops, extent) for (kind, extent), flops in totals.items())
        object.__setattr__(self, "matmuls", merged)

    @property
    def flops(self) -> dict[str, int]:
        """The operations by kind, kinds without any left out."""
        totals: Counter[str] = Counter()
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
        return round(self.operand_bytes + self.fused)

    def __add__(self, other: Work) -> Work:
        return Work(
            (*self.matmuls, *other.matmuls), self.operand_bytes + other.operand_bytes, self.fused + other.fused,
            self.separate + other.separate,
        )  # fmt: skip

    def __mul__(self, times: float) -> Work:
        matmuls = tuple(Matmul(p.kind, round(times * p.flops), p.extent) for p in self.matmuls)
        return Work(matmuls, times * self.operand_bytes, times * self.fused, times * self.separate)

    __rmul__ = __mul__


def total(works: Iterable[Work]) -> Work:
    """Returns the sum of works; that of none is no work."""
    return sum(works, Work())
