"""The least cost of an operator's call, which benchmarks and reports hold its time against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiply-add is two) and bytes that must cross device memory at least once."""

    flops: int
    bytes_read: int
    bytes_written: int

    @property
    def bytes(self) -> int:
        """The least traffic in both directions, in bytes."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Work:
    """The work of one pass over a kernel's main loop, for all warps of a program; without a loop, of a whole program.

    ``fma`` are multiply-adds on the tensor cores; ``loaded`` bytes that the program fetches, which may come from L2.
    ``groups`` are the parts of a program that run through the loop without waiting for each other.
    """

    fma: int
    loaded: int
    groups: int = 1
