"""The two stages of SwiftI2V, each a function, and the functions that join them.

    image -> encode -> Stage I (360P, few steps) -> z_low                           motion_condition, make_motion
    z_low -> decode -> upsample -> frame 0 := image -> encode -> z_ref              make_reference
    z_ref -> Stage II, segment by segment                                           model.csg.sampler.sample_latents
    anchor and segments -> decode -> frames, as soon as each segment is done        decode_frames

Everything is streamed in time: no full-size clip of pixels is ever held. Where a full-size frame of features is too
much for the memory, a plan of ``model/memory/vae_plan.py`` cuts it into tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DiTConfig
from model.csg.denoiser import Denoiser
from model.dit.model import WanDiT
from model.machine.finite import Finite
from model.machine.host import Host, release
from model.vae.model import WHOLE, Frames, WanVAE
from model.vae.tiles import Region, VAEPlan
from swifti2v_kernels import block_noise

#: The number that makes Stage I's noise differ from Stage II's, which is drawn from the same seed.
STAGE = 1
#: The noise level below which Wan2.2 A14B's second expert takes the steps.
BOUNDARY = 0.9


def motion_condition(vae: WanVAE, config: DiTConfig, picture: Tensor, num_blocks: int, plan: VAEPlan = WHOLE) -> Tensor:
    """Returns the latents ``[1, z, num_blocks, h, w]``, float32, that Stage I is conditioned on.

    A DiT with ``2z + 4`` input channels is conditioned as Wan I2V: mask and the encoded clip ``[picture, grey, ...]``
    on the channel axis. One with ``z`` channels is conditioned as TI2V-5B: block 0 is the picture's latent at timestep
    0. VAE and configuration are Stage I's, and ``picture`` is the input image at its size, ``[1, 3, 1, H, W]`` in
    -1..1.
    """
    if config.in_channels == vae.config.z_dim:
        return vae.encode(picture, plan).float().expand(-1, -1, num_blocks, -1, -1)
    grey = picture.new_zeros(1, 3, vae.config.temporal_stride, *picture.shape[3:])
    clip = chain([picture], [grey] * (num_blocks - 1))
    return torch.cat(list(vae.encode_stream(clip, plan)), dim=2).float()


def make_motion(
    dits: Sequence[Callable[[], WanDiT]],
    condition: Tensor,
    text: Tensor,
    image: Tensor | None = None,
    *,
    sigmas: Sequence[float],
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
    cuda_graph: bool = True,
) -> Tensor:
    """Runs Stage I: the motion reference at low resolution, ``[1, z, num_blocks, h, w]`` float32, in one window.

    Args:
        dits: make the Stage I model, or Wan2.2 A14B's experts for high and for low noise. Each is made for its steps
            and released when they are done.
        condition: as returned by :func:`motion_condition`.
        text, image, cuda_graph: as for :func:`model.csg.sampler.sample_latents`.
        sigmas: noise levels from 1 to 0 (:func:`model.csg.schedule.flow_sigmas`).
        seed: seed of the noise, which is drawn per block.
        on_step: called after every step with step and number of steps, from 1.

    Raises:
        NotFiniteError: the result is NaN or infinite; the message names the step.
    """
    z, num_blocks = condition.shape[1:3]
    x = block_noise(seed, STAGE, range(num_blocks), (z, *condition.shape[3:])).to(condition)
    steps = range(len(sigmas) - 1)
    # A model by itself takes all steps.
    first_low = sum(sigmas[i] >= BOUNDARY for i in steps) if len(dits) > 1 else len(steps)
    finite, masked = Finite("Stage I"), True
    for load, own_steps in zip(dits, (steps[:first_low], steps[first_low:]), strict=False):
        if not own_steps:
            continue
        model = load()
        options = {"sigmas": sigmas, "max_blocks": num_blocks, "cuda_graph": cuda_graph}
        denoiser = Denoiser(model, text, image, latents=x, reference=condition, **options)
        slots = list(range(num_blocks))
        masked = model.config.in_channels != z
        if not masked:
            denoiser.open(slots, [-1, *slots[1:]], [0.0] * num_blocks)
        else:
            denoiser.open(slots, slots, [1.0] + [0.0] * (num_blocks - 1))
        for step in own_steps:
            denoiser.step(step)
            finite.note(x, f"at step {step + 1} of {len(steps)}")
            if on_step is not None:
                on_step(step + 1, len(steps))
        finite.check()
        model.settle()
        del model, denoiser
        release(x.device)
    if not masked:
        x[:, :, 0] = condition[:, :, 0]
    return x


def interpolation_matrix(size: int, target: int, device: torch.device) -> Tensor:
    """Returns the matrix ``[target, size]`` of bicubic interpolation on an axis: half-pixel centres, edges repeated.

    It is torch's own interpolation of the unit matrix, so that any crop of the frame has the pixels of the whole.
    """
    # The unit matrix is an image of which only the number of rows changes, so no column is interpolated.
    unit = torch.eye(size, dtype=torch.float32, device="cpu").view(1, 1, size, size)
    return F.interpolate(unit, (target, size), mode="bicubic", align_corners=False)[0, 0].to(device)


class UpsampledFrames(Frames):
    """Low-resolution frames that are upsampled where and when they are read, and never exist as a whole.

    Bicubic interpolation is linear in the frame and separable: a crop of the upsampled frame is ``R[rows] @ frame @
    C[columns].T``, where ``R`` and ``C`` interpolate rows and columns (:func:`interpolation_matrix`).

    Args:
        low: ``[B, 3, F, h, w]`` in -1..1, on any device.
        rows, columns: matrices ``[H, h]`` and ``[W, w]`` of :func:`interpolation_matrix`, on the device that reads.
        first: the clip's first frame at the new size, ``[B, 3, 1, H, W]``, which replaces frame 0; or None.
        on_crop: called with the number of frames whenever a tile's frames were read.
    """

    def __init__(
        self, low: Tensor, rows: Tensor, columns: Tensor, first: Tensor | None, on_crop: Callable[[int], None]
    ):
        super().__init__(low)
        self.rows, self.columns, self.first, self.on_crop = rows, columns, first, on_crop
        self.shape = (*low.shape[:3], rows.shape[0], columns.shape[0])

    def crop(self, start: int, stop: int, region: Region, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns frames ``start .. stop - 1`` over ``region``, ``[B, F, h, w, 3]``, clamped to -1..1."""
        shape = (self.shape[0], stop - start, len(region.rows), len(region.columns), 3)
        out = torch.empty(shape, device=device, dtype=dtype)
        y, x = region.slices
        down, across = self.rows[y], self.columns[x].T
        for i in range(stop - start):
            if start + i == 0 and self.first is not None:
                frame = self.first[:, :, 0, y, x]
            else:
                low = self.video[:, :, start + i].to(device, torch.float32)
                frame = (down @ low @ across).clamp_(-1, 1)  # [B, 3, h, w]
            out[:, i].copy_(frame.permute(0, 2, 3, 1))
        self.on_crop(stop - start)
        return out


