"""The work of a pass of a DiT, by window and mode, and the memory of denoising windows."""

from __future__ import annotations

import torch

from model.config import DiTConfig
from model.csg.sampler import SegmentPlan, Window
from model.memory.cost import dit
from model.memory.cost.work import Work


def whole_step(config: DiTConfig, num_blocks: int, latent_size: tuple[int, int], itemsize: int = 2) -> Work:
    """Returns one step of all blocks of a clip in one window, as ``model.pipeline.stages.make_motion`` takes it."""
    tokens = dit.tokens_per_block(config, latent_size)
    # A DiT without mask channels is given its first block.
    targets = num_blocks - (config.in_channels == config.out_channels)
    return dit.forward(config, num_blocks * tokens, targets=targets * tokens, itemsize=itemsize)


def window_passes(
    config: DiTConfig, window: Window, mode: str, latent_size: tuple[int, int], itemsize: int = 2
) -> tuple[Work | None, Work]:
    """Returns a Stage II window's work done once, if any, and in every step (``model.csg.sampler.sample_latents``)."""
    tokens = dit.tokens_per_block(config, latent_size)
    given, noisy = len(window.conditioning) * tokens, len(window.noisy) * tokens
    if mode == "causal":
        return (
            dit.forward(config, given, targets=0, itemsize=itemsize),
            dit.forward(config, noisy, remembered=given, itemsize=itemsize),
        )
    return None, dit.forward(config, given + noisy, targets=noisy, itemsize=itemsize)


def windows_memory(
    config: DiTConfig,
    plan: SegmentPlan,
    mode: str,
    latent_size: tuple[int, int],
    *,
    steps: int,
    dtype: torch.dtype,
    denoised_blocks: int | None = None,
    contexts: int = 1,
    eight_bits: torch.dtype | None = None,
) -> dit.DiTMemory:
    """Returns the peak of denoising the windows of a plan.

    Args:
        config: the shape of the DiT.
        plan: the segments of the clip, for this mode (:func:`model.csg.sampler.plan_for`).
        mode: one of ``model.csg.sampler.MODES``.
        latent_size: rows and columns of a latent frame.
        steps, dtype, contexts, eight_bits: as for :func:`model.memory.cost.dit.memory`.
        denoised_blocks: blocks of the store of latents; None: those of the longest segment.
    """
    windows = list(plan)
    given, noisy = (max(map(len, blocks)) for blocks in zip(*((w.conditioning, w.noisy) for w in windows), strict=True))
    causal = mode == "causal"
    return dit.memory(
        config,
        latent_size,
        window_blocks=max(given, noisy) if causal else max(len(window.blocks) for window in windows),
        denoised_blocks=noisy if denoised_blocks is None else denoised_blocks,
        num_blocks=plan.num_blocks,
        steps=steps,
        dtype=dtype,
        remembered_blocks=given * contexts if causal else 0,
        contexts=contexts,
        eight_bits=eight_bits,
    )
