"""The request for a memory plan: models, clip, card and machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from model.config import DiTConfig, VAEConfig
from model.csg.sampler import SegmentPlan, plan_for
from model.errors import InputError
from model.streaming.placement import NO_TENSORS
from swifti2v_kernels.common.cards import Card

#: The lowest compute capability, as two digits, of cards that multiply float8.
FLOAT8_MATMUL = 89
#: The share of a card's memory that is planned with: the rest is the CUDA context, what libraries take beside the
#: allocator, and fragmentation.
USABLE = 0.88
#: Share of a machine's memory that is planned with: the rest is the system's and other programs'.
HOST_USABLE = 0.9


@dataclass(frozen=True)
class DiTRequest:
    """A DiT to be planned for: its shape, and the tensors of its checkpoint in 8 bits, with their dtypes, by name."""

    config: DiTConfig
    stored: Mapping[str, str] = field(default_factory=lambda: NO_TENSORS)


@dataclass(frozen=True)
class MemoryRequest:
    """A clip and a machine that a plan is made for.

    Args:
        stage_one, stage_two, low_noise: the DiTs; the last is Wan2.2 A14B's second expert.
        vae, motion_vae: the VAE of Stage II, and that of Stage I where it is another one.
        size, motion_size: (width, height) of the target and of Stage I.
        num_frames, plan: the number of frames of the clip, and its segments.
        gpu: the card whose seconds are predicted.
        mode: one of :data:`model.csg.sampler.MODES`.
        steps, stage_one_steps: denoising steps of the two stages.
        dtype: the dtype of the DiTs and of the decoders.
        vram, ram, vae_limit: bytes of the card, of the machine, and for the VAE alone; None: no limit.
        capability: compute capability as two digits; None: a CPU.
        quantize, matmul: ``auto`` (:func:`model.memory.plan.plan_memory`) or one of ``QUANTIZE``, and one of ``MATMUL``
            (:mod:`model.streaming.placement`).
        from_files: whether the DiTs come from checkpoints, from which layers can be read in every pass.
        text_encoder_bytes: the bytes of its weights; 0: the run has none.
        less: bytes that single phases may take at most, by name, where these have run out of memory.

    Raises:
        InputError: a value does not fit; the message names it.
    """

    stage_one: DiTRequest
    stage_two: DiTRequest
    vae: VAEConfig
    size: tuple[int, int]
    motion_size: tuple[int, int]
    num_frames: int
    plan: SegmentPlan
    gpu: Card
    low_noise: DiTRequest | None = None
    motion_vae: VAEConfig | None = None
    mode: str = "bidirectional"
    steps: int = 4
    stage_one_steps: int = 4
    dtype: torch.dtype = torch.bfloat16
    vram: int | None = None
    ram: int | None = None
    capability: int | None = 90
    quantize: str = "auto"
    matmul: str = "plain"
    from_files: bool = False
    text_encoder_bytes: int = 0
    vae_limit: int | None = None
    less: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.matmul == "8bit" and self.quantize in ("none", "file"):
            raise InputError(f"matmul: 8bit goes with quantize auto, float8 or int8, got {self.quantize}")
        too_old = self.capability is not None and self.capability < FLOAT8_MATMUL
        if self.matmul == "8bit" and self.quantize == "float8" and too_old:
            raise InputError(
                f"matmul: 8bit of float8 needs compute capability {FLOAT8_MATMUL / 10}, this card has"
                f" {(self.capability or 0) / 10}; --quantize int8 runs here"
            )
        object.__setattr__(self, "plan", plan_for(self.mode, self.plan))

    @property
    def stage_one_vae(self) -> VAEConfig:
        """The configuration of Stage I's VAE."""
        return self.motion_vae or self.vae

    @property
    def masked(self) -> bool:
        """True if Stage I's DiT has mask channels, and so is conditioned on a whole clip."""
        return self.stage_one.config.in_channels != self.stage_one.config.out_channels

    def latent_size(self, first: bool) -> tuple[int, int]:
        """Returns rows and columns of a latent frame of Stage I (``first``) or of Stage II."""
        vae, (width, height) = (self.stage_one_vae, self.motion_size) if first else (self.vae, self.size)
        return height // vae.spatial_stride, width // vae.spatial_stride

    def room(self, limit: float, *phases: str) -> float:
        """Returns the bytes of the device for phases that share a choice: the smallest limit of any of them."""
        return min(limit, *(self.less.get(phase, limit) for phase in phases))

    @property
    def usable(self) -> int | None:
        """The bytes of the card that are planned with (:data:`USABLE` of it)."""
        return None if self.vram is None else int(USABLE * self.vram)

    @property
    def usable_host(self) -> int | None:
        """The bytes of the machine's memory that are planned with (:data:`HOST_USABLE` of it)."""
        return None if self.ram is None else int(HOST_USABLE * self.ram)
