"""The choice of tiles for one half of the VAE in one place of the pipeline: candidates in the order of their predicted
seconds, and the first that fits.

Within a kind (what waits is on the device, or in host memory) more tiles have more halo and so take longer; what waits
in host memory is copied there and back for every piece. The order does not depend on what there is room for, so more
room never makes a choice slower, nor its peak smaller.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from model.memory.cost import vae as vae_cost
from model.memory.cost.gpus import GPU
from model.memory.cost.profiles import get_profile, seconds
from model.memory.cost.work import Work
from model.memory.vae_plan import MOST_FRAMES, Peak, PlannedVAE, Request, grids, meta_vae, predict
from model.vae.tiles import VAEPlan

#: Grids of tiles that are tried where what waits is on the device. More tiles have more state than less activations.
RESIDENT_GRIDS = 3
#: The most tiles where what waits is in host memory: at 2K, more have less than a tenth less activations.
MOST_TILES = 64
#: Frames at once in a layer that are tried: the fewer, the less activations.
FRAMES = (MOST_FRAMES, 1)
#: Where the halves' code is described.
PROFILE = "swifti2v"


@dataclass(frozen=True)
class VAEUse:
    """A plan in its place.

    ``order`` is its rank among those of its kind; ``work_seconds`` are those of the layers, of which tiles' ``halos``
    are so large a share of what whole frames take, and ``copy_seconds`` those of what goes to host memory and back;
    ``host`` are the bytes that lie there, 0 where nothing waits there.
    """

    planned: PlannedVAE
    order: int
    work_seconds: float
    halos: float
    copy_seconds: float
    host: int

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return self.planned.peak.total

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.work_seconds + self.copy_seconds

    @property
    def limit(self) -> str:
        """What the seconds are made of."""
        if self.park:
            return f"compute; {self.copy_seconds:.1f} s of {self.seconds:.1f} s are copies of waiting tiles"
        return f"compute; tiles' halos are {self.halos:.0%} more of it" if self.halos else "compute"

    @property
    def park(self) -> bool:
        """Whether what waits is in host memory."""
        return self.planned.plan.park


@dataclass(frozen=True)
class VAEPlace:
    """One half of the VAE in one place of the pipeline.

    Args:
        request: its half, size and dtype; ``piece`` as it is with tiles that wait in host memory. Without them latent
            frames come one by one.
        frames: frames of pixels in all.
        pieces: how many pieces of ``request.piece`` latent frames they come in.
        untiled: whole frames where what waits is on the device.
        gpu: whose seconds are predicted.
        more: work of the same dtype beside it.
    """

    request: Request
    frames: int
    pieces: int
    waiting: int
    gpu: GPU
    untiled: bool = False
    more: Work | None = None

    @property
    def weights(self) -> int:
        """Bytes of the half's weights."""
        return sum(p.nbytes for p in meta_vae(self.request.config, self.request.dtype).weights_of(self.request.part))

    def planned(self, plan: VAEPlan) -> PlannedVAE:
        """The plan with its request."""
        return PlannedVAE(plan, self.request, None)

    def first(self, room: float, host_room: float, park: bool) -> VAEUse | None:
        """The fastest of a kind within ``room`` bytes on the device and ``host_room`` in host memory, or None."""
        if park and self.pieces > 1 and host_room < self.whole.state:
            return None
        for order, plan in enumerate(self._candidates(park, room)):
            if self.planned(plan).peak.total <= room:
                used = self.use(plan, order)
                if used.host <= host_room:
                    return used
        return None

    def smallest(self, host_room: float, kinds: tuple[bool, ...], below: float = math.inf) -> VAEUse | None:
        """The one of these kinds with the lowest peak, if that is below a number of bytes; or None."""
        best: VAEUse | None = None
        for park in kinds:
            # The fewest frames at once have the least activations.
            lean = (c for c in enumerate(self._candidates(park, below)) if c[1].frames == FRAMES[-1])
            ranked = sorted(lean, key=lambda c: self.planned(c[1]).peak.total)
            uses = (self.use(plan, order) for order, plan in ranked if self.planned(plan).peak.total < below)
            found = next((used for used in uses if used.host <= host_room), None)
            if found is not None:
                best, below = found, found.peak
        return best

    def whole_frames(self) -> list[VAEUse]:
        """Without tiles and with nothing in host memory."""
        return [self.use(VAEPlan(1, 1, frames, 1, False), order) for order, frames in enumerate(FRAMES)]

    def use(self, plan: VAEPlan, order: int = 0) -> VAEUse:
        """What a plan takes here."""
        return _use(self, plan, order)

    def _use(self, plan: VAEPlan, order: int) -> VAEUse:
        planned, request = self.planned(plan), self.request
        size = request.width, request.height
        work = vae_cost.work(request.config, request.part, *size, self.frames, request.dtype.itemsize)
        redundancy = self.redundancy(plan)
        work = redundancy * work if self.more is None else redundancy * work + self.more
        needed = seconds(work, self.gpu, get_profile(PROFILE), request.dtype.itemsize)
        copied = host = 0
        if plan.park:
            # The states of all tiles are together those of the whole frame and of halos: fetched and parked a piece,
            # unless one piece is all there is.
            whole, state = self.whole, round(redundancy * self.whole.state) if self.pieces > 1 else 0
            copied = (2 * self.pieces - 1) * state
            host = state + self.waiting * (whole.features + whole.result)
        return VAEUse(planned, order, needed, redundancy - 1, copied / (1e9 * self.gpu.host), host)

    def redundancy(self, plan: VAEPlan) -> float:
        """Operations over those of whole frames. They depend on the tiles alone."""
        return PlannedVAE(VAEPlan(plan.rows, plan.columns), self.request, None).redundancy if plan.tiles > 1 else 1.0

    @property
    def whole(self) -> Peak:
        """Predicted bytes of whole frames."""
        return predict(self.request, VAEPlan())

    def _candidates(self, park: bool, room: float) -> Iterator[VAEPlan]:
        """Plans of a kind, the fastest first; none that cannot fit ``room`` for what is always there."""
        if park and self.request.capability is None:
            return  # a CPU has no other memory
        every = grids(self.request)
        chosen = every[: 1 if self.untiled else RESIDENT_GRIDS]
        if park:
            chosen = [grid for grid in every[1:] or every if math.prod(grid) <= MOST_TILES]
        least = math.inf
        for rows, columns in chosen:
            plans = [VAEPlan(rows, columns, frames, None if park else 1, park) for frames in FRAMES]
            if not park:
                peak = self.planned(plans[0]).peak
                if peak.total - peak.working > room:
                    return  # more tiles have more state
            yield from plans
            lowest = self.planned(plans[-1]).peak.total
            if park and lowest >= least:
                return  # what works on whole frames is the largest
            least = lowest


@functools.lru_cache(maxsize=1024)
def _use(place: VAEPlace, plan: VAEPlan, order: int) -> VAEUse:
    return place._use(plan, order)
