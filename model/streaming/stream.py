"""The stream of layers whose weights come to the device while other layers run.

Layers that do not stay on the device share two slots there, one after the other. While a layer runs in one slot, the
next is copied into the other:

    compute stream   ... | wait ready[0] | layer 3 | free[0] | wait ready[1] | layer 5 | free[1] | ...
    copy stream      ... | layer 5 -> slot 1       | wait free[0] | layer 7 -> slot 0 | ...

The device allocates nothing for it, and nothing waits but for what it needs: the compute stream for the copy of its
layer, a copy for the layer before it in its slot. A copy is hidden where the layers that run meanwhile take longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

#: The number of slots on the device, which layers that do not stay share.
SLOTS = 2
#: The bytes of a layer in host memory, or a function that fills a buffer there with them.
Source = Tensor | Callable[[Tensor], None]


class DirectCopies:
    """An engine that copies sources into slots: for one kind of memory and one order of work, when it is asked to."""

    def __init__(self, slots: Sequence[Tensor]) -> None:
        self.slots = list(slots)

    def fetch(self, slot: int, source: Source) -> None:
        """Starts a copy as soon as the work queued before the slot's last :meth:`release` is done; here, at once."""
        target = self.slots[slot]
        if isinstance(source, Tensor):
            target[: source.numel()].copy_(source)
        else:
            source(target)

    def wait(self, slot: int) -> None:
        """Makes work that is queued from now on begin after the slot's last copy, which is done here."""

    def release(self, slot: int) -> None:
        """Marks the work queued until now as the last that reads the slot, for which no copy waits here."""

    def settle(self, slot: int) -> None:
        """Ends or gives up, on the host, what was asked for and nobody has waited for; nothing is under way here."""


class StreamCopies(DirectCopies):
    """An engine that copies on a CUDA stream of its own; a thread reads files into ``staging``, in pinned memory."""

    def __init__(self, slots: Sequence[Tensor], staging: Sequence[Tensor]) -> None:
        super().__init__(slots)
        self.staging = list(staging)
        self._stream = torch.cuda.Stream(slots[0].device)
        self._ready = [torch.cuda.Event() for _ in slots]
        self._free = [torch.cuda.Event() for _ in slots]
        self._reads: list[Future[None] | None] = [None] * len(slots)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        for slot, free in zip(self.slots, self._free, strict=True):
            # The slots' memory may still be read by work that was queued before, and its next owner has to wait for
            # the last copy.
            free.record(torch.cuda.current_stream(slot.device))
            slot.record_stream(self._stream)

    def fetch(self, slot: int, source: Source) -> None:
        """Queues the copy, after the reading of its file if it has one."""
        self.settle(slot)
        if isinstance(source, Tensor):
            self._copy(slot, source)
        else:
            self._reads[slot] = self._reader.submit(self._read, slot, source)

    def wait(self, slot: int) -> None:
        """Lets the host wait for the reading of a file, and the stream for the copy."""
        reading, self._reads[slot] = self._reads[slot], None
        if reading is not None:
            reading.result()
        torch.cuda.current_stream(self.slots[slot].device).wait_event(self._ready[slot])

    def settle(self, slot: int) -> None:
        """Awaits or cancels a reading that nobody has waited for, since it would write into the slot."""
        reading, self._reads[slot] = self._reads[slot], None
        if reading is not None and not reading.cancel():
            reading.exception()

    def release(self, slot: int) -> None:
        """Marks the present end of the stream as the last use of the slot."""
        self._free[slot].record(torch.cuda.current_stream(self.slots[slot].device))

    def _read(self, slot: int, fill: Callable[[Tensor], None]) -> None:
        # Until the slot's last copy is done, the buffer is its source.
        self._ready[slot].synchronize()
        fill(self.staging[slot])
        self._copy(slot, self.staging[slot])

    def _copy(self, slot: int, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[slot])
            self.slots[slot][: source.numel()].copy_(source, non_blocking=True)
            self._ready[slot].record(self._stream)


class LayerStream:
    """The order of a pass over all layers: :meth:`walk`.

    Args:
        layers: the layers of the model; the parameters of those in ``sources`` are views of a slot: those of the j-th
            of them, of slot ``j % SLOTS``.
        sources: by index, the bytes of the layers that are copied.
        unpack: by index, functions that make a layer's matrices of their 8-bit form, on the current stream.
        engine: what copies.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        sources: Mapping[int, Source],
        unpack: Mapping[int, Callable[[], None]],
        engine: DirectCopies,
    ) -> None:
        self._layers, self._unpack, self._engine = layers, dict(unpack), engine
        self._sources = [sources[i] for i in sorted(sources)]
        self._places = {i: j for j, i in enumerate(sorted(sources))}
        self._held: list[int | None] = [None] * SLOTS

    @property
    def copies(self) -> bool:
        """True where weights of layers are copied to the device in every pass."""
        return bool(self._sources)

    @property
    def fixed(self) -> bool:
        """True where all parameters are the model's own, and stay what they are."""
        return not self._sources and not self._unpack

    def settle(self) -> None:
        """Ends what is under way for a pass that does not come, so that the model can be let go."""
        for slot in range(min(SLOTS, len(self._sources))):
            self._engine.settle(slot)
            self._held[slot] = None

    def walk(self) -> Iterator[nn.Module]:
        """Yields the layers in order, each usable until the next one is asked for."""
        for place in range(min(SLOTS, len(self._sources))):
            self._bring(place)
        for index, layer in enumerate(self._layers):
            place = self._places.get(index)
            if place is not None:
                self._held[place % SLOTS] = None  # what cannot be read is not there
                self._engine.wait(place % SLOTS)
                self._held[place % SLOTS] = place
            if index in self._unpack:
                self._unpack[index]()
            try:
                yield layer
            finally:
                if place is not None:
                    self._engine.release(place % SLOTS)
            if place is not None:
                # The layer that comes into the slot next, in this pass or in another.
                self._bring(place + SLOTS if place + SLOTS < len(self._sources) else place % SLOTS)

    def _bring(self, place: int) -> None:
        """Asks for the layer, whose slot is free, unless it is there already."""
        slot = place % SLOTS
        if self._held[slot] != place:
            self._held[slot] = None
            self._engine.fetch(slot, self._sources[place])
            self._held[slot] = place
