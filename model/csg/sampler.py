"""Conditional Segment-wise Generation: a clip is denoised segment by segment, each in one bounded window.

Blocks, segments and windows are those of ``swifti2v_kernels/csg/plan.py``, with full bidirectional attention inside a
window; the reference is the motion reference of Stage I.

From the paper (arXiv 2605.06356): the window, the write-back, M = 3 and N = 1, channel concatenation of the reference.
Ours, where the paper is silent: conditioning blocks carry timestep 0 and noisy blocks t; a block's channels are
``[latents | mask | reference]`` with mask 1 on conditioning blocks (the layout of Wan I2V, so its checkpoints can start
it); rotary positions are the blocks' true indices in the clip; no block is in a window twice, so the first segment has
no neighbour before it besides the anchor; the last segment is short if M does not divide the number of blocks.

The plan, its windows and their noise are the library's (``swifti2v_kernels.SegmentPlan``), which also samples with DiTs
of other makes (``swifti2v_kernels.sample_segments``). Here is the sampler for this project's own DiT, which never holds
a window's channels, keeps the keys and values of the causal mode, and replays its steps as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from model.config import MASK_CHANNELS
from model.csg.denoiser import Denoiser
from model.dit.model import WanDiT
from model.errors import InputError
from model.machine.finite import Finite
from swifti2v_kernels import SegmentPlan, block_noise
from swifti2v_kernels import Window as Window  # for those who import the plan from here

#: ``end_to_end``: one window of all blocks. ``bidirectional``: conditioning and noisy blocks of a window attend to each
#: other. ``causal``: conditioning blocks see conditioning blocks only, so their keys and values are made
#: once a segment.
MODES = ("end_to_end", "bidirectional", "causal")

#: The number that makes Stage II's noise differ from Stage I's, which is drawn from the same seed.
STAGE = 2


def plan_segments(num_blocks: int, *numbers: int, **named: int) -> SegmentPlan:
    """Returns a :class:`swifti2v_kernels.SegmentPlan`, whose arguments these are, of numbers that a user gave.

    Raises:
        InputError: the numbers make no plan; the message says which one is wrong.
    """
    try:
        return SegmentPlan(num_blocks, *numbers, **named)
    except ValueError as error:
        raise InputError(str(error)) from error


def plan_for(mode: str, plan: SegmentPlan) -> SegmentPlan:
    """Returns the plan that ``mode`` runs: ``plan`` itself, or one window of all blocks for ``end_to_end``.

    Raises:
        InputError: ``mode`` is unknown.
    """
    if mode not in MODES:
        raise InputError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    return SegmentPlan.end_to_end(plan.num_blocks) if mode == "end_to_end" else plan


def sample_latents(
    dit: WanDiT,
    reference: Tensor,
    text: Tensor,
    image: Tensor | None = None,
    *,
    plan: SegmentPlan,
    sigmas: Sequence[float],
    seed: int,
    mode: str = "bidirectional",
    on_step: Callable[[int, int, int, int], None] | None = None,
    cuda_graph: bool = True,
    done: int = 0,
) -> Iterator[Tensor]:
    """Generates all blocks after the anchor, segment by segment, and yields each segment as soon as it is done.

    Args:
        dit: the Stage II model; its ``in_channels`` decides whether mask and reference are concatenated.
        reference: ``[1, z, num_blocks, h, w]`` float32 on the DiT's device: the input image's latent in block 0 and the
            motion reference after it. **Updated in place**: at the end it holds the generated clip.
        text: embeddings ``[1, L, text_dim]``.
        image: CLIP tokens ``[1, 257, image_dim]`` for a DiT with an image embedding, else None.
        plan: the segments; ``mode="end_to_end"`` takes only ``num_blocks`` from it.
        sigmas: noise levels from 1 to 0 (:func:`model.csg.schedule.flow_sigmas`).
        seed: seed of the noise, which is drawn per block.
        mode: one of :data:`MODES`.
        on_step: called after every step with segment, number of segments, step and number of steps, from 1.
        cuda_graph: on CUDA, capture the step of every kind of window and replay it; a warning says so where that fails.
        done: number of segments whose blocks an earlier run has put into ``reference``; sampling begins after them.

    Yields:
        Blocks ``[1, z, m, h, w]``, in order, every block after the anchor and the ``done`` segments exactly once.

    Raises:
        InputError: the mode is unknown, the reference does not have the plan's number of blocks, the DiT does not take
            latents of its number of channels, or the plan has fewer than ``done`` segments.
        NotFiniteError: a segment is NaN or infinite; the message names it and the step. It is not in ``reference``.

    Examples:
        >>> import torch
        >>> from model.config import get_preset
        >>> from model.csg.schedule import flow_sigmas
        >>> from model.weights.load import random_weights
        >>> dit = random_weights(WanDiT, get_preset("tiny").stage_two, seed=0)
        >>> reference, text = torch.zeros(1, 16, 5, 8, 8), torch.zeros(1, 512, dit.config.text_dim)
        >>> plan = SegmentPlan(num_blocks=5, blocks_per_segment=3)
        >>> segments = sample_latents(dit, reference, text, plan=plan, sigmas=flow_sigmas(2, 5.0), seed=1)
        >>> [tuple(blocks.shape) for blocks in segments]
        [(1, 16, 3, 8, 8), (1, 16, 1, 8, 8)]
    """
    plan = plan_for(mode, plan)
    if reference.ndim != 5 or reference.shape[2] != plan.num_blocks:
        raise InputError(f"reference: expected [1, z, {plan.num_blocks}, h, w], got {tuple(reference.shape)}")
    z, taken = reference.shape[1], dit.config.in_channels
    if taken not in (z, 2 * z + MASK_CHANNELS):
        raise InputError(
            f"in_channels: a DiT for latents of {z} channels takes {z} or {2 * z + MASK_CHANNELS}"
            f" (latents, mask, reference), this one takes {taken}"
        )
    if not 0 <= done <= len(plan):
        raise InputError(f"done: expected 0..{len(plan)} segments, got {done}")

    def segments() -> Iterator[Tensor]:
        height, width = reference.shape[3:]
        windows = list(plan)
        slots = max(len(window.noisy) for window in windows)
        latents = reference.new_empty(1, z, slots, height, width)
        # The causal mode runs conditioning and noisy blocks in passes of their own.
        passes = [(w.conditioning, w.noisy) if mode == "causal" else (w.blocks,) for w in windows]
        denoiser = Denoiser(
            dit, text, image, latents=latents, reference=reference, sigmas=sigmas, cuda_graph=cuda_graph,
            max_blocks=max(len(blocks) for window in passes for blocks in window),
        )  # fmt: skip
        for segment, window in enumerate(windows[done:], start=done + 1):
            x = latents[:, :, : len(window.noisy)]
            x.copy_(block_noise(seed, STAGE, window.noisy, (z, height, width)))
            denoiser.open_window(window, mode)
            finite = Finite(f"Stage II, segment {segment} of {len(windows)}")
            for step in range(len(sigmas) - 1):
                denoiser.step(step)
                finite.note(x, f"at step {step + 1} of {len(sigmas) - 1}")
                if on_step is not None:
                    on_step(segment, len(windows), step + 1, len(sigmas) - 1)
            finite.check()
            reference[:, :, list(window.noisy)] = x
            yield x.clone()

    return segments()
