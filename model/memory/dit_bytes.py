"""The bytes that denoising holds beside the DiT's layers, and its passes over them, in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.config import DiTConfig
from model.csg.sampler import SegmentPlan
from model.dit.workspace import Workspace
from model.errors import InputError
from model.memory.request import MemoryRequest
from model.pipeline.encoders import TEXT_LENGTH

#: Tokens of one image embedded by CLIP.
IMAGE_TOKENS = 257
_FLOAT = 4


@dataclass(frozen=True)
class DiTMemory:
    """The bytes that denoising holds from its first to its last step; nothing is allocated in between."""

    context: int
    modulation: int
    workspace: int
    stores: int
    remembered: int

    @property
    def total(self) -> int:
        """The sum of all, which is the peak without weights."""
        return sum(vars(self).values())


def tokens_per_block(config: DiTConfig, latent_size: tuple[int, int]) -> int:
    """Returns the tokens of one latent frame of (rows, columns) latent pixels.

    Raises:
        InputError: they are not multiples of the patch.
    """
    (rows, columns), (_, p, q) = latent_size, config.patch_size
    if rows < 1 or columns < 1 or rows % p or columns % q:
        raise InputError(f"latent_size: expected positive multiples of the patch {p} x {q}, got {rows} x {columns}")
    return (rows // p) * (columns // q)


def image_tokens(config: DiTConfig) -> int:
    """Returns the CLIP tokens that the model reads: none, or those of one image or of its stored positions."""
    return 0 if config.image_dim is None else config.pos_embed_seq_len or IMAGE_TOKENS


def modulation_elements(config: DiTConfig, timesteps: int) -> int:
    """Returns the number of elements, in float32, of the modulation of all layers and of the head."""
    return timesteps * config.dim * (6 * config.num_layers + 2)


def dit_memory(
    config: DiTConfig,
    plan: SegmentPlan,
    latent_size: tuple[int, int],
    *,
    steps: int,
    dtype: torch.dtype,
    causal: bool = False,
    whole: bool = False,
    contexts: int = 1,
    eight_bits: torch.dtype | None = None,
) -> DiTMemory:
    """Returns the peak of denoising one clip, part by part; activations are planned as the model does it.

    Args:
        config: the shape of the model.
        plan: the segments of the clip, for its mode (:func:`model.csg.sampler.plan_for`).
        latent_size: rows and columns of a latent frame.
        steps: steps of the schedule.
        dtype: the dtype of weights and activations.
        causal: whether windows remember the keys and values of what is given.
        whole: whether all blocks are one window, as in Stage I.
        contexts: sets of text keys and values: 2 with guidance.
        eight_bits: the dtype of what is quantised before a matmul; None where matmuls are in ``dtype``.
    """
    windows, blocks = list(plan), plan.num_blocks
    given, noisy = (max(len(getattr(w, kind)) for w in windows) for kind in ("conditioning", "noisy"))
    largest = max(given, noisy) if causal else max(len(window.blocks) for window in windows)
    block_len = tokens_per_block(config, latent_size)
    workspace = Workspace.plan(
        config, 1, blocks if whole else largest, block_len, dtype=dtype, device="meta", eight_bits=eight_bits
    )
    pairs = 2 * config.num_layers * config.dim * dtype.itemsize
    latents = config.out_channels * latent_size[0] * latent_size[1] * _FLOAT
    return DiTMemory(
        context=contexts * (TEXT_LENGTH + image_tokens(config)) * pairs,
        modulation=_FLOAT * modulation_elements(config, steps + 1),
        workspace=workspace.nbytes,
        stores=((blocks if whole else noisy) + blocks) * latents,
        remembered=given * contexts * block_len * pairs if causal and not whole else 0,
    )


def passes_of(r: MemoryRequest, first: bool) -> Iterator[tuple[int, int, int, int]]:
    """Yields all passes over a stage's layers: how often, tokens, those to predict, and those remembered."""
    dit, vae, size = (r.stage_one, r.stage_one_vae, r.motion_size) if first else (r.stage_two, r.vae, r.size)
    tokens = tokens_per_block(dit.config, (size[1] // vae.spatial_stride, size[0] // vae.spatial_stride))
    if first:
        # A DiT without mask channels is given its first block.
        noisy = r.plan.num_blocks - (dit.config.in_channels == dit.config.out_channels)
        yield r.stage_one_steps, r.plan.num_blocks * tokens, noisy * tokens, 0
    for window in () if first else r.plan:
        given, noisy = len(window.conditioning) * tokens, len(window.noisy) * tokens
        if r.mode == "causal":
            yield 1, given, 0, 0
            yield r.steps, noisy, noisy, given
        else:
            yield r.steps, given + noisy, noisy, 0
