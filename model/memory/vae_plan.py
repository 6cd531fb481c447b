"""The plan of the tiles and pieces that the VAE works in, so that it fits in a given memory; its peak, and why.

A plan's peak is not estimated from formulas, which would have to follow every change of the model. The model itself
runs on ``meta`` tensors, which have shapes and no memory, until all layers have the history that they keep, and the
bytes alive are counted, the operators being those that would run on the GPU. What an operator allocates inside itself
is not seen: cuDNN's workspaces (the encoder in float32), oneDNN's on the CPU. Our kernels allocate nothing.

    python -m model.plan --vae --size 2560x1408 --vae-memory 4GB
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.config import VAEConfig
from model.errors import InputError
from model.machine.counted import TensorMemory, elsewhere
from model.machine.host import Host
from model.machine.measure import format_bytes
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
#: The numbers of frames at once in a layer that are tried: those of one latent frame, and the least.
FRAMES = (4, 1)
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
        request = self.request
        whole, *levels = operations(request.config, request.part)
        read = [0.0] * len(levels)
        for core in self.plan.regions(*request.latent_size):
            for i, regions in enumerate(_levels(request, core)):
                read[i] += sum(region.pixels for region in regions) / len(regions)
        frames = [math.prod(span.size for span in regions[0]) for regions in _levels(request, core)]
        computed = sum(n * pixels / frame for n, pixels, frame in zip(levels, read, frames, strict=True))
        return (whole + computed) / (whole + sum(levels))

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
    every = grids(request)
    kinds = [(mode, every if mode else every[:RESIDENT_GRIDS]) for mode in modes]
    for mode, tiles in kinds:
        found = first_plan(request, math.inf if limit is None else limit, tiles, mode)
        if found is not None:
            return PlannedVAE(found, request, limit)
    # Parked tiles take the less the more they are; of others the least is not known beforehand.
    least = [plan_of(grid, 1, mode) for mode, tiles in kinds for grid in (tiles[-1:] if mode else tiles)]
    smallest = min((PlannedVAE(plan, request, None) for plan in least), key=lambda planned: planned.peak.total)
    raise InputError(
        f"limit: {format_bytes(limit or 0)} is too little to {part} {width}x{height}; the smallest plan needs"
        f" {format_bytes(smallest.peak.total)}\n{smallest}"
    )


def plan_of(grid: tuple[int, int], frames: int, park: bool) -> VAEPlan:
    """Returns the plan of a kind; what is parked is moved once for each chunk, so a chunk is then all that is there."""
    return VAEPlan(*grid, frames, None if park else 1, park)


def first_plan(request: Request, room: float, tiles: Sequence[tuple[int, int]], park: bool) -> VAEPlan | None:
    """Returns the first plan of a kind that fits ``room`` bytes on the device, or None.

    Each plan that is looked at has to be run (:func:`predict`), so few are: the first and, where tiles wait in host
    memory and so take the less the more they are, the last and by halves those between.

    Args:
        request: what is planned for.
        room: bytes on the device.
        tiles: the grids that are considered, the fewest tiles first.
        park: whether waiting tiles are in host memory.
    """

    def fits(grid: tuple[int, int], frames: int) -> bool:
        return predict(request, plan_of(grid, frames, park)).total <= room

    most, least = FRAMES
    if not tiles or half_bytes(request.config, request.part, request.dtype) > room:
        return None
    if park and room < math.inf:
        if fits(tiles[-1], most):  # single frames take less, and longer to run: few grids are asked with them
            index = bisect_left(tiles, True, key=lambda grid: fits(grid, most))
            while index > 0 and fits(tiles[index - 1], least):
                index -= 1
        elif fits(tiles[-1], least):
            index = bisect_left(tiles, True, key=lambda grid: fits(grid, least))
        else:
            return None
        tiles = tiles[index:]
    for grid in tiles:
        plan = plan_of(grid, most, park)
        if room == math.inf or (peak := predict(request, plan)).total <= room:
            return plan
        if not park and peak.total - peak.working > room:
            return None  # no smaller tile has less of what is always there
        if fits(grid, least):
            return plan_of(grid, least, park)
    return None


def grids(request: Request) -> list[tuple[int, int]]:
    """Returns the tiles by rows and columns that are considered: more cuts along the longer side."""
    rows, columns = request.latent_size
    turned = [grid if columns >= rows else grid[::-1] for grid in GRIDS]
    return list(dict.fromkeys((min(r, rows), min(c, columns)) for r, c in turned))


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
    weights = half_bytes(request.config, request.part, request.dtype)

    def run(cores: Sequence[Region], frames: int = plan.frames) -> tuple[int, int]:
        return _dry_run(replace(request, piece=1), replace(plan, frames=frames), tuple(cores))

    classes = _classes(request, plan)
    if plan.park or plan.tiles == 1:
        # Parked tiles leave nothing on the device: the largest one decides.
        total, state = run(max(classes, key=lambda cores: cores[0].grown(8).pixels)[:1])
    else:
        # Each tile is at work beside the states of all others, and a run of two alike tells what is shared.
        alone = [run(cores[:1]) for cores in classes]
        one, two = (run(classes[0][:1] * n, FRAMES[0])[1] for n in (1, 2))
        shared = 2 * one - two
        states = sum(len(cores) * (state - shared) for cores, (_, state) in zip(classes, alone, strict=True))
        total = max(peak - (state - shared) for peak, state in alone) + states
        state = states + shared
    features, result = waiting_bytes(request)
    if plan.park:
        features, result = 0, 0 if request.part == "decode" else result
    # The run is of one piece; the difference of a longer or shorter one is known.
    ran = 1 if _lean(request, plan) else SETTLED
    chunks = [min(plan.chunk or piece, piece) for piece in (ran, request.piece)]
    total += (request.piece - ran) * result + (chunks[1] - chunks[0]) * features
    return Peak(total, weights, state, chunks[1] * features, request.piece * result)


def _convolutions(config: VAEConfig, part: str) -> Iterator[tuple[int, nn.Module, int, float]]:
    """Yields a half's convolutions with their level (0: on whole frames), the pixels of their results for each pixel of
    a latent frame, and the frames. An upsampling is folded into the convolution after it: 16 of 36 operations.
    """
    vae = meta_vae(config, torch.bfloat16)

    def each(
        level: int, pixels: int, frames: float, *modules: nn.Module
    ) -> Iterator[tuple[int, nn.Module, int, float]]:
        for conv in (m for module in modules for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))):
            yield level, conv, pixels, frames

    if part == "decode":
        half, pixels, frames = vae.decoder, 1, 1
        yield from each(0, 1, 1, vae.post_quant_conv, half.conv_in, half.mid_block, half.up_blocks[0].resnets)
        for level, (before, stage) in enumerate(itertools.pairwise(half.up_blocks), 1):
            if before.up.time_conv is not None:
                yield from each(level, pixels, frames, before.up.time_conv)
                frames *= 2
            pixels *= 4
            yield from each(level, pixels, frames * 16 / 36, before.up.resample)
            yield from each(level, pixels, frames, stage.resnets)
        yield from each(level, pixels, frames, half.conv_out)
        return
    half, stages, frames = vae.encoder, vae.encoder.stages, config.temporal_stride
    pixels = 4 ** (len(stages) - 1)
    yield from each(1, pixels, frames, half.conv_in)
    for level, stage in enumerate(stages[:-1], 1):
        yield from each(level, pixels, frames, *stage.resnets)
        pixels //= 4
        yield from each(level, pixels, frames, stage.down.resample)
        if stage.down.time_conv is not None:
            frames //= 2
            yield from each(level, pixels, frames, stage.down.time_conv)
    yield from each(0, 1, 1, vae.quant_conv, half.conv_out, half.mid_block, *stages[-1].resnets)


@functools.cache
def operations(config: VAEConfig, part: str) -> tuple[int, ...]:
    """Returns the operations of convolutions for a pixel of a latent frame, a multiply-add being two.

    The first number is of what works on whole frames, the others level by level of what works tile by tile. The clip's
    first latent frame has fewer.
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
    return kept * request.batch * math.prod(request.latent_size) * request.dtype.itemsize


