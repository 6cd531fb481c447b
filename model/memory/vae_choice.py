"""The choice of tiles for one half of the VAE in one place of the pipeline: the first plan that fits.

There are two kinds: tiles that are not at work wait on the device, or in host memory. Within a kind, more tiles take
less while they work, and have more halo. The order does not depend on what there is room for, so more room never makes
the peak smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from model.memory.vae_plan import (
    FRAMES,
    PlannedVAE,
    Request,
    first_plan,
    grids,
    half_bytes,
    plan_of,
    state_bytes,
    waiting_bytes,
)
from model.vae.tiles import VAEPlan

#: The number of grids that are tried where tiles wait on the device. With more tiles, state grows faster than
#: activations shrink.
RESIDENT_GRIDS = 3
#: The most tiles where they wait in host memory: at 2K, more save less than a tenth of the activations.
MOST_TILES = 64


@dataclass(frozen=True)
class VAEUse:
    """A plan of half of the VAE in its place in the pipeline.

    ``copied`` is the bytes of all copies of waiting tiles to host memory and back, and ``host`` those that wait there.
    """

    planned: PlannedVAE
    copied: int
    host: int

    @property
    def peak(self) -> int:
        """The peak bytes on the device."""
        return self.planned.peak.total

    @property
    def park(self) -> bool:
        """True if tiles wait in host memory."""
        return self.planned.plan.park


@dataclass(frozen=True)
class VAEPlace:
    """One half of the VAE in one place of the pipeline.

    Args:
        request: its half, size and dtype; its ``piece`` is that of plans whose tiles wait in host memory. In others,
            latent frames come one by one.
        pieces: the number of pieces of latent frames that these come in.
        waiting: latent frames whose features and results wait in host memory, where tiles wait there.
        untiled: whether only whole frames are tried where nothing waits in host memory.
    """

    request: Request
    pieces: int
    waiting: int
    untiled: bool = False

    @property
    def weights(self) -> int:
        """The bytes of the half's weights."""
        return half_bytes(self.request.config, self.request.part, self.request.dtype)

    def first(self, room: float, host_room: float, park: bool) -> VAEUse | None:
        """Returns the first of a kind within ``room`` bytes on the device and ``host_room`` on the host, or None."""
        found = first_plan(self.request, room, self._grids(park), park) if host_room >= 0 else None
        used = None if found is None else self.use(found)
        return used if used is not None and used.host <= host_room else None

    def smallest(self, host_room: float, park: bool, below: float = math.inf) -> VAEUse | None:
        """Returns the plan of a kind with the lowest peak, if that is below a number of bytes, or None."""
        if host_room < 0 or below <= self.weights:
            return None
        # Tiles that wait in host memory take the less the more they are.
        uses = (self.use(plan_of(grid, 1, park)) for grid in self._grids(park)[-1 if park else 0 :])
        found = [used for used in uses if used.peak < below and used.host <= host_room]
        return min(found, key=lambda used: used.peak, default=None)

    def whole_frames(self) -> Iterator[VAEUse]:
        """Yields the plans without tiles and with nothing in host memory."""
        return (self.use(plan_of((1, 1), frames, False)) for frames in FRAMES)

    def use(self, plan: VAEPlan) -> VAEUse:
        """Returns what a plan takes in this place."""
        planned = PlannedVAE(plan, self.request, None)
        copied = host = 0
        if plan.park:
            # The states of all tiles are together those of the whole frame and of halos: fetched and parked a piece,
            # unless one piece is all there is.
            state = round(planned.redundancy * state_bytes(self.request)) if self.pieces > 1 else 0
            copied = (2 * self.pieces - 1) * state
            host = state + self.waiting * sum(waiting_bytes(self.request))
        return VAEUse(planned, copied, host)

    def _grids(self, park: bool) -> list[tuple[int, int]]:
        """Returns the tiles of a kind, the fewest first."""
        every = grids(self.request)
        if not park:
            return every[: 1 if self.untiled else RESIDENT_GRIDS]
        if self.request.capability is None:
            return []  # a CPU has no other memory
        return [grid for grid in every[1:] or every if math.prod(grid) <= MOST_TILES]
