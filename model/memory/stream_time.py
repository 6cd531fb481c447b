"""The predicted time of a pass over a DiT's layers while some of them are copied, layer by layer in the order of
``model/streaming/stream.py``: two slots, one copy at a time, one file read at a time.

A copy is hidden as far as the layers that run meanwhile take longer. Nothing is measured: the rates are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.streaming.stream import SLOTS

#: Bytes a second that are read from a memory-mapped checkpoint: an NVMe disk of PCI Express 3. Assumed.
FILE_RATE = 3e9
#: The number of passes after which one takes as long as the next.
_SETTLED = 3
#: The share of a pass below which waiting is rounding.
_NOTHING = 1e-9


@dataclass(frozen=True)
class PassTime:
    """The seconds of one pass: the layers' work, copies over the bus, reading files, and the part of the last two that
    work does not hide."""

    compute: float
    copy: float
    read: float
    exposed: float

    @property
    def total(self) -> float:
        """The seconds from the first layer to the last."""
        return self.compute + self.exposed

    @property
    def limit(self) -> str:
        """A sentence that says what the seconds are made of."""
        if not self.copy:
            return "compute; weights are on the device"
        brought = f"reading files ({self.read:.2f} s" if self.read > self.copy else f"copies ({self.copy:.2f} s"
        if not self.exposed:
            return f"compute; copies are hidden ({self.copy:.2f} s of {self.compute:.2f} s a pass)"
        return f"{brought} beside {self.compute:.2f} s of compute a pass, {self.exposed:.2f} s not hidden)"


def pass_time(homes: Sequence[str], sizes: Sequence[int], compute: float, bus: float) -> PassTime:
    """Predicts a pass in the middle of many.

    Args:
        homes: as from :meth:`model.streaming.placement.Placement.homes`.
        sizes: bytes of each layer as it is copied.
        compute: seconds of the pass where all weights are on the device; its layers take the same time.
        bus: bytes a second from pinned host memory to the device.
    """
    moving = [i for i, home in enumerate(homes) if home != "device"]
    if len(moving) <= SLOTS:  # each has a slot of its own
        return PassTime(compute, 0.0, 0.0, 0.0)
    run = _Run(homes, sizes, moving, compute / len(homes), bus)
    for _ in range(_SETTLED):
        before = run.counts
        run.walk()
    now, copied, read = (after - start for after, start in zip(run.counts, before, strict=True))
    exposed = now - compute
    return PassTime(compute, copied / bus, read / FILE_RATE, exposed if exposed > _NOTHING * compute else 0.0)


class _Run:
    """The clock of a device and its two engines."""

    def __init__(
        self, homes: Sequence[str], sizes: Sequence[int], moving: Sequence[int], work: float, bus: float
    ) -> None:
        self._homes, self._sizes, self._moving = homes, sizes, moving
        self._work, self._bus = work, bus
        self._places = {index: place for place, index in enumerate(moving)}
        self._held: list[int | None] = [None] * SLOTS
        self._ready = [0.0] * SLOTS
        self._now = self._copied = self._read = 0.0
        self._copied_bytes = self._read_bytes = 0
        for place in range(SLOTS):
            self._bring(place)

    @property
    def counts(self) -> tuple[float, int, int]:
        """The seconds, bytes copied, and bytes read since the start."""
        return self._now, self._copied_bytes, self._read_bytes

    def walk(self) -> None:
        """Advances the clock by one pass."""
        for index in range(len(self._homes)):
            place = self._places.get(index)
            if place is not None:
                self._now = max(self._now, self._ready[place % SLOTS])
            self._now += self._work
            if place is not None:
                following = place + SLOTS
                self._bring(following if following < len(self._moving) else place % SLOTS)

    def _bring(self, place: int) -> None:
        slot, index = place % SLOTS, self._moving[place]
        if self._held[slot] == place:
            return
        self._held[slot], begin, size = place, max(self._now, self._copied), self._sizes[index]
        if self._homes[index] == "file":
            # Its buffer in host memory is free when the slot's last copy is done.
            self._read = max(self._read, self._ready[slot]) + size / FILE_RATE
            self._read_bytes += size
            begin = max(begin, self._read)
        self._copied_bytes += size
        self._copied = self._ready[slot] = begin + size / self._bus
