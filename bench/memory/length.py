"""Stage II's peak against the clip's length: constant for CSG but for the stored latents, growing end to end."""

from __future__ import annotations

from typing import Any

import torch

from bench.csg.window import WindowClock
from bench.records.outcome import FAILURES, failure
from bench.records.write import Table
from model.config import Preset
from model.csg.sampler import SegmentPlan, Window, plan_for
from model.memory.cost import dit as dit_cost

MODES = ("end_to_end", "bidirectional")
LENGTHS = (17, 41, 81, 161, 241)
IDENTITY = ("frames", "mode", "basis_of_peak")
METRICS = ("peak_bytes", "tokens")


def predicted_rows(preset: Preset, size: tuple[int, int], lengths: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    """Returns rows of peaks predicted by the cost model, whose tests compare it with counted tensors."""
    rows = []
    for num_frames in lengths:
        for mode in MODES:
            window, num_blocks, latent_size = _largest(preset, size, num_frames, mode)
            found = dit_cost.memory(
                preset.stage_two, latent_size, window_blocks=len(window.blocks), denoised_blocks=len(window.noisy),
                num_blocks=num_blocks, steps=4, dtype=dtype,
            )  # fmt: skip
            tokens = len(window.blocks) * dit_cost.tokens_per_block(preset.stage_two, latent_size)
            row = {"frames": num_frames, "mode": mode, "basis_of_peak": "predicted", "basis": "predicted"}
            row |= {"basis_note": "by model/memory/cost", "peak_bytes": found.total, "tokens": tokens}
            rows.append(row)
    return rows


def measure_lengths(
    table: Table, preset: Preset, size: tuple[int, int], lengths: tuple[int, ...], device: torch.device,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Measures a step of two layers on a card at every length, and adds the weights of the other layers."""
    for num_frames in lengths:
        for mode in MODES:
            window, num_blocks, latent_size = _largest(preset, size, num_frames, mode)
            row: dict[str, Any] = {"frames": num_frames, "mode": mode, "basis_of_peak": "measured"}
            try:
                clock = WindowClock(preset.stage_two, latent_size, num_blocks, device, dtype, layers=(1, 2))
                found = clock.measure(window, split=False)
                del clock
                row |= {"peak_bytes": found.peak_bytes, "tokens": found.tokens, "basis": "extrapolated"}
                row["basis_note"] = found.note
            except FAILURES as error:
                row |= failure(error)
            table.add(row)


def _largest(preset: Preset, size: tuple[int, int], num_frames: int, mode: str) -> tuple[Window, int, tuple[int, int]]:
    num_blocks = 1 + (num_frames - 1) // preset.vae.temporal_stride
    plan = plan_for(mode, SegmentPlan(num_blocks))
    stride = preset.vae.spatial_stride
    window = max(plan, key=lambda window: len(window.blocks))
    return window, num_blocks, (size[1] // stride, size[0] // stride)
