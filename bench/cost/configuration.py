"""The configuration that is predicted: the two stages, their VAEs, the clip, its steps and windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from model.config import DiTConfig, VAEConfig, get_preset
from model.csg.sampler import SegmentPlan, check_channels, plan_for, plan_segments
from model.errors import InputError
from model.sizes import check_frames, check_size, size_multiple, stage_one_size

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Configuration:
    """The models, the clip, and how it is made.

    Args:
        stage_one: the DiT of Stage I; None: there is none, and Stage II makes all blocks end to end.
        stage_two: the DiT of Stage II.
        vae: the VAE of Stage II.
        stage_one_vae: the VAE of Stage I; None: the same.
        width, height, num_frames: the size of the clip.
        stage_one_steps, steps: denoising steps of the two stages.
        guidance: a second forward for every step of Stage II; Stage I has its guidance distilled into it.
        blocks_per_segment, neighbours_left, neighbours_right: M and N of the windows.
        mode: one of ``model.csg.sampler.MODES``.
        dtype: the dtype of the DiTs and of the decoders.
        encode_dtype: the dtype of the encoders; float32 unless that does not fit, as in ``model.memory.vae_places``.

    Raises:
        InputError: a value does not fit; the message names it.
    """

    stage_one: DiTConfig | None
    stage_two: DiTConfig
    vae: VAEConfig
    stage_one_vae: VAEConfig | None = None
    width: int = 2560
    height: int = 1408
    num_frames: int = 81
    stage_one_steps: int = 4
    steps: int = 4
    guidance: bool = False
    blocks_per_segment: int = 3
    neighbours_left: int = 1
    neighbours_right: int = 0
    mode: str = "bidirectional"
    dtype: torch.dtype = torch.bfloat16
    encode_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("stage_one_steps", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("dtype", "encode_dtype"):
            if getattr(self, name) not in DTYPES:
                raise InputError(f"{name}: expected bfloat16, float16 or float32, got {getattr(self, name)}")
        check_size(self.width, self.height, size_multiple(self.vae, self.stage_two))
        check_channels(self.stage_two, self.vae.z_dim)
        plan = self.plan  # checks the frames, M, N and the mode
        if self.stage_one is None:
            if self.mode != "end_to_end":
                raise InputError(f"mode: without a stage_one only end_to_end, got {self.mode!r}")
            return
        check_channels(self.stage_one, self.motion_vae.z_dim)
        if check_frames(self.num_frames, self.motion_vae.temporal_stride) != plan.num_blocks:
            raise InputError("stage_one_vae: expected the temporal stride of vae")

    @classmethod
    def for_preset(cls, name: str, **changes: Any) -> Configuration:
        """Returns the configuration of a preset of ``model.config``, with ``changes`` to its fields.

        Raises:
            InputError: the preset is unknown, or a change does not fit.
        """
        preset = get_preset(name)
        fields = ("stage_one", "stage_two", "vae", "width", "height", "num_frames")
        return cls(**{**{field: getattr(preset, field) for field in fields}, **changes})

    @classmethod
    def end_to_end(cls, config: DiTConfig, vae_config: VAEConfig, **changes: Any) -> Configuration:
        """Returns the configuration of one DiT that makes the whole clip: 50 steps with guidance, unless changed.

        Raises:
            InputError: a change does not fit.
        """
        return cls(None, config, vae_config, mode="end_to_end", **{"steps": 50, "guidance": True, **changes})

    @property
    def motion_vae(self) -> VAEConfig:
        """The configuration of Stage I's VAE."""
        return self.stage_one_vae or self.vae

    @property
    def plan(self) -> SegmentPlan:
        """The segments of the clip."""
        blocks = check_frames(self.num_frames, self.vae.temporal_stride)
        segments = plan_segments(blocks, self.blocks_per_segment, self.neighbours_left, self.neighbours_right)
        return plan_for(self.mode, segments)

    @property
    def motion_size(self) -> tuple[int, int]:
        """The width and height of Stage I's frames."""
        config = self.stage_two if self.stage_one is None else self.stage_one
        return stage_one_size(self.width, self.height, size_multiple(self.motion_vae, config))
