"""The configuration that is predicted: the two stages, their VAE, the clip, its steps and windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.config import DiTConfig, VAEConfig, get_preset
from model.csg.sampler import SegmentPlan, plan_for, plan_segments
from model.sizes import check_frames, check_size, size_multiple, stage_one_size


@dataclass(frozen=True)
class Configuration:
    """The models, the clip, and how it is made.

    Args:
        stage_one: the DiT of Stage I; None: there is none, and Stage II makes all blocks end to end.
        stage_two: the DiT of Stage II.
        vae: the VAE of both.
        width, height, num_frames: the size of the clip.
        stage_one_steps, steps: denoising steps of the two stages.
        guidance: a second forward for every step of Stage II; Stage I has its guidance distilled into it.
        blocks_per_segment, neighbours_left, neighbours_right: M and N of the windows.
        mode: one of ``model.csg.sampler.MODES``.

    Raises:
        InputError: a value does not fit; the message names it.
    """

    stage_one: DiTConfig | None
    stage_two: DiTConfig
    vae: VAEConfig
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

    def __post_init__(self) -> None:
        check_size(self.width, self.height, size_multiple(self.vae, self.stage_two))
        _ = self.plan  # checks the frames, M, N and the mode

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
    def end_to_end(cls, **changes: Any) -> Configuration:
        """Returns a stand-in for the paper's baseline: a 14B that makes the whole clip, 50 steps with guidance.

        Raises:
            InputError: a change does not fit.
        """
        preset = get_preset("14b-1.3b")
        options = {"mode": "end_to_end", "steps": 50, "guidance": True} | changes
        return cls(None, preset.stage_one, preset.vae, **options)

    @property
    def plan(self) -> SegmentPlan:
        """The segments of the clip."""
        blocks = check_frames(self.num_frames, self.vae.temporal_stride)
        segments = plan_segments(blocks, self.blocks_per_segment, self.neighbours_left, self.neighbours_right)
        return plan_for(self.mode, segments)

    @property
    def motion_size(self) -> tuple[int, int]:
        """The width and height of Stage I's frames."""
        return stage_one_size(self.width, self.height, size_multiple(self.vae, self.stage_one or self.stage_two))
