"""The candidate placements of the layers of one stage's DiT: what each takes while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.memory.dit_bytes import DiTMemory, dit_memory
from model.memory.request import FLOAT8_MATMUL, DiTRequest, MemoryRequest
from model.pipeline.encoders import TEXT_LENGTH
from model.streaming.placement import PlacedBytes, Placement, placed_bytes
from model.streaming.stream import SLOTS

_FLOAT = 4


@dataclass(frozen=True)
class StageChoice:
    """A placed DiT: the bytes on the device while it runs, by name.

    ``rank`` is that of its form among those that are considered, ``streamed`` the number of layers that do not stay.
    """

    placement: Placement
    placed: PlacedBytes
    held: dict[str, int]
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
        self.counts = streamed_counts(self.config.num_layers)
        self._placed: dict[tuple[str, int, int | None], StageChoice] = {}
        self._beside: dict[torch.dtype | None, DiTMemory] = {}

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

    def best(self, room: float, host: float) -> StageChoice | None:
        """Returns the first choice within ``room`` and ``host`` bytes: the preferred form, the fewest streamed."""
        found = (self.fewest(room, host, quantize) for quantize in self.forms)
        return next((choice for choice in found if choice is not None), None)

    def fewest(self, room: float, host: float, quantize: str) -> StageChoice | None:
        """Returns the choice of a form with the fewest streamed layers that fits, or None.

        More streamed layers take less of the device and more of the host.
        """
        if self.placed(quantize, self.counts[-1], None).device > room:
            return None
        fits = next(n for n in self.counts if self.placed(quantize, n, None).device <= room)
        return self.within(host, quantize, fits)

    def least(self, host: float, quantize: str) -> Iterator[StageChoice]:
        """Yields the choices of a form that ``host`` bytes of host memory allow, that with most streamed first."""
        found = (self.within(host, quantize, streamed) for streamed in reversed(self.counts))
        return (choice for choice in found if choice is not None)

    def within(self, host: float, quantize: str, streamed: int) -> StageChoice | None:
        """Returns the choice with so many layers streamed, as many from pinned memory as fit the host, or None."""
        found = self.placed(quantize, streamed, None)
        if found.placed.host <= host:
            return found
        if not self.request.from_files:
            return None
        largest = found.placed.slots // SLOTS
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
        memory = self._memory(placement.matmul_dtype)
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
        held = {name: size for name, size in held.items() if size}
        return StageChoice(placement, placed, held, self.forms.index(quantize), streamed)

    def _memory(self, eight_bits: torch.dtype | None) -> DiTMemory:
        """Returns the bytes beside the weights."""
        r = self.request
        if eight_bits not in self._beside:
            self._beside[eight_bits] = dit_memory(
                self.config, r.plan, self.latent_size, steps=r.stage_one_steps if self.first else r.steps,
                dtype=r.dtype, causal=r.mode == "causal", whole=self.first, eight_bits=eight_bits,
            )  # fmt: skip
        return self._beside[eight_bits]


def streamed_counts(layers: int) -> list[int]:
    """Returns the numbers of streamed layers that are considered.

    As many as there are slots would save nothing, and with an even number each layer keeps to one slot.
    """
    counts = [0, *range(SLOTS + 2, layers + 1, 2)]
    return counts if layers in counts or layers <= SLOTS else [*counts, layers]