def _levels(request: Request, core: Region) -> list[tuple[Region, Region]]:
    """Returns the largest and the smallest region that a tile works on at each level."""
    vae = meta_vae(request.config, request.dtype)
    if request.part == "decode":
        return [(level.middle, level.result) for level in vae.decoder.tile(core, 1, State({})).levels]
    return [(level.read, level.middle) for level in vae.encoder.tile(core, 1, State({})).levels]


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
    with META, torch.no_grad():
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


@functools.cache
def _dry_run(request: Request, plan: VAEPlan, cores: tuple[Region, ...]) -> tuple[int, int]:
    """Runs some tiles on tensors without memory until every layer has its history.

    Returns:
        The peak in bytes, and the bytes that are remembered after it.
    """
    vae, lean = meta_vae(request.config, request.dtype), _lean(request, plan)
    settle = replace(plan, frames=FRAMES[0]) if lean else plan
    with torch.no_grad(), _gpu(request), TensorMemory(vae.weights_of(request.part)) as memory:
        held = memory.live
        kind, half = (_Decoding, vae.decoder) if request.part == "decode" else (_Encoding, vae.encoder)
        stream = kind(vae, half, settle, CountedHost(plan.park), torch.uint8)
        stream.size = request.latent_size
        stream.tiles = [half.tile(core, settle.frames, State(stream.weights)) for core in cores]
        _feed(stream, request, 1 if lean else SETTLED)
        if lean:
            # The first latent frame is one frame, and weights are brought into their form then.
            first = memory.peak
            _feed(stream, request, SETTLED - 2)
            stream.plan, stream.tiles = plan, [replace(tile, frames=1) for tile in stream.tiles]
            memory.peak = max(first, memory.live)
            _feed(stream, request, 1)
        return memory.peak, memory.live - held


