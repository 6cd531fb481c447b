"""Which tiles and pieces the VAE works in, so that it fits in a given memory: the plan, its peak, and why.

A plan's peak is not estimated from formulas, which would have to follow every change of the model. The model itself
runs on ``meta`` tensors, which have shapes and no memory, until all layers have the history that they keep, and the
bytes alive are counted, the operators being those that would run on the GPU. What an operator allocates inside itself
is not seen: cuDNN's workspaces (the encoder in float32), oneDNN's on the CPU. Our kernels allocate nothing.

    python -m model.vae_plan --size 2560x1408 --limit 4GB
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.config import VAEConfig
from model.errors import InputError
from model.host import Host
from model.measure import format_bytes
from model.tensor_memory import TensorMemory
from model.tiling import Region, VAEPlan
from model.vae import WanVAE
from model.vae_layers import State
from swifti2v_kernels import pretend_gpu

META = torch.device("meta")
PARTS = ("decode", "encode")
#: Tiles by rows and columns, in the order in which they are tried, and how many of them where nothing is parked: more
#: tiles have smaller activations, but together more state, which then is all that counts.
GRIDS = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32))
RESIDENT_GRIDS = 5
#: Latent frames after which no layer keeps anything new.
SETTLED = 4


@dataclass(frozen=True)
class Request:
    """What a plan is for; see :func:`plan_vae`."""

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
        """Rows and columns of a latent frame."""
        stride = self.config.spatial_stride
        return self.height // stride, self.width // stride


@dataclass(frozen=True)
class Peak:
    """Predicted bytes on the device: ``total`` at the worst moment, and what of it is there all the time.

    ``state`` are frames that layers remember between pieces, ``features`` what the tiles of a chunk read (decode) or
    write (encode), ``result`` what a piece becomes; of each, what is not in host memory.
    """

    total: int
    weights: int
    state: int
    features: int
    result: int

    @property
    def working(self) -> int:
        """What the tile at work holds at the worst moment: activations, and its state if that waits in host memory."""
        return self.total - self.weights - self.state - self.features - self.result


@dataclass(frozen=True)
class PlannedVAE:
    """A plan and what it is for. ``print`` it for an explanation."""

    plan: VAEPlan
    request: Request
    limit: int | None

    @property
    def peak(self) -> Peak:
        """Predicted bytes on the device."""
        return predict(self.request, self.plan)

    @property
    def redundancy(self) -> float:
        """Operations over those of whole frames: what halos cost."""
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
    """The plan within a limit that is likely to be the fastest: few tiles, many frames at once, host memory last.

    Args:
        config: of the VAE.
        part: ``decode`` or ``encode``.
        width, height: pixels.
        dtype: of the part's weights and activations.
        limit: bytes on the device for the VAE alone: its weights, and all that it makes of latents or frames given to
            it. None for no limit.
        capability: compute capability of the GPU as two digits, which decides what computes the layers; None for a CPU,
            where there is no other memory to move to.
        piece: latent frames that are handed over at once: 3 are a segment of SwiftI2V. All of a clip are best where
            they are there: a tile that waits in host memory then waits only once.
        batch: clips side by side.
        park: True or False: only plans that keep, or do not keep, in host memory what waits. None: both.

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
    allowed = [plan for plan in candidates(request) if park in (None, plan.park)]
    if not allowed:
        raise InputError("park: expected False or None on a CPU, where there is no other memory")
    too_much = False
    for plan in allowed:
        planned = PlannedVAE(plan, request, limit)
        if limit is None or (not (too_much and not plan.park) and planned.peak.total <= limit):
            return planned
        if not plan.park and not too_much:
            # No smaller tile and no shorter step has less of what is always there.
            too_much = planned.peak.total - planned.peak.working > limit
    single = (PlannedVAE(plan, request, None) for plan in allowed if plan.frames == 1)
    smallest = min(single, key=lambda planned: planned.peak.total)
    raise InputError(
        f"limit: {format_bytes(limit or 0)} is too little to {part} {width}x{height}; the smallest plan needs"
        f" {format_bytes(smallest.peak.total)}\n{smallest}"
    )


def candidates(request: Request) -> Iterator[VAEPlan]:
    """All plans that are considered, the fastest first."""
    rows, columns = request.latent_size
    # Landscape or portrait: more cuts along the longer side.
    turned = [grid if columns >= rows else grid[::-1] for grid in GRIDS]
    grids = list(dict.fromkeys((min(r, rows), min(c, columns)) for r, c in turned))
    # On a CPU there is no other memory to park in.
    for park in (False,) if request.capability is None else (False, True):
        for r, c in grids if park else grids[:RESIDENT_GRIDS]:
            for frames in (4, 2, 1):
                # What is parked is moved once for each chunk, so a chunk is all that is there.
                yield VAEPlan(r, c, frames, None if park else 1, park)


@dataclass(frozen=True)
class _Some(VAEPlan):
    """A plan of which only some tiles are run."""

    cores: tuple[Region, ...] = ()

    def regions(self, height: int, width: int) -> list[Region]:
        return list(self.cores)


def _some(plan: VAEPlan, cores: Sequence[Region]) -> VAEPlan:
    return _Some(plan.rows, plan.columns, plan.frames, plan.chunk, plan.park, tuple(cores))


