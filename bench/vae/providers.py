"""The implementations that ``python -m bench vae`` compares: our VAE and diffusers', untiled and in tiles.

All have the same weights. Our VAE takes and gives a clip a piece at a time, as its users stream it; diffusers' takes
the clip and returns it, which is all it offers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.records.outcome import Unavailable
from bench.vae.shapes import Shape
from model import VAEPlan, WanVAE
from model.machine.cards import device_options
from model.memory.vae_plan import PlannedVAE, plan_vae
from model.vae.model import WHOLE
from model.weights.load import random_weights

#: Latent frames that our VAE is handed at once.
PIECE = 3
#: The part of a limit that is planned for: the allocator cannot use all of it.
FRAGMENTATION = 0.93


@dataclass(frozen=True)
class Runner:
    """A loaded model: ``run(clip)`` yields what a clip becomes, in pieces.

    Our decode yields finished uint8 frames, for which ``exact(clip)`` gives the numbers.
    """

    run: Callable[[Tensor], Iterator[Tensor]]
    exact: Callable[[Tensor], Tensor]
    weights: Sequence[Tensor] = ()
    planned: PlannedVAE | None = None


@dataclass(frozen=True)
class Provider:
    """An implementation, whose ``load(shape, part, dtype, device, limit)`` builds the model.

    It is ``limited`` if it works in tiles that keep to a limit, and ``approximate`` if its tiles change the frame.
    """

    name: str
    load: Callable[[Shape, str, torch.dtype, torch.device, int | None], Runner]
    ours: bool = False
    limited: bool = False
    approximate: bool = False


def weights(shape: Shape, device: torch.device) -> WanVAE:
    """Returns the same random weights for all on a device, in float32."""
    return random_weights(WanVAE, shape.config, 0, device=device)


def own_runner(
    shape: Shape, part: str, dtype: torch.dtype, device: torch.device, plan: VAEPlan, planned: PlannedVAE | None = None
) -> Runner:
    """Loads our VAE, which works by a plan."""
    vae = weights(shape, device).to_dtypes(encode=dtype, decode=dtype)
    if part == "decode":
        vae.drop_encoder()
    else:
        vae.decoder.to("cpu")

    def run(clip: Tensor) -> Iterator[Tensor]:
        if part == "decode":
            yield from vae.decode_frames(_split(clip, PIECE), plan)
        else:
            yield from vae.encode_stream(_split(clip, PIECE * shape.config.temporal_stride), plan)

    def exact(clip: Tensor) -> Tensor:
        return vae.decode(clip, plan) if part == "decode" else vae.encode(clip, plan)

    return Runner(run, exact, vae.weights_of(part), planned)


def _split(clip: Tensor, most: int) -> Iterator[Tensor]:
    """Yields the first frame alone and then up to ``most`` at once, none of them kept."""
    yield clip[:, :, :1]
    for start in range(1, clip.shape[2], most):
        yield clip[:, :, start : start + most]


def _tiled(shape: Shape, part: str, dtype: torch.dtype, device: torch.device, limit: int | None) -> Runner:
    if limit is None:
        return own_runner(shape, part, dtype, device, VAEPlan(2, 2, frames=2))
    planned = plan_vae(
        shape.config, part, shape.width, shape.height,
        dtype=dtype, limit=int(FRAGMENTATION * limit), capability=device_options(device)["capability"], piece=PIECE,
    )  # fmt: skip
    return own_runner(shape, part, dtype, device, planned.plan, planned)


def diffusers_runner(shape: Shape, part: str, dtype: torch.dtype, device: torch.device, tiled: bool) -> Runner:
    """Loads diffusers' ``AutoencoderKLWan`` with our weights; tiles have its own default size and overlap.

    Raises:
        Unavailable: diffusers is not installed.
    """
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise Unavailable("pip install diffusers") from error
    config = shape.config
    with device:
        model = AutoencoderKLWan(
            base_dim=config.base_dim, decoder_base_dim=config.decoder_base_dim, z_dim=config.z_dim,
            dim_mult=list(config.dim_mult), num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample), is_residual=config.residual,
            in_channels=config.pixel_channels, out_channels=config.pixel_channels,
            patch_size=config.patch_size if config.patch_size > 1 else None,
            scale_factor_spatial=config.spatial_stride, scale_factor_temporal=config.temporal_stride,
            latents_mean=list(config.latents_mean), latents_std=list(config.latents_std),
        )  # fmt: skip
    model.load_state_dict(weights(shape, device).state_dict())
    # Its own ``to`` warns of parameters to be kept in float32, of which it has none.
    torch.nn.Module.to(model, dtype).eval().requires_grad_(False)
    if tiled:
        model.enable_tiling(shape.tile, shape.tile, shape.stride, shape.stride)
    mean, std = (
        torch.tensor(v, device=device, dtype=dtype).view(1, -1, 1, 1, 1)
        for v in (shape.config.latents_mean, shape.config.latents_std)
    )

    @torch.no_grad()
    def exact(clip: Tensor) -> Tensor:
        if part == "decode":
            return model.decode(clip.to(dtype) * std + mean).sample
        return (model.encode(clip.to(dtype)).latent_dist.mode() - mean) / std

    halves = (model.decoder, model.post_quant_conv), (model.encoder, model.quant_conv)
    half, others = halves if part == "decode" else halves[::-1]
    for other in others:
        other.to("cpu")
    return Runner(lambda clip: iter([exact(clip)]), exact, [p for module in half for p in module.parameters()])


PROVIDERS = (
    Provider("swifti2v", lambda *given: own_runner(*given[:4], WHOLE), ours=True),
    Provider("swifti2v, tiles", _tiled, ours=True, limited=True),
    Provider("diffusers", lambda *given: diffusers_runner(*given[:4], False)),
    Provider("diffusers, tiles", lambda *given: diffusers_runner(*given[:4], True), approximate=True),
)
