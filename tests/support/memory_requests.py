"""Requests for the memory planner, and their plans, which tests share."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from model.config import PRESETS
from model.csg.sampler import plan_segments
from model.memory import vae_choice, vae_plan
from model.memory.cost.gpus import GPUS
from model.memory.plan import plan_memory
from model.memory.report import MemoryPlan
from model.memory.request import DiTRequest, MemoryRequest
from model.sizes import size_multiple, stage_one_size

GB = 10**9
#: Bytes of UMT5-XXL's encoder.
TEXT = 11_360_000_000


def request(preset: str = "14b-1.3b", vram: float | None = None, frames: int = 81, **changes: Any) -> MemoryRequest:
    """Returns the request of a preset, at an RTX 4090's speed unless changed."""
    chosen = PRESETS[preset]
    size = chosen.width, chosen.height
    options = {"gpu": GPUS["RTX 4090"], "capability": 89} | changes
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
    for module in (vae_plan, vae_choice):
        patch.setattr(module, "predict", lambda request, plan: vae_plan.Peak(5, 1, 1, 1, 1))
    patch.setattr(vae_plan, "_flops", lambda request, plan: 1)
    patch.setattr(vae_choice, "_use", vae_choice.VAEPlace._use)  # remembers nothing of it


@functools.cache
def planned(preset: str, vram: float | None, frames: int = 81) -> MemoryPlan:
    return plan_memory(request(preset, vram, frames))
