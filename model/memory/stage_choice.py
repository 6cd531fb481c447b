"""The candidate placements of the layers of one stage's DiT: what each takes while it runs, and for how long."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.memory.cost import dit as dit_cost
from model.memory.cost.windows import whole_step, window_passes, windows_memory
from model.memory.cost.work import Work
from model.memory.request import FLOAT8_MATMUL, DiTRequest, MemoryRequest
from model.memory.stage_time import StageTime, stage_time
from model.pipeline.encoders import TEXT_LENGTH
from model.streaming.placement import LayerLayout, PlacedBytes, Placement, layer_layout, placed_bytes
from model.streaming.stream import SLOTS

#: The decimals of the seconds by which candidates are compared.
DIGITS = 3
_FLOAT = 4


@dataclass(frozen=True)
class StageChoice:
    """A placed DiT: the bytes on the device while it runs, by name, and the seconds of its stage.

    ``rank`` is that of its form among those that are considered, ``streamed`` the number of layers that do not stay.
    """

    placement: Placement
    placed: PlacedBytes
    held: dict[str, int]
    time: StageTime
    rank: int
    streamed: int

    @property
    def device(self) -> int:
        """The bytes on the device."""
        return sum(self.held.values())


class StageChoices:
    """The candidates for Stage I (its experts have one placement), or for Stage II."""

    def __init__(self, request: MemoryRequest, first: bool) -> None:
        self.request, self.first = request, first
        one = (request.stage_one,) if request.low_noise is None else (request.stage_one, request.low_noise)
        self.dits: tuple[DiTRequest, ...] = one if first else (request.stage_two,)
        self.config = self.dits[0].config
        vae, size = (request.stage_one_vae, request.motion_size) if first else (request.vae, request.size)
        self.latent_size = size[1] // vae.spatial_stride, size[0] // vae.spatial_stride
        self.forms = self._forms()
        self._placed: dict[tuple[str, int, int | None], StageChoice] = {}
        self._written: dict[str, list[LayerLayout]] = {}
        self._beside: dict[torch.dtype | None, dit_cost.DiTMemory] = {}

    def _forms(self) -> tuple[str, ...]:
        """Returns the values of ``quantize`` to be tried, the preferred first."""
        r = self.request
        if r.quantize != "auto":
            return (r.quantize,)
        if r.matmul == "8bit":
            return ("float8" if r.capability is None or r.capability >= FLOAT8_MATMUL else "int8",)
        lossless = "file" if any(dit.stored for dit in self.dits) else "none"
        # Layers that can be read in every pass always fit the host memory.
        return (lossless,) if r.from_files else (lossless, "float8")

    def all(self, host: float) -> Iterator[StageChoice]:
        """Yields the choices that ``host`` bytes of host memory allow, the preferred and fastest first."""
        for quantize, streamed in self.pairs():
            found = self.within(host, quantize, streamed)
            if found is not None:
                yield found

    def pairs(self) -> list[tuple[str, int]]:
        """Returns every value of ``quantize`` with every number of streamed layers."""
        return [(quantize, n) for quantize in self.forms for n in streamed_counts(self.config.num_layers)]

    def best(self, room: float, host: float) -> StageChoice | None:
        """Returns the fastest choice within ``room`` bytes on the device: that with the fewest streamed layers."""
        return next((choice for choice in self.all(host) if choice.device <= room), None)

    def within(self, host: float, quantize: str, streamed: int) -> StageChoice | None:
        """Returns the choice with so many layers streamed, as many from pinned memory as fit the host, or None."""
        found = self.placed(quantize, streamed, None)
        if found.placed.host <= host:
            return found
        if not self.request.from_files:
            return None
        largest = max(layout.nbytes for layout in self._layouts(quantize))
        pinned = min(int((host - SLOTS * largest) // largest), streamed - 1)
        return self.placed(quantize, streamed, pinned) if pinned >= 0 else None

    def least_host(self, quantize: str, streamed: int) -> int:
        """Returns the bytes of host memory that so many streamed layers take at least."""
        pinned = 0 if self.request.from_files and streamed else None
        return self.placed(quantize, streamed, pinned).placed.host

    def placed(self, quantize: str, streamed: int, pinned: int | None) -> StageChoice:
        """Returns the choice with a placement; of two experts, the bytes of the one that takes most."""
        key = (quantize, streamed, pinned)
        if key not in self._placed:
            self._placed[key] = self._choice(*key)
        return self._placed[key]

    def _choice(self, quantize: str, streamed: int, pinned: int | None) -> StageChoice:
        r, layers = self.request, self.config.num_layers
        placement = Placement(layers - streamed if streamed else None, pinned, quantize, r.matmul)
        placed = max(
            (placed_bytes(dit.config, r.dtype, placement, dit.stored) for dit in self.dits),
            key=lambda placed: (placed.device, placed.host),
        )
        eight_bits = placement.matmul_dtype
        if eight_bits not in self._beside:
            self._beside[eight_bits] = self._memory(eight_bits)
        memory = self._beside[eight_bits]
        held = {
            "weights": placed.fixed + placed.resident,
            "slots": placed.slots,
            "unpacked layer": placed.unpacked,
            "workspace": memory.workspace,
            "text": _FLOAT * TEXT_LENGTH * self.config.text_dim,
            "text keys and values": memory.context,
            "modulation": memory.modulation,
            "latents": memory.stores,
            "remembered keys and values": memory.remembered,
        }
        time = stage_time(self._passes, self._layouts(quantize), placement, r.gpu, r.dtype.itemsize)
        held = {name: size for name, size in held.items() if size}
        return StageChoice(placement, placed, held, time, self.forms.index(quantize), streamed)

    def _layouts(self, quantize: str) -> list[LayerLayout]:
        """Returns the layouts of the layers of the expert that has most to copy."""
        if quantize not in self._written:
            placement = Placement(quantize=quantize, matmul=self.request.matmul)
            found = [
                [layer_layout(d.config, self.request.dtype, placement, i, d.stored) for i in range(d.config.num_layers)]
                for d in self.dits
            ]
            self._written[quantize] = max(found, key=lambda layouts: sum(layout.nbytes for layout in layouts))
        return self._written[quantize]

    @functools.cached_property
    def _passes(self) -> list[tuple[int, Work]]:
        """All passes over the layers: how often, and their work."""
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
        """Returns the bytes beside the weights; the weights that it counts too are those of a model in one dtype."""
        r = self.request
        options = {"steps": self._steps, "dtype": r.dtype, "eight_bits": eight_bits}
        if not self.first:
            return windows_memory(self.config, r.plan, r.mode, self.latent_size, **options)
        blocks = dict.fromkeys(("window_blocks", "denoised_blocks", "num_blocks"), r.plan.num_blocks)
        return dit_cost.memory(self.config, self.latent_size, **blocks, **options)


def streamed_counts(layers: int) -> list[int]:
    """Returns the numbers of streamed layers that are considered.

    As many as there are slots would save nothing, and with an even number each layer keeps to one slot.
    """
    counts = [0, *range(SLOTS + 2, layers + 1, 2)]
    return counts if layers in counts or layers <= SLOTS else [*counts, layers]
