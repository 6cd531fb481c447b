"""A CSG window through a whole DiT in every form, compared with the same weights in float32."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.precision.forms import COMPUTE, Form, compared
from bench.precision.weights import Drawing, Weights
from model.config import DiTConfig
from model.csg.denoiser import Denoiser
from model.csg.sampler import SegmentPlan, Window
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT
from model.machine.host import release
from model.memory.dit_bytes import image_tokens, tokens_per_block
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


class Inputs(NamedTuple):
    """The inputs of a window, float32 on the CPU.

    They are the clip's reference and the noisy blocks, ``[1, z, blocks, h, w]`` each, and the tokens of text and image.
    """

    window: Window
    reference: Tensor
    latents: Tensor
    text: Tensor
    image: Tensor | None


def make_inputs(config: DiTConfig, latent_size: tuple[int, int]) -> Inputs:
    """Returns inputs whose latents are smooth in time and space, as those of clips are, with noise over them."""
    draw = Drawing("0 window", "cpu")
    (*_, window), (rows, columns), z = PLAN, latent_size, config.out_channels
    coarse = draw.normal(1, z, 3, max(rows // 4, 2), max(columns // 4, 2))
    reference = F.interpolate(coarse, (PLAN.num_blocks, rows, columns), mode="trilinear", align_corners=True)
    reference /= reference.square().mean().sqrt()
    clean = reference[:, :, list(window.noisy)]
    latents = (1 - SIGMA) * clean + SIGMA * draw.normal(*clean.shape)
    text = draw.normal(1, TEXT_LENGTH, config.text_dim)
    image = None if config.image_dim is None else draw.normal(1, image_tokens(config), config.image_dim)
    return Inputs(window, reference, latents, text, image)


@torch.no_grad()
def velocity(dit: WanDiT, inputs: Inputs) -> Tensor:
    """Returns the DiT's prediction for the noisy blocks, float32 on the CPU, by one step to noise level 0."""
    device, window = dit.device, inputs.window
    latents = inputs.latents.to(device, copy=True)
    denoiser = Denoiser(
        dit, inputs.text.to(device), None if inputs.image is None else inputs.image.to(device),
        latents=latents, reference=inputs.reference.to(device), sigmas=(SIGMA, 0.0), max_blocks=len(window.blocks),
        cuda_graph=False,
    )  # fmt: skip
    denoiser.open_window(window)
    denoiser.step(0)
    return (inputs.latents - latents.cpu()) / SIGMA


def window_rows(
    weights: Weights, model: str, size: tuple[int, int], latent_size: tuple[int, int], forms: Sequence[Form]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the table ``window``, one for every form, the baseline included; one DiT is there at a time.

    Args:
        weights: the weights of all forms.
        model: the model's name in the table.
        size: width and height of the frames in pixels.
        latent_size: rows and columns of a latent frame.
        forms: the forms that are compared.
    """
    config = weights.config
    inputs = make_inputs(config, latent_size)

    def predicted(dtype: torch.dtype, placement: Placement) -> Tensor:
        dit = weights.build(dtype, placement)
        device = dit.device
        try:
            return velocity(dit, inputs)
        finally:
            del dit
            release(device)

    base = {"model": model, "weights": weights.kind, "size": f"{size[0]}x{size[1]}", "layers": config.num_layers}
    base["tokens"] = len(inputs.window.blocks) * tokens_per_block(config, latent_size)
    made = {form.name: functools.partial(predicted, COMPUTE, form.placement) for form in forms}
    yield from compared(base, "float32", functools.partial(predicted, torch.float32, Placement()), made)
