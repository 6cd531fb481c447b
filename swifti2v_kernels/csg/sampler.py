"""Conditional Segment-wise Generation with a video DiT of any make, which an adapter of one method wraps.

    for each window of the plan:
        x = noise of its noisy blocks
        for each step: x = step(x, model(assemble_window(reference, x, window), sigma, window), i)
        reference[noisy blocks] = x

:class:`WindowModel` says what a DiT must offer, and what is lost where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .plan import SegmentPlan, Window, assemble_window, block_noise, check_mask_channels

#: The stage of :func:`swifti2v_kernels.block_noise` that segments are made in: SwiftI2V's second.
_STAGE = 2

#: One step of a solver: (noisy blocks ``[B, z, m, h, w]`` at level ``sigmas[i]``, their velocity, i) -> the blocks at
#: level ``sigmas[i + 1]``.
Step = Callable[[Tensor, Tensor, int], Tensor]


class WindowModel(Protocol):
    """The interface that :func:`sample_segments` calls a DiT by; any function with these parameters has it.

    Text, images, guidance, dtype and device of the weights are the adapter's own business. Classifier-free guidance is
    a model of two models: ``lambda *window: scale * with_text(*window) + (1 - scale) * without_text(*window)``.

    An adapter is asked for four things. A DiT that lacks one still runs, at a price:

    * **A noise level per block.** Conditioning blocks are finished and carry level 0, noisy ones ``sigma``. A DiT with
      one timestep for all tokens is told that the conditioning blocks are as noisy as the others, which they are not.
      It may have been trained so (Wan I2V was; its mask channels tell the two apart); else an adapter can noise the
      conditioning blocks to ``sigma`` itself.
    * **Positions in the clip.** The rotary positions of the window's frames are ``window.blocks``. A DiT that counts
      frames from 0 sees the anchor and a far segment as neighbours in time, and every segment as the clip's first.
    * **Full attention within the window**: conditioning blocks attend to noisy ones. Where they do not, and everything
      else about them is the same at every step, their keys and values could be kept, which this protocol does not do.
    * **A patch of one latent frame.** With a temporal patch of p, blocks can only be generated p at a time.

    Of the DiTs in diffusers 0.42, Wan and LTX-Video take a timestep per token; HunyuanVideo, Mochi and CogVideoX take
    one for all. LTX-Video and CogVideoX are handed their positions (``video_coords``, ``image_rotary_emb``); Wan,
    HunyuanVideo and Mochi compute them from the shape in a module ``rope``, whose output an adapter can replace for the
    time of a call, as ``swifti2v_kernels.integrations.diffusers.csg`` does for Wan.
    """

    def __call__(self, latents: Tensor, sigma: float, window: Window, /) -> Tensor:
        """Returns the velocity ``noise - clean`` of a window.

        Args:
            latents: the window ``[B, C, W, h, w]`` as :func:`swifti2v_kernels.assemble_window` makes it, float32 or
                wider; the adapter casts it to its weights' dtype.
            sigma: noise level in 0..1 of the blocks ``window.noisy``; that of the others is 0. Most flow-matching DiTs
                call ``1000 * sigma`` the timestep.
            window: the indices of these blocks in the clip.

        Returns:
            ``[B, z, m, h, w]`` for the noisy blocks, or ``[B, z, W, h, w]`` for the whole window, of which the last m
            are used. Any floating dtype. A DiT that predicts something else needs it converted here, or a ``step`` of
            its own.
        """
        ...


def sample_segments(
    model: WindowModel,
    reference: Tensor,
    *,
    plan: SegmentPlan,
    sigmas: Sequence[float] | Tensor,
    seed: int | Sequence[int],
    mask_channels: int | None = None,
    step: Step | None = None,
) -> Iterator[Tensor]:
    """Generates all blocks after the anchor, segment by segment, and yields each segment as soon as it is done.

    No gradients are recorded. Blocks are kept in float32 between the steps, or in float64 if the reference is.

    Args:
        model: the DiT, wrapped in an adapter (:class:`swifti2v_kernels.WindowModel`).
        reference: ``[B, z, num_blocks, h, w]`` on the device that the model takes its input on: the input image's
            latent in block 0 and the motion reference after it. **Updated in place**: in the end it holds the clip.
        plan: the segments; ``SegmentPlan.end_to_end(num_blocks)`` for one window of all blocks. SwiftI2V's ``causal``
            mode, in which conditioning blocks do not see noisy ones, needs a DiT that keeps keys and values.
        sigmas: noise levels from 1 to 0, one more than there are steps (``scheduler.sigmas`` in diffusers).
        seed: draws the noise of each block by :func:`swifti2v_kernels.block_noise`, stage 2; one seed for each batch
            entry.
        mask_channels: whether and how mask and reference are concatenated (:func:`swifti2v_kernels.assemble_window`).
        step: the solver; default Euler, ``x + (sigmas[i + 1] - sigmas[i]) * velocity``. It is called once a step, so
            solvers with several evaluations a step are out; one with a memory clears it at ``i == 0``, where a new
            segment begins.

    Yields:
        Blocks ``[B, z, m, h, w]`` in the reference's dtype, in order, every block after the anchor exactly once. What
        is yielded is in ``reference`` already; so after an interruption ``reference`` holds all finished segments.

    Raises:
        ValueError: an argument does not fit (at the call), or what ``model`` or ``step`` returns does not (as it runs).
        TypeError: the reference is not of floating point, the model cannot be called, or ``model`` or ``step`` returns
            something else than a tensor.

    Examples:
        >>> def model(latents, sigma, window):  # stands for a DiT
        ...     return latents[:, :, len(window.conditioning) :]
        >>> reference, plan = torch.randn(1, 16, 6, 4, 6), SegmentPlan(num_blocks=6)
        >>> segments = sample_segments(model, reference, plan=plan, sigmas=[1.0, 0.5, 0.0], seed=0)
        >>> [tuple(blocks.shape) for blocks in segments]
        [(1, 16, 3, 4, 6), (1, 16, 2, 4, 6)]

    Source: Conditional Segment-wise Generation of SwiftI2V (arXiv 2605.06356); Euler steps of flow matching
    (arXiv 2210.02747).
    """
    if not callable(model):
        raise TypeError(f"model: expected a WindowModel, which is called, got {type(model).__name__}")
    if reference.ndim != 5 or reference.shape[2] != plan.num_blocks:
        raise ValueError(f"reference: expected [B, z, {plan.num_blocks}, h, w], got {tuple(reference.shape)}")
    if not reference.is_floating_point():
        raise TypeError(f"reference: expected a floating-point dtype, got {reference.dtype}")
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or not all(0 <= sigma <= 1 for sigma in levels):
        raise ValueError(f"sigmas: expected two or more noise levels in 0..1 (not timesteps), got {levels}")
    check_mask_channels(mask_channels)
    seeds = tuple(seed) if isinstance(seed, Sequence) else (seed,)
    if len(seeds) != reference.shape[0] or any(one is None or one < 0 for one in seeds):
        raise ValueError(f"seed: expected {reference.shape[0]} (one a batch entry), none negative, got {seed}")
    _, z, _, height, width = reference.shape
    dtype, num_steps = torch.promote_types(reference.dtype, torch.float32), len(levels) - 1

    @torch.no_grad()
    def segments() -> Iterator[Tensor]:
        for window in plan:
            drawn = [block_noise(one, _STAGE, window.noisy, (z, height, width)) for one in seeds]
            x = torch.cat(drawn).to(reference.device, dtype)
            # The velocity of the noisy blocks, or of all blocks, of which these are the last.
            shapes = [(*x.shape[:2], blocks, *x.shape[3:]) for blocks in (len(window.noisy), len(window.blocks))]
            for i in range(num_steps):
                latents = assemble_window(reference, x, window, mask_channels=mask_channels)
                velocity = _checked("model", model(latents, levels[i], window), shapes)
                velocity = velocity[:, :, -len(window.noisy) :].to(x)
                if step is None:
                    x = x + (levels[i + 1] - levels[i]) * velocity
                else:
                    x = _checked("step", step(x, velocity, i), shapes[:1]).to(x)
            done = x.to(reference.dtype)
            reference[:, :, window.noisy[0] : window.noisy[-1] + 1] = done
            yield done

    return segments()


def _checked(name: str, result: Tensor, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    if not isinstance(result, Tensor):
        raise TypeError(f"{name}: expected it to return a tensor, got {type(result).__name__}")
    if result.shape not in shapes:
        kinds = ("a velocity {} of the noisy blocks", "{} of the window") if name == "model" else ("{}",)
        allowed = " or ".join(kind.format(shape) for kind, shape in zip(kinds, shapes, strict=True))
        raise ValueError(f"{name}: expected it to return {allowed}, got {tuple(result.shape)}")
    return result
