"""Conditional Segment-wise Generation: a clip is denoised segment by segment, each in one bounded window.

A *block* is one latent frame. Block 0 (the *anchor*) is the input image and is given; the others are generated M at a
time. Segment s generates the *noisy* blocks ``a_s .. a_s + M - 1``; its window is

    [anchor 0] + [neighbours a_s - N_left .. a_s - 1] + [neighbours behind the segment] + [noisy blocks]

with full bidirectional attention inside, so the tokens of a window are bounded by ``(1 + N_left + N_right + M)`` blocks
whatever the clip's length. Neighbours are read from the reference sequence by block index. When a segment is done its
blocks are written back into that sequence: a left neighbour is a generated block, a right neighbour is still the motion
reference.

From the paper (arXiv 2605.06356): the window, the write-back, M = 3 and N = 1, channel concatenation of the reference.
Ours, where the paper is silent: conditioning blocks carry timestep 0 and noisy blocks t; a block's channels are
``[latents | mask | reference]`` with mask 1 on conditioning blocks (the layout of Wan I2V, so its checkpoints can start
it); rotary positions are the blocks' true indices in the clip; no block is in a window twice, so the first segment has
no left neighbour besides the anchor; the last segment is short if M does not divide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import MASK_CHANNELS
from model.dit import WanDiT
from model.errors import InputError
from model.scheduler import NUM_TRAIN_TIMESTEPS, block_noise, euler_step

#: ``end_to_end``: one window of all blocks. ``bidirectional``: conditioning and noisy blocks of a window attend to each
#: other. ``causal``: conditioning blocks see conditioning blocks only, so their keys and values are made
#: once a segment.
MODES = ("end_to_end", "bidirectional", "causal")

STAGE = 2

#: Called after every denoising step with (segment, number of segments, step, number of steps), all counted from 1.
StepCallback = Callable[[int, int, int, int], None]


@dataclass(frozen=True)
class Window:
    """The blocks of one segment's window, by index in the clip."""

    conditioning: tuple[int, ...]
    noisy: tuple[int, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """All blocks in window order: conditioning first."""
        return self.conditioning + self.noisy


@dataclass(frozen=True)
class SegmentPlan:
    """How a clip of ``num_blocks`` blocks is cut into segments.

    Args:
        num_blocks: latent frames of the clip, the anchor included.
        blocks_per_segment: M, the noisy blocks of a segment.
        neighbours_left, neighbours_right: conditioning blocks before and behind the noisy ones.

    Raises:
        InputError: fewer than 2 blocks, no block a segment, or a negative number of neighbours.
    """

    num_blocks: int
    blocks_per_segment: int = 3
    neighbours_left: int = 1
    neighbours_right: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_blocks", 2),
            ("blocks_per_segment", 1),
            ("neighbours_left", 0),
            ("neighbours_right", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    @classmethod
    def end_to_end(cls, num_blocks: int) -> SegmentPlan:
        """One segment of all blocks but the anchor."""
        return cls(num_blocks, max(num_blocks - 1, 1), 0, 0)

    def __len__(self) -> int:
        """Number of segments."""
        return -(-(self.num_blocks - 1) // self.blocks_per_segment)

    def __iter__(self) -> Iterator[Window]:
        """The windows in the order in which they are generated."""
        for start in range(1, self.num_blocks, self.blocks_per_segment):
            stop = min(start + self.blocks_per_segment, self.num_blocks)
            left = range(max(start - self.neighbours_left, 1), start)
            right = range(stop, min(stop + self.neighbours_right, self.num_blocks))
            yield Window((0, *left, *right), tuple(range(start, stop)))

    @property
    def max_window_blocks(self) -> int:
        """Bound on the blocks of any window, independent of the clip's length."""
        return 1 + self.neighbours_left + self.neighbours_right + self.blocks_per_segment


def plan_for(mode: str, plan: SegmentPlan) -> SegmentPlan:
    """The plan that ``mode`` runs: ``plan`` itself, or one window of all blocks for ``end_to_end``.

    Raises:
        InputError: ``mode`` is unknown.
    """
    if mode not in MODES:
        raise InputError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    return SegmentPlan.end_to_end(plan.num_blocks) if mode == "end_to_end" else plan


def dit_input(latents: Tensor, mask: Tensor, reference: Tensor, in_channels: int) -> Tensor:
    """``[latents | mask | reference]`` on the channel axis, or the latents alone for a DiT without these channels.

    Args:
        latents, reference: ``[B, z, T, h, w]``.
        mask: ``[T]``, 1 where the block is given, 0 where it is generated.
        in_channels: what the DiT takes: ``2z + 4`` or ``z``.

    Raises:
        InputError: ``in_channels`` is neither.
    """
    batch, z, num_blocks, height, width = latents.shape
    if in_channels == z:
        return latents
    if in_channels != 2 * z + MASK_CHANNELS:
        raise InputError(
            f"in_channels: a DiT for latents of {z} channels takes {z} or {2 * z + MASK_CHANNELS}"
            f" (latents, mask, reference), this one takes {in_channels}"
        )
    channels = mask.to(latents).view(1, 1, -1, 1, 1).expand(batch, MASK_CHANNELS, num_blocks, height, width)
    return torch.cat((latents, channels, reference.to(latents)), dim=1)


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
    on_step: StepCallback | None = None,
) -> Iterator[Tensor]:
    """Generates all blocks after the anchor, segment by segment, and yields each segment as soon as it is done.

    Args:
        dit: the Stage II model; its ``in_channels`` decides whether mask and reference are concatenated.
        reference: ``[1, z, num_blocks, h, w]`` float32 on the DiT's device: the input image's latent in block 0 and the
            motion reference behind it. **Updated in place**: afterwards it holds the generated clip.
        text: embeddings ``[1, L, text_dim]``.
        image: CLIP tokens ``[1, 257, image_dim]`` for a DiT with an image embedding, else None.
        plan: the segments; ``mode="end_to_end"`` takes only ``num_blocks`` from it.
        sigmas: noise levels from 1 to 0 (:func:`model.scheduler.flow_sigmas`).
        seed: of the noise, which is drawn per block.
        mode: one of :data:`MODES`.
        on_step: called after every step.

    Yields:
        Blocks ``[1, z, m, h, w]``, in order, every block after the anchor exactly once.

    Raises:
        InputError: the mode is unknown, or the reference does not have the plan's number of blocks.
    """
    plan = plan_for(mode, plan)
    if reference.ndim != 5 or reference.shape[2] != plan.num_blocks:
        raise InputError(f"reference: expected [1, z, {plan.num_blocks}, h, w], got {tuple(reference.shape)}")
    make_velocity = _causal_velocity if mode == "causal" else _window_velocity
    return _segments(dit, reference, (text, image), plan, sigmas, seed, make_velocity, on_step)


Velocity = Callable[[Tensor, float], Tensor]
Context = tuple[Tensor, Tensor | None]


def _segments(
    dit: WanDiT,
    reference: Tensor,
    context: Context,
    plan: SegmentPlan,
    sigmas: Sequence[float],
    seed: int,
    make_velocity: Callable[[WanDiT, Tensor, Tensor, Context, Window], Velocity],
    on_step: StepCallback | None,
) -> Iterator[Tensor]:
    _, z, _, height, width = reference.shape
    for segment, window in enumerate(plan, start=1):
        given = reference[:, :, list(window.conditioning)]
        motion = reference[:, :, list(window.noisy)]
        x = block_noise(seed, STAGE, window.noisy, (z, height, width)).to(reference)
        velocity = make_velocity(dit, given, motion, context, window)
        for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas), start=1):
            x = euler_step(x, velocity(x, NUM_TRAIN_TIMESTEPS * sigma), sigma, next_sigma)
            if on_step is not None:
                on_step(segment, len(plan), step, len(sigmas) - 1)
        reference[:, :, list(window.noisy)] = x
        yield x


