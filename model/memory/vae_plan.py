"""The plan of the tiles and pieces that the VAE works in, so that it fits in a given memory; its peak, and why.

A plan's peak is not estimated from formulas, which would have to follow every change of the model. The model itself
runs on ``meta`` tensors, which have shapes and no memory, until all layers have the history that they keep, and the
bytes alive are counted, the operators being those that would run on the GPU. What an operator allocates inside itself
is not seen: cuDNN's workspaces (the encoder in float32), oneDNN's on the CPU. Our kernels allocate nothing.

There are two kinds of plans: tiles that are not at work wait on the device, or in host memory. Within a kind, more
tiles take less while they work, and have more halo. The order in which plans are tried does not depend on what there is
room for, so more room never makes the peak smaller.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from model.config import VAEConfig
from model.errors import InputError
from model.machine.counted import TensorMemory, elsewhere
from model.machine.host import Host
from model.machine.measure import format_bytes
from model.vae.decoder import Decoder
from model.vae.encoder import Encoder
from model.vae.layers import State
from model.vae.model import WanVAE, _Decoding, _Encoding
from model.vae.tiles import Region, VAEPlan
from swifti2v_kernels import pretend_gpu

META = torch.device("meta")
PARTS = ("decode", "encode")
#: Tiles by rows and columns, in the order of their preference, and the number of grids that are tried where nothing is
#: parked: more tiles have smaller activations, but together more state, which in the end is all that counts.
GRIDS = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32))
RESIDENT_GRIDS = 5
#: The same within a clip, and the most tiles that are parked there: at 2K, more save less than a tenth of activations.
CLIP_RESIDENT_GRIDS, CLIP_MOST_TILES = 3, 64
#: The numbers of frames at once in a layer that are tried: those of one latent frame, and the least.
FRAMES = (4, 1)
#: The number of latent frames after which no layer keeps anything new.
SETTLED = 4


@dataclass(frozen=True)
class Request:
    """A part of the VAE, a size and a GPU that a plan is made for; see :func:`plan_vae`.

    In a clip (``model/memory/search.py``) latent frames come in ``pieces``, and where tiles wait in host memory the
    features and results of ``waiting`` latent frames do too. ``untiled``: only whole frames stay on the device.
    """

    config: VAEConfig
    part: str
    width: int
    height: int
    dtype: torch.dtype
    capability: int | None
    piece: int
    pieces: int | None = None
    waiting: int = 0
    untiled: bool = False

    @property
    def latent_size(self) -> tuple[int, int]:
        """The rows and columns of a latent frame."""
        stride = self.config.spatial_stride
        return self.height // stride, self.width // stride

    @property
    def dtype_name(self) -> str:
        """The name of the dtype, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def half(self) -> Encoder | Decoder:
        """The part of the model without memory."""
        vae = meta_vae(self.config, self.dtype)
        return vae.decoder if self.part == "decode" else vae.encoder

    @property
    def weights(self) -> int:
        """The bytes of the part's weights."""
        return half_bytes(self.config, self.part, self.dtype)

    def grids(self, park: bool) -> list[tuple[int, int]]:
        """Returns the tiles of a kind by rows and columns, the fewest first: more cuts along the longer side."""
        rows, columns = self.latent_size
        turned = [grid if columns >= rows else grid[::-1] for grid in GRIDS]
        every = list(dict.fromkeys((min(r, rows), min(c, columns)) for r, c in turned))
        if not park:
            most = RESIDENT_GRIDS if self.pieces is None else CLIP_RESIDENT_GRIDS
            return every[: 1 if self.untiled else most]
        if self.capability is None:
            return []  # a CPU has no other memory
        if self.pieces is None:
            return every
        return [grid for grid in every[1:] or every if math.prod(grid) <= CLIP_MOST_TILES]

    def planned(self, grid: tuple[int, int], frames: int, park: bool) -> PlannedVAE:
        """Returns a plan of a kind; what is parked is moved once a chunk, so a chunk is then all that is there."""
        return _planned(VAEPlan(*grid, frames, None if park else 1, park), self)

    def first(self, room: float, host: float, park: bool) -> PlannedVAE | None:
        """Returns the first plan of a kind within ``room`` bytes on the device, or None if it takes more on the host.

        Each plan that is looked at has to be run (:func:`predict`), so few are: the first and, where tiles wait in host
        memory and so take the less the more they are, the last and by halves those between.
        """

        def fits(grid: tuple[int, int]) -> bool:
            return self.planned(grid, FRAMES[-1], park).peak.total <= room

        tiles = self.grids(park)
        if not tiles or host < 0 or self.weights > room:
            return None
        if park and room < math.inf:
            tiles = tiles[bisect_left(tiles, True, key=fits) :] if fits(tiles[-1]) else []
        for grid, frames in itertools.product(tiles, FRAMES):
            found = self.planned(grid, frames, park)
            if room == math.inf or found.peak.total <= room:
                return found if found.host <= host else None
            if not park and sum(found.peak[1:]) > room:
                break  # no smaller tile has less of what is always there
        return None

    def best(self, room: float, host: float) -> PlannedVAE | None:
        """Returns the first plan of any kind, as :meth:`first`."""
        return self.first(room, host, False) or self.first(room, host, True)

    def smallest(self, host: float, park: bool, below: float = math.inf) -> PlannedVAE | None:
        """Returns the plan of a kind with the lowest peak, if that is below a number of bytes, or None."""
        if host < 0 or below <= self.weights:
            return None
        # Tiles that wait in host memory take the less the more they are; of others the least is not known beforehand.
        plans = (self.planned(grid, 1, park) for grid in self.grids(park)[-1 if park else 0 :])
        found = [planned for planned in plans if planned.peak.total < below and planned.host <= host]
        return min(found, key=lambda planned: planned.peak.total, default=None)


