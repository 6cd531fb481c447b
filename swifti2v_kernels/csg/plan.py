"""Conditional Segment-wise Generation for any video DiT: the plan, its windows, their noise and their assembly.

A *block* is one latent frame. Block 0 (the *anchor*) is the input image and is given; the others are generated M at a
time. Segment s generates the *noisy* blocks ``a_s .. a_s + M - 1``; its window is

    [anchor 0] + [neighbours a_s - N_left .. a_s - 1] + [N_right neighbours after the segment] + [noisy blocks]

so the tokens of a window are bounded by ``(1 + N_left + N_right + M)`` blocks whatever the clip's length. Given blocks
are read by index from one sequence, the *reference*: the input image and, after it, a rough version of the clip (a
motion reference). When a segment is done its blocks are written back there: a neighbour before a segment is a generated
block, one after it is still the rough one. Source: SwiftI2V, arXiv 2605.06356.

Each piece is usable alone; :func:`swifti2v_kernels.sample_segments` puts them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The blocks of one segment's window, by index in the clip.

    Attributes:
        conditioning: the given blocks: anchor, neighbours before and neighbours after the segment.
        noisy: the blocks that the segment generates.
    """

    conditioning: tuple[int, ...]
    noisy: tuple[int, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """All blocks of the window in its order, the conditioning ones first."""
        return self.conditioning + self.noisy


@dataclass(frozen=True)
class SegmentPlan:
    """The cut of a clip into segments; iterating over it yields each segment's :class:`swifti2v_kernels.Window`.

    Args:
        num_blocks: latent frames of the clip, the anchor included.
        blocks_per_segment: M, the noisy blocks of a segment.
        neighbours_left: conditioning blocks before the noisy ones.
        neighbours_right: conditioning blocks after the noisy ones.
        anchor: whether the input image's block is in every window; False is the paper's ablation, in which it is only
            the neighbour of the first segment.

    Raises:
        ValueError: fewer than 2 blocks, no block a segment, or a negative number of neighbours.

    Examples:
        >>> [window.blocks for window in SegmentPlan(6)]
        [(0, 1, 2, 3), (0, 3, 4, 5)]

    Source: Conditional Segment-wise Generation of SwiftI2V (arXiv 2605.06356).
    """

    num_blocks: int
    blocks_per_segment: int = 3
    neighbours_left: int = 1
    neighbours_right: int = 0
    anchor: bool = True

    def __post_init__(self) -> None:
        allowed = {"num_blocks": 2, "blocks_per_segment": 1, "neighbours_left": 0, "neighbours_right": 0}
        for name, least in allowed.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    @classmethod
    def end_to_end(cls, num_blocks: int) -> SegmentPlan:
        """Returns the plan with one segment, which has all blocks but the anchor."""
        return cls(num_blocks, max(num_blocks - 1, 1), 0, 0)

    def __len__(self) -> int:
        """Returns the number of segments."""
        return -(-(self.num_blocks - 1) // self.blocks_per_segment)

    def __iter__(self) -> Iterator[Window]:
        """Yields the windows in the order in which they are generated."""
        for start in range(1, self.num_blocks, self.blocks_per_segment):
            stop = min(start + self.blocks_per_segment, self.num_blocks)
            left = range(max(start - self.neighbours_left, int(self.anchor)), start)
            right = range(stop, min(stop + self.neighbours_right, self.num_blocks))
            yield Window(((0,) if self.anchor else ()) + (*left, *right), tuple(range(start, stop)))


def block_noise(seed: int, stage: int, blocks: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Returns standard normal noise for some blocks of a clip, each block from a generator of its own.

    A block's noise depends on ``seed``, ``stage``, its index in the clip and its ``shape`` only: not on the
    segmentation, on the other blocks or on the device.

    Args:
        seed: the clip's seed, not negative.
        stage: 1 or 2, the stage of SwiftI2V that uses the noise.
        blocks: indices of the blocks in the clip.
        shape: ``(C, h, w)`` of a block.

    Returns:
        ``[1, C, len(blocks), h, w]`` float32 on the CPU.

    Examples:
        >>> both, last = (block_noise(0, 2, blocks, (16, 4, 6)) for blocks in ([3, 4], [4]))
        >>> both.shape, torch.equal(both[:, :, 1:], last)
        (torch.Size([1, 16, 2, 4, 6]), True)
    """
    drawn = []
    for block in blocks:
        state = np.random.SeedSequence((seed, stage, block)).generate_state(1, np.uint64)[0]
        generator = torch.Generator("cpu").manual_seed(int(state) >> 1)
        drawn.append(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"))
    return torch.stack(drawn, dim=1).unsqueeze(0)


def check_mask_channels(mask_channels: int | None) -> None:
    """Checks that ``mask_channels`` is None or not negative, else raises a ValueError."""
    if mask_channels is not None and mask_channels < 0:
        raise ValueError(f"mask_channels: expected None or at least 0, got {mask_channels}")


def assemble_window(reference: Tensor, latents: Tensor, window: Window, *, mask_channels: int | None = None) -> Tensor:
    """Returns the blocks of a window as one tensor, as most DiTs take them.

    (:func:`swifti2v_kernels.embed_window` makes a window's tokens without this tensor, for a DiT whose patch embedding
    is at hand.)

    Args:
        reference: the whole clip ``[B, z, N, h, w]``: conditioning blocks, and with ``mask_channels`` the reference of
            every block, are read from it by index.
        latents: the noisy blocks ``[B, z, m, h, w]``, in the order of ``window.noisy``.
        window: the blocks that are asked for.
        mask_channels: None gives the latents alone. A number n gives the channels ``[latents | n of mask | reference]``
            with mask 1 on conditioning blocks and 0 on noisy ones. Wan I2V has n = 4, which makes 36 of 16 channels; 0
            leaves the mask out.

    Returns:
        ``[B, z or 2z + n, W, h, w]``, contiguous, dtype and device of ``latents``; block ``i`` is ``window.blocks[i]``.

    Raises:
        ValueError: the two do not fit each other or the window, or ``mask_channels`` is negative.

    Examples:
        >>> window = Window((0, 3), (4, 5))
        >>> assemble_window(torch.zeros(1, 16, 9, 4, 6), torch.zeros(1, 16, 2, 4, 6), window, mask_channels=4).shape
        torch.Size([1, 36, 4, 4, 6])
    """
    if reference.ndim != 5:
        raise ValueError(f"reference: expected [B, z, N, h, w], got {tuple(reference.shape)}")
    batch, z, num_blocks, *size = reference.shape
    expected = (batch, z, len(window.noisy), *size)
    if latents.shape != expected:
        raise ValueError(f"latents: expected {expected} for this reference and window, got {tuple(latents.shape)}")
    if latents.device != reference.device:
        raise ValueError(f"latents: expected the reference's device {reference.device}, got {latents.device}")
    if not all(0 <= block < num_blocks for block in window.blocks):
        raise ValueError(f"window: expected blocks in 0..{num_blocks - 1}, got {window.blocks}")
    check_mask_channels(mask_channels)
    given = [reference[:, :, block : block + 1].to(latents.dtype) for block in window.conditioning]
    own = torch.cat((*given, latents), dim=2)
    if mask_channels is None:
        return own.contiguous()
    mask = latents.new_zeros(batch, mask_channels, len(window.blocks), *size)
    mask[:, :, : len(given)] = 1
    known = torch.cat([reference[:, :, block : block + 1] for block in window.blocks], dim=2)
    return torch.cat((own, mask, known.to(latents.dtype)), dim=1).contiguous()
