"""Requests for the memory planner, and their plans, which tests share."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from model.config import PRESETS
from model.csg.sampler import plan_segments
from model.memory import vae_plan
from model.memory.plan import plan_memory
from model.memory.report import MemoryPlan
from model.memory.request import DiTRequest, MemoryRequest
from model.sizes import size_multiple, stage_one_size
from swifti2v_kernels.common.cards import CARDS

GB = 10**9
#: Bytes of UMT5-XXL's encoder.
TEXT = 11_360_000_000


def request(preset: str = "14b-1.3b", vram: float | None = None, frames: int = 81, **changes: Any) -> MemoryRequest:
    """Returns the request of a preset, at an RTX 4090's speed unless changed."""
    chosen = PRESETS[preset]
    size = chosen.width, chosen.height
    options = {"gpu": CARDS["RTX 4090"], "capability": 89} | changes
    return MemoryRequest(
        stage_one=options.pop("stage_one", DiTRequest(chosen.stage_one)),
        stage_two=DiTRequest(chosen.stage_two),
        vae=chosen.vae,
        size=size,
        motion_size=stage_one_size(*size, size_multiple(chosen.vae, chosen.stage_one)),
        num_frames=frames,
        plan=plan_segments(1 + (frames - 1) // 4),
        vram=None if vram is None else round(vram * GB),
        **options,
    )


def predict_nothing(patch: pytest.MonkeyPatch) -> None:
    """Makes every VAE take 5 bytes, for tests that do not depend on what it takes, since counting it takes seconds."""
    patch.setattr(vae_plan, "predict", lambda request, plan: vae_plan.Peak(5, 1, 1, 2))


@functools.cache
def planned(preset: str, vram: float | None, frames: int = 81) -> MemoryPlan:
    return plan_memory(request(preset, vram, frames))