class Peak(NamedTuple):
    """The predicted bytes on the device: ``total`` at the worst moment, and the shares that are there all the time.

    ``state`` is the frames that layers remember between pieces, ``waiting`` what the tiles of a chunk read (decode) or
    write (encode) and what a piece becomes; each without its part in host memory.
    """

    total: int
    weights: int
    state: int
    waiting: int


@dataclass(frozen=True)
class PlannedVAE:
    """A plan with its request. ``print`` it for an explanation."""

    plan: VAEPlan
    request: Request

    @property
    def peak(self) -> Peak:
        """The predicted bytes on the device."""
        return predict(self.request, self.plan)

    @property
    def idle(self) -> dict[str, int]:
        """The bytes that the half holds while it waits, by name."""
        name = f"{self.request.part}r's"
        return {f"{name} weights": self.peak.weights, f"{name} state": self.peak.state}

    @property
    def held(self) -> dict[str, int]:
        """The bytes that the half holds at its worst moment, by name."""
        return self.idle | {f"{self.request.part}r's activations": self.peak.total - sum(self.idle.values())}

    @functools.cached_property
    def redundancy(self) -> float:
        """The operations over those of whole frames: the cost of halos."""
        request = self.request
        whole, *levels = operations(request.config, request.part)
        # The largest and the smallest region that a tile works on at each level.
        ends = ("middle", "result") if request.part == "decode" else ("read", "middle")
        read = [0.0] * len(levels)
        for core in self.plan.regions(*request.latent_size):
            tile = request.half.tile(core, 1, State({})).levels
            for i, level in enumerate(tile):
                read[i] += sum(getattr(level, end).pixels for end in ends) / 2
        frames = [math.prod(span.size for span in getattr(level, ends[0])) for level in tile]
        computed = sum(n * pixels / frame for n, pixels, frame in zip(levels, read, frames, strict=True))
        return (whole + computed) / (whole + sum(levels))

    @functools.cached_property
    def _parked(self) -> int:
        # The states of all tiles are together those of the whole frame and of halos; a single piece leaves none.
        parks = self.plan.park and (self.request.pieces or 1) > 1
        return round(self.redundancy * state_bytes(self.request)) if parks else 0

    @property
    def copied(self) -> int:
        """The bytes of all copies of waiting tiles to host memory and back in a clip: each piece fetches and parks."""
        return (2 * (self.request.pieces or 1) - 1) * self._parked

    @property
    def host(self) -> int:
        """The bytes that wait in host memory in a clip."""
        return self._parked + self.plan.park * self.request.waiting * sum(waiting_bytes(self.request))

    def __str__(self) -> str:
        request, plan, peak = self.request, self.plan, self.peak
        shares = {"weights": peak.weights, "state": peak.state, "waiting": peak.waiting}
        shares["working"] = peak.total - sum(shares.values())
        held = ", ".join(f"{name} {format_bytes(size)}" for name, size in shares.items())
        return (
            f"{request.part} {request.width}x{request.height} in {request.dtype_name},"
            f" {request.piece} latent frame{'s' * (request.piece > 1)} handed over at once\n"
            f"  {plan}{', what waits is in host memory' * plan.park}\n"
            f"  {self.redundancy:.2f} times the work of whole frames, by true halos\n"
            f"  peak {format_bytes(peak.total)}, predicted by counting tensors: {held}"
        )


#: Makes a plan. Equal ones are one object, which computes its redundancy once.
_planned = functools.cache(PlannedVAE)


