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