def make_reference(
    motion: Tensor,
    motion_vae: WanVAE,
    vae: WanVAE,
    picture: Tensor,
    on_block: Callable[[int, int], None] | None = None,
    *,
    plan: VAEPlan = WHOLE,
    motion_plan: VAEPlan = WHOLE,
) -> Tensor:
    """Makes the hybrid reference: decodes the motion, upsamples it, puts the image first, and encodes it again.

    All of it is one stream: each latent frame of the motion is decoded when its pixels are to be encoded, and these are
    upsampled tile by tile as they are read, so that there is never a whole frame at the target size on the device, let
    alone a clip. With a plan that parks (:class:`model.vae.tiles.VAEPlan`) every tile runs through the clip by itself;
    then the whole motion is decoded first, at its own size, and kept in host memory.

    Args:
        motion, motion_vae: Stage I's latents ``[1, z_low, T, h, w]`` and VAE, which decodes them as ``motion_plan``.
        vae: Stage II's VAE, of the same temporal stride, which encodes the reference as ``plan``; often the same VAE.
        picture: the input image at the target size, ``[1, 3, 1, H, W]`` in -1..1.
        on_block: called after every block with block and number of blocks, from 1.

    Returns:
        ``[1, z, T, H / stride, W / stride]`` float32; block 0 is the image's own latent.
    """
    host = Host(vae.device, plan.park)
    height, width = picture.shape[3:]
    num_blocks, stride = motion.shape[2], motion_vae.config.spatial_stride
    rows = interpolation_matrix(motion.shape[3] * stride, height, vae.device)
    columns = interpolation_matrix(motion.shape[4] * stride, width, vae.device)
    tiles = len(plan.regions(height // vae.config.spatial_stride, width // vae.config.spatial_stride))
    crops, reported = 0, 0

    def on_crop(frames: int) -> None:
        nonlocal crops, reported
        crops += -(-frames // vae.config.temporal_stride)
        while on_block is not None and reported < crops // tiles:
            reported += 1
            on_block(reported, num_blocks)

    def frames() -> Iterator[UpsampledFrames]:
        decoded = motion_vae.decode_stream(motion.split(1, dim=2), motion_plan)
        if plan.park:
            decoded = iter([parked(decoded)])
        for i, low in enumerate(decoded):
            yield UpsampledFrames(low, rows, columns, picture if i == 0 else None, on_crop)

    def parked(decoded: Iterator[Tensor]) -> Tensor:
        """Returns all frames of the motion, in host memory."""
        number = 1 + (num_blocks - 1) * motion_vae.config.temporal_stride
        shape = (motion.shape[0], 3, number, rows.shape[1], columns.shape[1])
        whole, start = host.empty(shape, motion_vae.decode_dtype), 0
        for low in decoded:
            whole[:, :, start : start + low.shape[2]].copy_(low)
            start += low.shape[2]
        return whole

    # A list has an end, after which tiles have nothing to remember.
    given = list(frames()) if plan.park else frames()
    return torch.cat([block.float() for block in vae.encode_stream(given, plan, host=host)], dim=2)


def decode_frames(
    vae: WanVAE, anchor: Tensor, segments: Iterable[Tensor], *, plan: VAEPlan = WHOLE
) -> Iterator[Tensor]:
    """Yields frames of the anchor block ``[1, z, 1, h, w]``, then of every segment ``[1, z, m, h, w]`` as soon as it is
    there.

    They are ``[F, H, W, 3]`` uint8 of one block; with a plan that parks, of a segment, since its tiles wait once for
    each of these.
    """
    pieces = chain([anchor], segments)
    if not plan.park:
        pieces = chain.from_iterable(segment.split(1, dim=2) for segment in pieces)
    for frames in vae.decode_frames(pieces, plan):
        yield frames[0]