def plan_vae(
    config: VAEConfig,
    part: str,
    width: int,
    height: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    limit: int | None = None,
    capability: int | None = 90,
    piece: int = 3,
) -> PlannedVAE:
    """Plans the VAE within a limit, likely the fastest way: few tiles, many frames at once, host memory last.

    Args:
        config: the shape of the VAE.
        part: ``decode`` or ``encode``.
        width, height: pixels.
        dtype: the dtype of the part's weights and activations.
        limit: bytes on the device for the VAE alone: its weights, and all that it makes of latents or frames given to
            it. None for no limit.
        capability: compute capability of the GPU as two digits, which decides what computes the layers; None for a CPU,
            where there is no other memory to move to.
        piece: latent frames that are handed over at once: 3 are a segment of SwiftI2V. All of a clip are best where
            they are there: a tile that waits in host memory then waits only once.

    Raises:
        InputError: an argument does not fit, or no plan fits; the message says what the smallest one needs.
    """
    stride = config.spatial_stride
    if part not in PARTS:
        raise InputError(f"part: expected {' or '.join(PARTS)}, got {part!r}")
    if width < 1 or height < 1 or width % stride or height % stride:
        raise InputError(f"size: width and height must be multiples of {stride}, got {width}x{height}")
    if piece < 1:
        raise InputError(f"piece: expected at least 1, got {piece}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1 byte, got {limit}")
    request = Request(config, part, width, height, dtype, capability, piece)
    found = request.best(math.inf if limit is None else limit, math.inf)
    if found is not None:
        return found
    least = [planned for park in (False, True) if (planned := request.smallest(math.inf, park)) is not None]
    smallest = min(least, key=lambda planned: planned.peak.total)
    raise InputError(
        f"limit: {format_bytes(limit or 0)} is too little to {part} {width}x{height}; the smallest plan needs"
        f" {format_bytes(smallest.peak.total)}\n{smallest}"
    )


@functools.cache
def predict(request: Request, plan: VAEPlan) -> Peak:
    """Predicts the bytes on the device while a plan runs; see the top of the file."""
    alone = replace(request, piece=1, pieces=None, waiting=0, untiled=False)  # a run is the same in every clip
    classes = _classes(request, plan)
    if plan.park:
        # Parked tiles leave nothing on the device: the largest one decides.
        classes = [max(classes, key=lambda cores: cores[0].grown(8).pixels)[:1]]
    # Else each tile is at work beside the states of all others.
    runs = [_dry_run(alone, plan, cores[0]) for cores in classes]
    states = sum(len(cores) * state for cores, (_, state, _) in zip(classes, runs, strict=True))
    total = max(peak - state for peak, state, _ in runs) + states
    state = states + runs[0][2]
    features, result = waiting_bytes(request)
    if plan.park:
        features, result = 0, 0 if request.part == "decode" else result
    # The run is of one piece; the difference of a longer or shorter one is known.
    ran = 1 if _lean(request, plan) else SETTLED
    waiting = [min(plan.chunk or piece, piece) * features + piece * result for piece in (request.piece, ran)]
    return Peak(total + waiting[0] - waiting[1], request.weights, state, waiting[0])


