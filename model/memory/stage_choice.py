"""Where the blocks of one stage's DiT can be, what that takes while the stage runs, and how long it then takes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.memory.cost import dit as dit_cost
from model.memory.cost.windows import whole_step, window_passes, windows_memory
from model.memory.cost.work import Work
from model.memory.request import FLOAT8_PRODUCTS, DiTRequest, MemoryRequest
from model.memory.stage_time import StageTime, stage_time
from model.pipeline.encoders import TEXT_LENGTH
from model.streaming.placement import BlockLayout, PlacedBytes, Placement, block_layout, placed_bytes
from model.streaming.stream import SLOTS

#: Seconds that tell candidates apart have so many decimals.
DIGITS = 3
_FLOAT = 4


@dataclass(frozen=True)
class StageChoice:
    """A placed DiT: what is on the device while it runs, by name, and the seconds of its stage.

    ``rank`` is that of its storage among those that are considered, ``streamed`` the number of blocks that do not stay.
    """

    placement: Placement
    placed: PlacedBytes
    held: dict[str, int]
    time: StageTime
    rank: int
    streamed: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return sum(self.held.values())


class StageChoices:
    """Those of Stage I (its experts have one placement), or of Stage II."""

    def __init__(self, request: MemoryRequest, first: bool) -> None:
        self.request, self.first = request, first
        one = (request.stage_one,) if request.low_noise is None else (request.stage_one, request.low_noise)
        self.dits: tuple[DiTRequest, ...] = one if first else (request.stage_two,)
        self.config = self.dits[0].config
        vae, size = (request.stage_one_vae, request.motion_size) if first else (request.vae, request.size)
        self.latent_size = size[1] // vae.spatial_stride, size[0] // vae.spatial_stride
        self.storages = self._storages()
        self._placed: dict[tuple[str, int, int | None], StageChoice] = {}
        self._written: dict[str, list[BlockLayout]] = {}
        self._beside: dict[torch.dtype | None, dit_cost.DiTMemory] = {}

    def _storages(self) -> tuple[str, ...]:
        """Forms of the block matrices, the preferred first."""
        r = self.request
        if r.storage != "auto":
            return (r.storage,)
        if r.products == "8bit":
            return ("float8" if r.capability is None or r.capability >= FLOAT8_PRODUCTS else "int8",)
        lossless = "file" if any(dit.stored for dit in self.dits) else "plain"
        # What can be read in every pass always fits the host memory.
        return (lossless,) if r.from_files else (lossless, "float8")

    def all(self, host: float) -> Iterator[StageChoice]:
        """As far as ``host`` bytes of host memory allow, the preferred and fastest first."""
        for storage, streamed in self.pairs():
            found = self.within(host, storage, streamed)
            if found is not None:
                yield found

    def pairs(self) -> list[tuple[str, int]]:
        """Every storage, with every number of streamed blocks."""
        return [(storage, n) for storage in self.storages for n in streamed_counts(self.config.num_layers)]

    def best(self, room: float, host: float) -> StageChoice | None:
        """The fastest within ``room`` bytes on the device, which is the one with the fewest streamed blocks."""
        return next((choice for choice in self.all(host) if choice.device <= room), None)

    def within(self, host: float, storage: str, streamed: int) -> StageChoice | None:
        """With so many blocks streamed: as many of them from pinned memory as there is host memory for, if any way."""
        found = self.placed(storage, streamed, None)
        if found.placed.host <= host:
            return found
        if not self.request.from_files:
            return None
        largest = max(layout.nbytes for layout in self._layouts(storage))
        pinned = min(int((host - SLOTS * largest) // largest), streamed - 1)
        return self.placed(storage, streamed, pinned) if pinned >= 0 else None

    def least_host(self, storage: str, streamed: int) -> int:
        """Bytes of host memory that so many streamed blocks take at least."""
        pinned = 0 if self.request.from_files and streamed else None
        return self.placed(storage, streamed, pinned).placed.host

    def placed(self, storage: str, streamed: int, pinned: int | None) -> StageChoice:
        """What a placement takes; of two experts, the one that takes most."""
        key = (storage, streamed, pinned)
        if key not in self._placed:
            self._placed[key] = self._choice(*key)
        return self._placed[key]

    def _choice(self, storage: str, streamed: int, pinned: int | None) -> StageChoice:
        r, layers = self.request, self.config.num_layers
        placement = Placement(layers - streamed if streamed else None, pinned, storage, r.products)
        placed = max(
            (placed_bytes(dit.config, r.dtype, placement, dit.stored) for dit in self.dits),
            key=lambda placed: (placed.device, placed.host),
        )
        eight_bits = placement.product_dtype
        if eight_bits not in self._beside:
            self._beside[eight_bits] = self._memory(eight_bits)
        memory = self._beside[eight_bits]
        held = {
            "weights": placed.fixed + placed.resident,
            "slots": placed.slots,
            "unpacked block": placed.unpacked,
            "workspace": memory.workspace,
            "text": _FLOAT * TEXT_LENGTH * self.config.text_dim,
            "text keys and values": memory.context,
            "modulation": memory.modulation,
            "latents": memory.stores,
            "remembered keys and values": memory.remembered,
        }
        time = stage_time(self._passes, self._layouts(storage), placement, r.gpu, r.dtype.itemsize)
        held = {name: size for name, size in held.items() if size}
        return StageChoice(placement, placed, held, time, self.storages.index(storage), streamed)

    def _layouts(self, storage: str) -> list[BlockLayout]:
        """Of the blocks of the expert that has most to copy."""
        if storage not in self._written:
            placement = Placement(storage=storage, products=self.request.products)
            found = [
                [block_layout(d.config, self.request.dtype, placement, i, d.stored) for i in range(d.config.num_layers)]
                for d in self.dits
            ]
            self._written[storage] = max(found, key=lambda layouts: sum(layout.nbytes for layout in layouts))
        return self._written[storage]

    @functools.cached_property
    def _passes(self) -> list[tuple[int, Work]]:
        """All passes over the blocks: how often, and what."""
        r, itemsize, steps = self.request, self.request.dtype.itemsize, self._steps
        passes: list[tuple[int, Work]] = []
        for dit in self.dits:
            work = dit_cost.context(dit.config, itemsize=itemsize)
            passes.append((1, work + dit_cost.modulation(dit.config, steps + 1, itemsize)))
        if self.first:
            return [*passes, (steps, whole_step(self.config, r.plan.num_blocks, self.latent_size, itemsize))]
        for window in r.plan:
            once, step = window_passes(self.config, window, r.mode, self.latent_size, itemsize)
            passes += [(1, once)] if once is not None else []
            passes.append((steps, step))
        return passes

    @property
    def _steps(self) -> int:
        return self.request.stage_one_steps if self.first else self.request.steps

    def _memory(self, eight_bits: torch.dtype | None) -> dit_cost.DiTMemory:
        """What is there beside the weights, of which this function knows those of a plain model only."""
        r = self.request
        options = {"steps": self._steps, "dtype": r.dtype, "eight_bits": eight_bits}
        if not self.first:
            return windows_memory(self.config, r.plan, r.mode, self.latent_size, **options)
        blocks = dict.fromkeys(("window_blocks", "denoised_blocks", "num_blocks"), r.plan.num_blocks)
        return dit_cost.memory(self.config, self.latent_size, **blocks, **options)


def streamed_counts(layers: int) -> list[int]:
    """Numbers of streamed blocks that are considered. As many as there are slots would save nothing, and with an even
    number each block keeps to one slot."""
    counts = [0, *range(SLOTS + 2, layers + 1, 2)]
    return counts if layers in counts or layers <= SLOTS else [*counts, layers]
