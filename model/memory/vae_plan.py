"""The plan of the tiles and pieces that the VAE works in, so that it fits in a given memory; its peak, and why.

A plan's peak is not estimated from formulas, which would have to follow every change of the model. The model itself
runs on ``meta`` tensors, which have shapes and no memory, until all layers have the history that they keep, and the
bytes alive are counted, the operators being those that would run on the GPU. What an operator allocates inside itself
is not seen: cuDNN's workspaces (the encoder in float32), oneDNN's on the CPU. Our kernels allocate nothing.

    python -m model.plan --vae --size 2560x1408 --vae-memory 4GB
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import VAEConfig
from model.errors import InputError
from model.machine.counted import Operations, TensorMemory, elsewhere
from model.machine.host import Host
from model.machine.measure import format_bytes
from model.vae.layers import State
from model.vae.model import WanVAE
from model.vae.tiles import Region, VAEPlan
from swifti2v_kernels import pretend_gpu

META = torch.device("meta")
PARTS = ("decode", "encode")
#: Tiles by rows and columns, in the order in which they are tried, and the number of grids that are tried where nothing
#: is parked: more tiles have smaller activations, but together more state, which in the end is all that counts.
GRIDS = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32))
RESIDENT_GRIDS = 5
#: The most frames at once in a layer of the VAE: those of one latent frame.
MOST_FRAMES = 4
#: The number of latent frames after which no layer keeps anything new.
SETTLED = 4


@dataclass(frozen=True)
class Request:
    """A part of the VAE, a size and a GPU that a plan is made for; see :func:`plan_vae`."""

    config: VAEConfig
    part: str
    width: int
    height: int
    dtype: torch.dtype
    capability: int | None
    piece: int
    batch: int

    @property
    def latent_size(self) -> tuple[int, int]:
        """The rows and columns of a latent frame."""
        stride = self.config.spatial_stride
        return self.height // stride, self.width // stride


@dataclass(frozen=True)
class Peak:
    """The predicted bytes on the device: ``total`` at the worst moment, and the shares that are there all the time.

    ``state`` is the frames that layers remember between pieces, ``features`` what the tiles of a chunk read (decode) or
    write (encode), ``result`` what a piece becomes; each without its part in host memory.
    """

    total: int
    weights: int
    state: int
    features: int
    result: int

    @property
    def working(self) -> int:
        """The bytes of the tile at work at the worst moment: activations, and its state if that waits on the host."""
        return self.total - self.weights - self.state - self.features - self.result


@dataclass(frozen=True)
class PlannedVAE:
    """A plan with its request. ``print`` it for an explanation."""

    plan: VAEPlan
    request: Request
    limit: int | None

    @property
    def peak(self) -> Peak:
        """The predicted bytes on the device."""
        return predict(self.request, self.plan)

    @property
    def redundancy(self) -> float:
        """The operations over those of whole frames: the cost of halos."""
        return _flops(self.request, self.plan) / _flops(self.request, VAEPlan())

    def __str__(self) -> str:
        request, plan, peak = self.request, self.plan, self.peak
        tiles = plan.regions(*request.latent_size)
        stride = request.config.spatial_stride
        height, width = (stride * max(len(tile[axis]) for tile in tiles) for axis in range(2))
        grid = f"{min(plan.rows, request.latent_size[0])} x {min(plan.columns, request.latent_size[1])}"
        chunk = "all latent frames" if plan.chunk is None else f"{plan.chunk} latent frame{'s' * (plan.chunk > 1)}"
        lines = [
            f"{request.part} {request.width}x{request.height} in {str(request.dtype).removeprefix('torch.')},"
            f" {request.piece} latent frame{'s' * (request.piece > 1)} handed over at once",
            f"  tiles    {grid} of up to {width}x{height} pixels with true halos,"
            f" {self.redundancy:.2f} times the work of whole frames",
            f"  time     {chunk} through a tile before the next tile, at most {plan.frames}"
            f" frame{'s' * (plan.frames > 1)} in a layer",
        ]
        if plan.park:
            lines.append("  waiting  tiles' states, features and frames are in host memory")
        limit = "" if self.limit is None else f" of {format_bytes(self.limit)}"
        lines.append(f"  peak     {format_bytes(peak.total)}{limit} (predicted by counting tensors)")
        shares = ("weights", "state", "features", "result", "working")
        lines.append(f"           {', '.join(f'{name} {format_bytes(getattr(peak, name))}' for name in shares)}")
        return "\n".join(lines)


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
    batch: int = 1,
    park: bool | None = None,
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
        batch: clips side by side.
        park: True or False: only plans whose waiting tiles are, or are not, in host memory. None: both.

    Raises:
        InputError: an argument does not fit, or no plan fits; the message says what the smallest one needs.
    """
    stride = config.spatial_stride
    if part not in PARTS:
        raise InputError(f"part: expected {' or '.join(PARTS)}, got {part!r}")
    if width < 1 or height < 1 or width % stride or height % stride:
        raise InputError(f"size: width and height must be multiples of {stride}, got {width}x{height}")
    for name, value in (("piece", piece), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1 byte, got {limit}")
    request = Request(config, part, width, height, dtype, capability, piece, batch)
    # On a CPU there is no other memory to park in.
    modes = [mode for mode in ((False,) if capability is None else (False, True)) if park in (None, mode)]
    if not modes:
        raise InputError("park: expected False or None on a CPU, where there is no other memory")
    tried: list[PlannedVAE] = []
    for mode in modes:
        for rows, columns in grids(request) if mode else grids(request)[:RESIDENT_GRIDS]:
            # What is parked is moved once for each chunk, so a chunk is all that is there.
            plan = VAEPlan(rows, columns, 1, None if mode else 1, mode)
            if limit is None:
                return PlannedVAE(replace(plan, frames=MOST_FRAMES), request, None)
            tried.append(PlannedVAE(plan, request, limit))
            peak = tried[-1].peak
            if peak.total > limit:
                if not mode and peak.total - peak.working > limit:
                    break  # no smaller tile has less of what is always there
                continue
            frames = MOST_FRAMES
            while frames > 1 and predict(request, replace(plan, frames=frames)).total > limit:
                frames //= 2
            return PlannedVAE(replace(plan, frames=frames), request, limit)
    smallest = replace(min(tried, key=lambda planned: planned.peak.total), limit=None)
    raise InputError(
        f"limit: {format_bytes(limit or 0)} is too little to {part} {width}x{height}; the smallest plan needs"
        f" {format_bytes(smallest.peak.total)}\n{smallest}"
    )


def grids(request: Request) -> list[tuple[int, int]]:
    """Returns the tiles by rows and columns that are considered: more cuts along the longer side."""
    rows, columns = request.latent_size
    turned = [grid if columns >= rows else grid[::-1] for grid in GRIDS]
    return list(dict.fromkeys((min(r, rows), min(c, columns)) for r, c in turned))


@dataclass(frozen=True)
class _Some(VAEPlan):
    """A plan that runs only some of its tiles."""

    cores: tuple[Region, ...] = ()

    def regions(self, height: int, width: int) -> list[Region]:
        return list(self.cores)


def _some(plan: VAEPlan, cores: Sequence[Region]) -> VAEPlan:
    return _Some(plan.rows, plan.columns, plan.frames, plan.chunk, plan.park, tuple(cores))


class CountedHost(Host):
    """The host memory of a run on ``meta`` tensors, whose tensors do not count."""

    def __init__(self, enabled: bool):
        super().__init__(META, enabled)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with elsewhere() if self.enabled else nullcontext():
            return torch.empty(tuple(shape), dtype=dtype, device=META)

    def fetch(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=META) if self.enabled else x


class _MetaFrames:
    """A source of frames that have a shape and no memory."""

    def __init__(self, *shape: int):
        self.shape = shape

    def crop(self, start: int, stop: int, region: Region, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns a crop of frames, as :class:`model.vae.model.FrameSource` says."""
        shape = (self.shape[0], stop - start, len(region.rows), len(region.columns), self.shape[1])
        return torch.empty(shape, device=device, dtype=dtype)


@functools.cache
def predict(request: Request, plan: VAEPlan) -> Peak:
    """Predicts the bytes on the device while a plan runs; see the top of the file."""
    # One piece is run, long enough for every layer to have its history; the difference of a longer or shorter one is
    # known.
    settled = replace(request, piece=SETTLED)
    vae = meta_vae(request.config, request.dtype)
    weights = vae.weights_of(request.part)

    def run(cores: Sequence[Region]) -> tuple[int, int]:
        """Returns the peak with these tiles alone, and the bytes that are remembered after it."""
        with _gpu(request), TensorMemory(weights) as memory:
            held, state = memory.live, 0
            for _ in _run(vae, settled, _some(plan, cores), CountedHost(plan.park)):
                state = memory.live - held
        return memory.peak, state

    classes = _classes(request, plan)
    if plan.park or plan.tiles == 1:
        # Parked tiles leave nothing on the device: the largest one decides.
        total, state = run(max(classes, key=lambda cores: cores[0].grown(8).pixels)[:1])
    else:
        # Each tile is at work beside the states of all others. A run of one tile and a run of two alike tell what is
        # remembered whichever tiles there are.
        alone = [run(cores[:1]) for cores in classes]
        shared = 2 * alone[0][1] - run(classes[0][:1] * 2)[1]
        states = sum(len(cores) * (state - shared) for cores, (_, state) in zip(classes, alone, strict=True))
        total = max(peak - (state - shared) for peak, state in alone) + states
        state = states + shared
    features, result = _feature_bytes(request, vae), _result_bytes(request)
    if plan.park:
        features, result = 0, 0 if request.part == "decode" else result
    chunks = [min(plan.chunk or r.piece, r.piece) for r in (settled, request)]
    total += (request.piece - settled.piece) * result + (chunks[1] - chunks[0]) * features
    return Peak(total, sum(p.nbytes for p in weights), state, chunks[1] * features, request.piece * result)


@functools.cache
def _flops(request: Request, plan: VAEPlan) -> int:
    """Returns the operations of two latent frames, halos included; a multiply-add is two."""
    vae = meta_vae(request.config, request.dtype)

    def count(cores: Sequence[Region]) -> int:
        with _gpu(request), Operations() as counted:
            for _ in _run(vae, replace(request, piece=2), _some(plan, cores), Host(META, False)):
                pass
        return counted.total

    whole_frames = count([])
    return whole_frames + sum(len(c) * (count(c[:1]) - whole_frames) for c in _classes(request, plan))


def _classes(request: Request, plan: VAEPlan) -> list[list[Region]]:
    """Returns the tiles of a plan in classes of the same sizes, halos included, which do and keep the same."""
    vae = meta_vae(request.config, request.dtype)
    tile = vae.decoder.tile if request.part == "decode" else vae.encoder.tile
    alike: dict[str, list[Region]] = {}
    for core in plan.regions(*request.latent_size):
        sizes = [len(span) for region in tile(core, 1, State({})).regions for span in region]
        alike.setdefault(str(sizes), []).append(core)
    return list(alike.values())


@functools.cache
def meta_vae(config: VAEConfig, dtype: torch.dtype) -> WanVAE:
    """Returns the model without memory, both halves in one dtype."""
    with META:
        vae = WanVAE(config).to_dtypes(encode=dtype, decode=dtype)
    return vae.order_weights()


def device_capability(device: torch.device) -> int | None:
    """Returns a device's compute capability as two digits, as :func:`plan_vae` takes it; None for a CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _gpu(request: Request) -> AbstractContextManager[None]:
    return nullcontext() if request.capability is None else pretend_gpu(request.capability)


def _run(vae: WanVAE, request: Request, plan: VAEPlan, host: Host) -> Iterator[None]:
    """Runs one piece through the model and keeps nothing of the result; yields after every step."""
    rate, batch, rows = request.config.temporal_stride, request.batch, request.latent_size
    if request.part == "decode":
        latents = (torch.empty(batch, request.config.z_dim, request.piece, *rows, device=META) for _ in range(1))
        results = vae.decode_frames(latents, plan, host=host)
    else:
        number = 1 + rate * (request.piece - 1)
        frames = (_MetaFrames(batch, 3, number, request.height, request.width) for _ in range(1))
        results = vae.encode_stream(frames, plan, host=host)
    for result in results:
        del result
        yield


def _feature_bytes(request: Request, vae: WanVAE) -> int:
    """Returns the bytes of one latent frame's features, between the part on whole frames and the tiles."""
    rows, columns = request.latent_size
    channels = vae.decoder.feature_channels if request.part == "decode" else vae.encoder.feature_channels
    return request.batch * rows * columns * channels * request.dtype.itemsize


def _result_bytes(request: Request) -> int:
    """Returns the bytes of what one latent frame becomes: uint8 frames, or latents."""
    rows, columns = request.latent_size
    config = request.config
    if request.part == "decode":
        return request.batch * rows * columns * config.spatial_stride**2 * config.temporal_stride * 3
    return request.batch * rows * columns * config.z_dim * request.dtype.itemsize