def _convolutions(config: VAEConfig, part: str) -> list[tuple[int, nn.Module, float, int]]:
    """Returns a half's convolutions with their level (0: on whole frames), the pixels of their results for each pixel
    of a latent frame, and the frames, from the latents' size to the pixels. An upsampling is folded into the
    convolution after it: 16 of 36 operations.
    """
    vae, found, pixels, frames = meta_vae(config, torch.bfloat16), [], 1, 1

    def add(level: int, pixels: float, *modules: nn.Module) -> None:
        every = (m for module in modules for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
        found.extend((level, conv, pixels, frames) for conv in every)

    if part == "decode":
        half, scaled = vae.decoder, 4 * 16 / 36
        steps, whole = list(enumerate(half.steps, 1)), (vae.post_quant_conv, half.conv_in, half.up_blocks[0].resnets)
    else:
        half, scaled = vae.encoder, 1
        steps = [(level, (down, resnets)) for level, (resnets, down) in enumerate(half.steps, 1)][::-1]
        whole = vae.quant_conv, half.conv_out, half.stages[-1].resnets
    add(0, 1, half.mid_block, *whole)
    for level, (scaling, resnets) in steps:
        if scaling.time_conv is not None:
            add(level, pixels, scaling.time_conv)
            frames *= 2
        add(level, pixels * scaled, scaling.resample)
        pixels *= 4
        add(level, pixels, resnets)
    add(level, pixels, half.conv_out if part == "decode" else half.conv_in)
    return found


@functools.cache
def operations(config: VAEConfig, part: str) -> tuple[int, ...]:
    """Returns the operations of convolutions for a pixel of a latent frame but the clip's first, a multiply-add being
    two: of what works on whole frames, and then level by level of what works tile by tile.
    """
    found: dict[int, float] = defaultdict(float)
    for level, conv, pixels, frames in _convolutions(config, part):
        found[level] += 2 * conv.weight.numel() * pixels * frames
    return tuple(round(found[level]) for level in sorted(found))


def state_bytes(request: Request) -> int:
    """Returns the bytes that all layers remember of whole frames: the last ones that their taps in time still read."""
    kept = 0
    for _, conv, pixels, _ in _convolutions(request.config, request.part):
        if isinstance(conv, nn.Conv3d):
            kept += (conv.kernel_size[0] - conv.stride[0]) * conv.in_channels * pixels
    return kept * math.prod(request.latent_size) * request.dtype.itemsize


def _classes(request: Request, plan: VAEPlan) -> list[list[Region]]:
    """Returns the tiles of a plan in classes of the same sizes, halos included, which do and keep the same."""
    alike: dict[str, list[Region]] = {}
    for core in plan.regions(*request.latent_size):
        tile = request.half.tile(core, 1, State({}))
        sizes = [len(span) for region in itertools.chain([tile.source], *tile.levels) for span in region]
        alike.setdefault(str(sizes), []).append(core)
    return list(alike.values())


@functools.cache
def meta_vae(config: VAEConfig, dtype: torch.dtype) -> WanVAE:
    """Returns the model without memory, both halves in one dtype."""
    with META, torch.no_grad():
        vae = WanVAE(config).to_dtypes(encode=dtype, decode=dtype)
    return vae.order_weights()


@functools.cache
def _dry_run(request: Request, plan: VAEPlan, core: Region) -> tuple[int, int, int]:
    """Runs a tile without memory until every layer has its history.

    Returns the peak, the bytes that are kept after for the tile, and those that all tiles share.
    """
    vae, lean = meta_vae(request.config, request.dtype), _lean(request, plan)
    settle = replace(plan, frames=FRAMES[0]) if lean else plan
    card = nullcontext() if request.capability is None else pretend_gpu(request.capability)
    with torch.no_grad(), card, TensorMemory(vae.weights_of(request.part)) as memory:
        held = memory.live
        kind = _Decoding if request.part == "decode" else _Encoding
        stream = kind(vae, request.half, settle, Host(META, plan.park), torch.uint8)
        stream.size = request.latent_size
        stream.tiles = [request.half.tile(core, settle.frames, State(stream.weights))]
        _feed(stream, request, 1 if lean else SETTLED)
        if lean:
            # The first latent frame is one frame, and weights are brought into their form then.
            first = memory.peak
            _feed(stream, request, SETTLED - 2)
            stream.plan, stream.tiles = plan, [replace(tile, frames=1) for tile in stream.tiles]
            memory.peak = max(first, memory.live)
            _feed(stream, request, 1)
        shared = sum(x.nbytes for kept in (stream.weights, stream.whole.past) for x in kept.values())
        return memory.peak, memory.live - held - shared, shared


def _lean(request: Request, plan: VAEPlan) -> bool:
    """Returns whether the peak is that of the last latent frame, before which more are run at once, as is quicker."""
    # A parked encoder works on the clip in one piece, and what it remembers is never fetched.
    return plan.frames == 1 and not (plan.park and request.part == "encode")


def _feed(stream: _Decoding | _Encoding, request: Request, count: int) -> None:
    """Runs the next latent frames, so many, and keeps nothing of the result."""
    if isinstance(stream, _Decoding):
        latents = torch.empty(1, request.config.z_dim, SETTLED, *stream.size, device=META)
        stream.run(latents[:, :, :count], False)
        return
    with elsewhere():
        video = torch.empty(1, 3, stream.shares(count, count)[0][1].stop, request.height, request.width, device=META)
    stream.run(video, False)


def waiting_bytes(request: Request) -> tuple[int, int]:
    """Returns the bytes of one latent frame's features, and of the uint8 frames or latents that it becomes."""
    config, pixels = request.config, math.prod(request.latent_size)
    features = pixels * request.half.feature_channels * request.dtype.itemsize
    if request.part == "decode":
        return features, pixels * config.spatial_stride**2 * config.temporal_stride * 3
    return features, pixels * config.z_dim * request.dtype.itemsize


@functools.cache
def half_bytes(config: VAEConfig, half: str, dtype: torch.dtype) -> int:
    """Returns the bytes of the weights of one half of a VAE."""
    return sum(p.nbytes for p in meta_vae(config, dtype).weights_of(half))
