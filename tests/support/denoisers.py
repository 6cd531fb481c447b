"""Denoisers of DiTs without memory, which tests of operations and of bytes share."""

from __future__ import annotations

import torch

from model.config import DiTConfig
from model.csg.denoiser import Denoiser
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT, dit_parameter_dtype

META = torch.device("meta")


def meta_dit(config: DiTConfig, dtype: torch.dtype = torch.bfloat16) -> WanDiT:
    """Returns a model without memory, with the dtypes of a loaded one."""
    with META:
        model = WanDiT(config).requires_grad_(False)
    for name, p in model.named_parameters():
        p.data = p.data.to(dit_parameter_dtype(name, dtype))
    return model


def denoiser(model: WanDiT, latent_size: tuple[int, int], window: int, slots: int, num_blocks: int = 21) -> Denoiser:
    """Returns a denoiser for 4 steps of windows of so many blocks, ``slots`` of which are denoised."""
    config, device = model.config, model.device
    z = config.out_channels
    latents = torch.zeros(1, z, slots, *latent_size, device=device)
    reference = torch.zeros(1, z, num_blocks, *latent_size, device=device)
    text = torch.zeros(1, 512, config.text_dim, device=device, dtype=model.dtype)
    image = (
        None if config.image_dim is None else torch.zeros(1, 257, config.image_dim, device=device, dtype=model.dtype)
    )
    sigmas = flow_sigmas(4, 5.0)
    return Denoiser(model, text, image, latents=latents, reference=reference, sigmas=sigmas, max_blocks=window)


def open_window(denoise: Denoiser, window: int, noisy: int) -> None:
    """Opens a window whose last ``noisy`` blocks are to be denoised."""
    given = window - noisy
    denoise.open(range(window), [-1] * given + [*range(noisy)], [1.0] * given + [0.0] * noisy)