class _CountedHost(Host):
    """Host memory of a run on ``meta`` tensors: what is there does not count."""

    def __init__(self, memory: TensorMemory, enabled: bool):
        super().__init__(META, enabled)
        self.memory = memory

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self.memory.paused() if self.enabled else nullcontext():
            return torch.empty(tuple(shape), dtype=dtype, device=META)

    def fetch(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=META) if self.enabled else x


class _MetaFrames:
    """Frames of a shape."""

    def __init__(self, *shape: int):
        self.shape = shape

    def crop(self, start: int, stop: int, region: Region, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As :class:`model.vae.FrameSource` says."""
        shape = (self.shape[0], stop - start, len(region.rows), len(region.columns), self.shape[1])
        return torch.empty(shape, device=device, dtype=dtype)


@functools.cache
def predict(request: Request, plan: VAEPlan) -> Peak:
    """Predicted bytes on the device while a plan runs; see the top of the file."""
    # A longer piece repeats what its first latent frames do; what grows with it is added.
    settled = replace(request, piece=min(request.piece, SETTLED))
    vae, weights = _meta_vae(request)
    if plan.park:
        # Tiles leave nothing behind: the largest one decides.
        plan = _some(plan, [max(plan.regions(*request.latent_size), key=lambda core: core.grown(8).pixels)])
    with _gpu(request), TensorMemory(weights) as memory:
        held, state = memory.live, 0
        for _ in _run(vae, settled, plan, _CountedHost(memory, plan.park)):
            state = memory.live - held
    features, result = (0 if plan.park else n for n in (_feature_bytes(request, vae), _result_bytes(request)))
    if request.part == "encode":
        result = _result_bytes(request)
    chunks = [min(plan.chunk or r.piece, r.piece) for r in (settled, request)]
    grown = (request.piece - settled.piece) * result + (chunks[1] - chunks[0]) * features
    return Peak(memory.peak + grown, held, state, chunks[1] * features, request.piece * result)


@functools.cache
def _flops(request: Request, plan: VAEPlan) -> int:
    """Operations of two latent frames, halos included; a multiply-add is two."""
    vae, _ = _meta_vae(request)
    tile = vae.decoder.tile if request.part == "decode" else vae.encoder.tile
    # Tiles of the same sizes do the same work.
    alike: dict[str, list[Region]] = {}
    for core in plan.regions(*request.latent_size):
        sizes = [len(span) for region in tile(core, 1, State({})).regions for span in region]
        alike.setdefault(str(sizes), []).append(core)

    def count(cores: list[Region]) -> int:
        with _gpu(request), FlopCounterMode(display=False) as counter:
            for _ in _run(vae, replace(request, piece=2), _some(plan, cores), Host(META, False), pieces=1):
                pass
        return counter.get_total_flops()

    whole_frames = count([])
    return whole_frames + sum(len(cores) * (count(cores[:1]) - whole_frames) for cores in alike.values())


def _meta_vae(request: Request) -> tuple[WanVAE, list[Tensor]]:
    """The model without memory, and the weights of the part that is planned."""
    with META:
        vae = WanVAE(request.config).to_dtypes(encode=request.dtype, decode=request.dtype)
    decoding = request.part == "decode"
    half = (vae.decoder, vae.post_quant_conv) if decoding else (vae.encoder, vae.quant_conv)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for module in half:
        for p in module.parameters():
            p.data = p.data.contiguous(memory_format=formats.get(p.ndim, torch.contiguous_format))
    return vae, [p for module in half for p in module.parameters()]


def _gpu(request: Request) -> AbstractContextManager[None]:
    return nullcontext() if request.capability is None else pretend_gpu(request.capability)


def _run(vae: WanVAE, request: Request, plan: VAEPlan, host: Host, pieces: int | None = None) -> Iterator[None]:
    """Pieces of a clip through the model, until its layers are settled; nothing is kept of the results."""
    if pieces is None:
        pieces = -(-SETTLED // request.piece) + 1
    rate, batch, rows = request.config.temporal_stride, request.batch, request.latent_size
    if request.part == "decode":
        latents = (torch.empty(batch, request.config.z_dim, request.piece, *rows, device=META) for _ in range(pieces))
        results = vae.decode_frames(latents, plan, host=host)
    else:
        sizes = [rate * request.piece - (rate - 1 if i == 0 else 0) for i in range(pieces)]
        frames = [_MetaFrames(batch, 3, size, request.height, request.width) for size in sizes]
        results = vae.encode_stream(iter(frames), plan, host=host)
    for result in results:
        del result
        yield


def _feature_bytes(request: Request, vae: WanVAE) -> int:
    """Of one latent frame, between the part that works on whole frames and the tiles."""
    rows, columns = request.latent_size
    channels = vae.decoder.feature_channels if request.part == "decode" else vae.encoder.feature_channels
    return request.batch * rows * columns * channels * request.dtype.itemsize


def _result_bytes(request: Request) -> int:
    """Of what one latent frame becomes: uint8 frames, or latents."""
    rows, columns = request.latent_size
    config = request.config
    if request.part == "decode":
        return request.batch * rows * columns * config.spatial_stride**2 * config.temporal_stride * 3
    return request.batch * rows * columns * config.z_dim * request.dtype.itemsize