def _window_velocity(dit: WanDiT, given: Tensor, motion: Tensor, context: Context, window: Window) -> Velocity:
    """The noisy blocks' velocity from one bidirectional pass over the whole window."""
    num_given, num_noisy = len(window.conditioning), len(window.noisy)
    mask = given.new_tensor([1.0] * num_given + [0.0] * num_noisy)
    known = torch.cat((given, motion), dim=2)

    def velocity(x: Tensor, timestep: float) -> Tensor:
        latents = dit_input(torch.cat((given, x), dim=2), mask, known, dit.config.in_channels)
        return dit(latents, (timestep * (1 - mask)).unsqueeze(0), *context, block_index=window.blocks)[:, :, num_given:]

    return velocity


def _causal_velocity(dit: WanDiT, given: Tensor, motion: Tensor, context: Context, window: Window) -> Velocity:
    """The same with conditioning blocks that do not see the noisy ones: their keys and values are made once."""
    ones, zeros = given.new_ones(len(window.conditioning)), given.new_zeros(len(window.noisy))
    latents = dit_input(given, ones, given, dit.config.in_channels)
    memory = dit.keys_values(latents, given.new_zeros(1), *context, block_index=window.conditioning)

    def velocity(x: Tensor, timestep: float) -> Tensor:
        noisy = dit_input(x, zeros, motion, dit.config.in_channels)
        return dit(noisy, x.new_full((1,), timestep), *context, block_index=window.noisy, memory=memory)

    return velocity
