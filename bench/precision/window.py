"""A CSG window through a whole DiT in every form, compared with the same weights in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.precision.forms import COMPUTE, Form, add_ratios, errors_of
from bench.precision.weights import Drawing, Weights
from bench.records.outcome import FAILURES, failure
from model.config import DiTConfig
from model.csg.denoiser import Denoiser
from model.csg.sampler import SegmentPlan, Window
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT
from model.machine.host import release
from model.pipeline.encoders import TEXT_LENGTH
from model.streaming.placement import Placement

IDENTITY = ("model", "weights", "size", "layers", "form")
METRICS = ("error", "largest_error", "error_ratio")
COLUMNS = (*IDENTITY[:4], "tokens", "form", *METRICS)
NOTE = (
    "The velocity of three noisy blocks in a window with two given ones, at one timestep, compared with that of the"
    " same weights in float32. Error: relative L2; largest error: over the velocity's root mean square; x bf16: over"
    " bfloat16's error."
)
#: The last window of a clip of seven blocks has the input image, one neighbour and three noisy blocks.
PLAN = SegmentPlan(7)
#: The noise level of the third of four steps.
SIGMA = flow_sigmas(4, 5.0)[2]
IMAGE_TOKENS = 257


@dataclass(frozen=True)
class Inputs:
    """The inputs of a window, float32 on the CPU.

    They are the clip's reference and the noisy blocks, ``[1, z, blocks, h, w]`` each, and the tokens of text and image.
    """

    window: Window
    reference: Tensor
    latents: Tensor
    text: Tensor
    image: Tensor | None


def make_inputs(config: DiTConfig, latent_size: tuple[int, int], seed: int) -> Inputs:
    """Returns inputs whose latents are smooth in time and space, as those of clips are, with noise over them."""
    draw = Drawing(f"{seed} window", "cpu")
    (*_, window), (rows, columns), z = PLAN, latent_size, config.out_channels
    coarse = draw.normal(1, z, 3, max(rows // 4, 2), max(columns // 4, 2))
    reference = F.interpolate(coarse, (PLAN.num_blocks, rows, columns), mode="trilinear", align_corners=True)
    reference /= reference.square().mean().sqrt()
    clean = reference[:, :, list(window.noisy)]
    latents = (1 - SIGMA) * clean + SIGMA * draw.normal(*clean.shape)
    text = draw.normal(1, TEXT_LENGTH, config.text_dim)
    image = None
    if config.image_dim is not None:
        image = draw.normal(1, config.pos_embed_seq_len or IMAGE_TOKENS, config.image_dim)
    return Inputs(window, reference, latents, text, image)


@torch.no_grad()
def velocity(dit: WanDiT, inputs: Inputs) -> Tensor:
    """Returns the DiT's prediction for the noisy blocks, float32 on the CPU, by one step to noise level 0."""
    device, window = dit.device, inputs.window
    latents = inputs.latents.to(device, copy=True)
    denoiser = Denoiser(
        dit,
        inputs.text.to(device),
        None if inputs.image is None else inputs.image.to(device),
        latents=latents,
        reference=inputs.reference.to(device),
        sigmas=(SIGMA, 0.0),
        max_blocks=len(window.blocks),
        cuda_graph=False,
    )
    given, noisy = len(window.conditioning), range(len(window.noisy))
    denoiser.open(window.blocks, [-1] * given + [*noisy], [1.0] * given + [0.0] * len(noisy))
    denoiser.step(0)
    return (inputs.latents - latents.cpu()) / SIGMA


def window_rows(
    weights: Weights, model: str, size: tuple[int, int], latent_size: tuple[int, int], forms: Sequence[Form], seed: int
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the table ``window``, one for every form, the baseline included; one DiT is there at a time.

    Args:
        weights: the weights of all forms.
        model: the model's name in the table.
        size: width and height of the frames in pixels.
        latent_size: rows and columns of a latent frame.
        forms: the forms that are compared.
        seed: seed of latents, noise and text.
    """
    config = weights.config
    inputs = make_inputs(config, latent_size, seed)
    rows_of_tokens, columns_of_tokens = (n // p for n, p in zip(latent_size, config.patch_size[1:], strict=True))
    tokens = len(inputs.window.blocks) * rows_of_tokens * columns_of_tokens
    base = {"model": model, "weights": weights.kind, "size": f"{size[0]}x{size[1]}", "layers": config.num_layers}
    base |= {"tokens": tokens}
    rows: list[dict[str, Any]] = []
    try:
        expected = _predict(weights, torch.float32, Placement(), inputs)
    except FAILURES as error:
        # Nothing can be compared without the result in float32.
        found = failure(error)
        found["reason"] = f"float32: {found['reason']}"
        yield from (base | {"form": form.name} | found for form in forms)
        return
    for form in forms:
        row = base | {"form": form.name}
        try:
            row |= errors_of(_predict(weights, COMPUTE, form.placement, inputs), expected)
        except FAILURES as error:
            row |= failure(error)
        rows.append(row)
        add_ratios(rows)
        yield row


def _predict(weights: Weights, dtype: torch.dtype, placement: Placement, inputs: Inputs) -> Tensor:
    dit = weights.build(dtype, placement)
    device = dit.device
    try:
        return velocity(dit, inputs)
    finally:
        del dit
        release(device)
