"""What an operator costs at least: the numbers behind benchmarks and reports."""

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
        """Least traffic in both directions."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Work:
    """What one pass over a kernel's main loop does, for all warps of a program; of a whole program without a loop.

    ``fma`` are multiply-adds on the tensor cores; ``loaded`` bytes that the program fetches, which may come from L2.
    ``groups`` are the parts of a program that run through the loop without waiting for each other.
    """

    fma: int
    loaded: int
    groups: int = 1
