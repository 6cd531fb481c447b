"""How the VAE works in each of its four places in the pipeline, within one limit of memory.

condition: the photograph and grey frames at Stage I's size, encoded
motion:    Stage I's result, decoded at its size
reference: the motion at the target size, encoded
decode:    the clip, decoded while Stage II makes it
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from model.components import Components
from model.config import DiTConfig, VAEConfig
from model.dit import WanDiT
from model.errors import InputError
from model.measure import format_bytes, parse_bytes
from model.vae_plan import PlannedVAE, device_capability, plan_vae

#: Share of a card's memory that is planned with, unless a limit is given: the rest is the CUDA context, what libraries
#: take beside the allocator, and fragmentation.
USABLE = 0.88
#: Copies of the residual stream that Stage II holds beside its weights (4.3 counted; see model/workspace.py), and what
#: attention and the text take.
STREAMS = 6


@dataclass(frozen=True)
class Card:
    """A GPU that plans are for: its compute capability (two digits) and its memory in bytes."""

    capability: int
    memory: int

    @classmethod
    def of(cls, device: torch.device) -> Card | None:
        """The card that a device is; None for a CPU."""
        capability = device_capability(device)
        return None if capability is None else cls(capability, torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class PipelinePlans:
    """One plan for each place, and the dtype that the reference is encoded in."""

    condition: PlannedVAE
    motion: PlannedVAE
    reference: PlannedVAE
    decode: PlannedVAE

    @property
    def encode_dtype(self) -> torch.dtype:
        """float32, unless that does not fit."""
        return self.reference.request.dtype

    def __str__(self) -> str:
        parts = []
        for name, planned in (("reference", self.reference), ("decode", self.decode)):
            plan, request = planned.plan, planned.request
            grid = [min(n, size) for n, size in zip((plan.rows, plan.columns), request.latent_size, strict=True)]
            tiles = "untiled" if math.prod(grid) == 1 else f"{grid[0]} x {grid[1]} exact tiles"
            host = ", what waits in host memory" if plan.park else ""
            peak = "" if planned.limit is None else f", {format_bytes(planned.peak.total)} predicted"
            parts.append(f"{name} {str(request.dtype).removeprefix('torch.')}, {tiles}{host}{peak}")
        return f"VAE: {'; '.join(parts)}"


def plan_pipeline(
    vae: VAEConfig,
    motion_vae: VAEConfig,
    size: tuple[int, int],
    motion_size: tuple[int, int],
    *,
    decode_dtype: torch.dtype,
    device: torch.device,
    limit: int | None,
    stage_two_bytes: int = 0,
    blocks_per_segment: int = 3,
    card: Card | None = None,
) -> PipelinePlans:
    """Plans for all four places.

    Args:
        vae, motion_vae: of the target and of Stage I.
        size, motion_size: (width, height) of the two.
        decode_dtype: of both decoders.
        device: where they run.
        limit: bytes for the VAE; None: on a GPU what the card has, less what Stage II takes while the clip is decoded,
            and no limit on a CPU. It depends on the card alone, so that the same command makes the same plan.
        stage_two_bytes: of :func:`stage_two_memory`.
        blocks_per_segment: latent frames that are decoded at once.
        card: plan for this one instead of what ``device`` is.

    Raises:
        InputError: no plan fits.
    """
    card = Card.of(device) if card is None else card
    capability, decode_limit = (None if card is None else card.capability), limit
    if card is not None and limit is None:
        limit = int(USABLE * card.memory)
        decode_limit = max(limit - stage_two_bytes, 1)
    options = {"capability": capability}
    float32, floats = torch.float32, {"limit": limit, "capability": capability}
    motion = plan_vae(motion_vae, "decode", *motion_size, dtype=decode_dtype, piece=1, **floats)
    condition = plan_vae(motion_vae, "encode", *motion_size, dtype=float32, piece=1, **floats)
    decode = plan_vae(vae, "decode", *size, dtype=decode_dtype, limit=decode_limit, piece=blocks_per_segment, **options)
    return PipelinePlans(condition, motion, _plan_reference(vae, size, limit, motion, capability), decode)


def _plan_reference(
    vae: VAEConfig, size: tuple[int, int], limit: int | None, motion: PlannedVAE, capability: int | None
) -> PlannedVAE:
    """Streamed beside the motion's decoder; or tile by tile after it; and in bfloat16 only where float32 never fits."""
    options = {"piece": 1, "capability": capability}
    if limit is None:
        return plan_vae(vae, "encode", *size, dtype=torch.float32, **options)
    attempts = [(torch.float32, False, max(limit - motion.peak.total, 1))]
    if capability is not None:
        attempts += [(torch.float32, True, limit), (torch.bfloat16, True, limit)]
    for i, (dtype, park, left) in enumerate(attempts):
        try:
            return plan_vae(vae, "encode", *size, dtype=dtype, limit=left, park=park, **options)
        except InputError:
            if i + 1 == len(attempts):
                raise
    raise AssertionError("the last attempt returns or raises")


def stage_two_memory(config: DiTConfig, dtype: torch.dtype, tokens: int) -> int:
    """Predicted bytes that Stage II holds while frames are decoded: weights and the activations of a window.

    Args:
        config: of its DiT.
        dtype: of the weights.
        tokens: of the largest window.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in WanDiT(config).parameters())
    return (weights + STREAMS * tokens * config.dim) * dtype.itemsize


def plan_components(
    components: Components,
    size: tuple[int, int],
    motion_size: tuple[int, int],
    *,
    window_blocks: int,
    blocks_per_segment: int,
    memory: str,
    dtype: torch.dtype,
    device: torch.device,
    card: Card | None = None,
) -> PipelinePlans:
    """:func:`plan_pipeline` for the models of a command.

    Args:
        components: the models.
        size, motion_size: (width, height) of the target and of Stage I.
        window_blocks: latent frames of Stage II's largest window.
        blocks_per_segment: latent frames that are decoded at once.
        memory: ``auto``, or a size for :func:`model.measure.parse_bytes`.
        dtype: of the DiTs and of the decoders.
        device: where all runs.
        card: plan for this one instead.

    Raises:
        InputError: ``memory`` has another form, or no plan fits.
    """
    vae, dit = components.vae_config, components.stage_two_config
    tokens = window_blocks * size[0] * size[1] // (vae.spatial_stride**2 * dit.patch_size[1] * dit.patch_size[2])
    return plan_pipeline(
        vae,
        components.stage_one_vae_config,
        size,
        motion_size,
        decode_dtype=dtype,
        device=device,
        limit=None if memory == "auto" else parse_bytes(memory),
        stage_two_bytes=stage_two_memory(dit, dtype, tokens),
        blocks_per_segment=blocks_per_segment,
        card=card,
    )