def _lean(request: Request, plan: VAEPlan) -> bool:
    """Returns whether the peak is that of the last latent frame, before which more are run at once, as is quicker.

    An encoder whose tiles wait in host memory works on the clip in one piece, and what it remembers is never fetched.
    """
    return plan.frames == 1 and not (plan.park and request.part == "encode")


def _feed(stream: _Decoding | _Encoding, request: Request, count: int) -> None:
    """Runs the next latent frames, so many, and keeps nothing of the result."""
    rate, batch = request.config.temporal_stride, request.batch
    if isinstance(stream, _Decoding):
        latents = torch.empty(batch, request.config.z_dim, SETTLED, *stream.size, device=META)
        stream.run(latents[:, :, :count], False)
        return
    frames = rate * count - (rate - 1 if stream.done == 0 else 0)
    stream.run(_MetaFrames(batch, 3, frames, request.height, request.width), False)


def waiting_bytes(request: Request) -> tuple[int, int]:
    """Returns the bytes of one latent frame's features, between whole frames and tiles, and of what it becomes.

    That is uint8 frames, or latents.
    """
    config, vae = request.config, meta_vae(request.config, request.dtype)
    pixels = request.batch * math.prod(request.latent_size)
    if request.part == "decode":
        result = pixels * config.spatial_stride**2 * config.temporal_stride * 3
        return pixels * vae.decoder.feature_channels * request.dtype.itemsize, result
    return tuple(pixels * n * request.dtype.itemsize for n in (vae.encoder.feature_channels, config.z_dim))


@functools.cache
def half_bytes(config: VAEConfig, half: str, dtype: torch.dtype) -> int:
    """Returns the bytes of the weights of one half of a VAE."""
    return sum(p.nbytes for p in meta_vae(config, dtype).weights_of(half))
