"""The choice of tiles for one half of the VAE in one place of the pipeline: candidates in the order of their predicted
seconds, and the first that fits.

There are two kinds: tiles that are not at work wait on the device, or in host memory. Within a kind more tiles have
more halo and so take longer; what waits in host memory is copied there and back for every piece. The order does not
depend on what there is room for, so more room never makes a choice slower, nor its peak smaller.
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

#: The number of grids that are tried where tiles wait on the device. With more tiles, state grows faster than
#: activations shrink.
RESIDENT_GRIDS = 3
#: The most tiles where they wait in host memory: at 2K, more save less than a tenth of the activations.
MOST_TILES = 64
#: The numbers of frames at once in a layer that are tried: the fewer, the less activations.
FRAMES = (MOST_FRAMES, 1)
#: The profile that describes the code of both halves.
PROFILE = "swifti2v"


@dataclass(frozen=True)
class VAEUse:
    """A plan of half of the VAE in its place in the pipeline.

    ``order`` is its rank among those of its kind. ``work_seconds`` are those of the layers; the tiles' ``halos`` add
    this share of what whole frames take. ``copy_seconds`` are those of copies to host memory and back, and ``host``
    is the bytes that wait there.
    """

    planned: PlannedVAE
    order: int
    work_seconds: float
    halos: float
    copy_seconds: float
    host: int

    @property
    def peak(self) -> int:
        """The peak bytes on the device."""
        return self.planned.peak.total

    @property
    def seconds(self) -> float:
        """The seconds of work and copies together."""
        return self.work_seconds + self.copy_seconds

    @property
    def limit(self) -> str:
        """A sentence that says what the seconds are made of."""
        if self.park:
            return f"compute; {self.copy_seconds:.1f} s of {self.seconds:.1f} s are copies of waiting tiles"
        return f"compute; tiles' halos are {self.halos:.0%} more of it" if self.halos else "compute"

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
        frames: frames of pixels in all.
        pieces: the number of pieces of latent frames that these come in.
        waiting: latent frames whose features and results wait in host memory, where tiles wait there.
        gpu: the card whose seconds are predicted.
        untiled: whether only whole frames are tried where nothing waits in host memory.
        more: other work of the same dtype in the same place.
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
        """The bytes of the half's weights."""
        return sum(p.nbytes for p in meta_vae(self.request.config, self.request.dtype).weights_of(self.request.part))

    def planned(self, plan: VAEPlan) -> PlannedVAE:
        """Returns the plan together with its request."""
        return PlannedVAE(plan, self.request, None)

    def first(self, room: float, host_room: float, park: bool) -> VAEUse | None:
        """Returns the fastest of a kind within ``room`` bytes on the device and ``host_room`` on the host, or None."""
        if not self._may_fit(room, host_room) or (park and self.pieces > 1 and host_room < self.whole.state):
            return None
        for order, plan in enumerate(self._candidates(park, room)):
            if self.planned(plan).peak.total <= room:
                used = self.use(plan, order)
                if used.host <= host_room:
                    return used
        return None

    def smallest(self, host_room: float, kinds: tuple[bool, ...], below: float = math.inf) -> VAEUse | None:
        """Returns the plan of these kinds with the lowest peak, if that is below a number of bytes, or None."""
        best: VAEUse | None = None
        for park in kinds if self._may_fit(below, host_room) else ():
            # The fewest frames at once have the least activations.
            lean = (c for c in enumerate(self._candidates(park, below)) if c[1].frames == FRAMES[-1])
            ranked = sorted(lean, key=lambda c: self.planned(c[1]).peak.total)
            uses = (self.use(plan, order) for order, plan in ranked if self.planned(plan).peak.total < below)
            found = next((used for used in uses if used.host <= host_room), None)
            if found is not None:
                best, below = found, found.peak
        return best

    def _may_fit(self, room: float, host_room: float) -> bool:
        """Returns False where no tiles help; to look for some takes a minute, since each has to be run."""
        return host_room >= 0 and room >= self.weights

    def whole_frames(self) -> list[VAEUse]:
        """Returns the plans without tiles and with nothing in host memory."""
        return [self.use(VAEPlan(1, 1, frames, 1, False), order) for order, frames in enumerate(FRAMES)]

    def use(self, plan: VAEPlan, order: int = 0) -> VAEUse:
        """Returns what a plan takes in this place."""
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
        """Returns the operations over those of whole frames, which depend on the tiles alone."""
        return PlannedVAE(VAEPlan(plan.rows, plan.columns), self.request, None).redundancy if plan.tiles > 1 else 1.0

    @property
    def whole(self) -> Peak:
        """The predicted bytes of whole frames."""
        return predict(self.request, VAEPlan())

    def _candidates(self, park: bool, room: float) -> Iterator[VAEPlan]:
        """Yields plans of a kind, the fastest first, but none whose permanent tensors alone exceed ``room``."""
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
