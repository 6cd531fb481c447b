"""diffusers' overlap-and-blend tiling of the Wan VAE, for results that must match it. It is approximate: see below.

Every tile is decoded (or encoded) as if it were a whole frame: zeros instead of its surroundings, attention within it.
Tiles overlap and are faded into each other, which hides the seams and computes the overlap twice. The exact tiles of
:class:`model.tiling.VAEPlan` need neither; this is for comparison, and for who must reproduce such a result.

diffusers blends in place, tile by tile: first with the tile above, then with the one to the left, as these have become.
The result is linear in the tiles. With A above left, B above, C left and D the tile itself, and u, v growing from 0 to
1 across the overlap from the left and from above, a pixel is

    (1 - v)(1 - u^2) A  +  (1 - v) u^2 B  +  v (1 - u) C  +  v u D

so that every tile has a *window* of weights, and the sum of weighted tiles is the result: the last layer adds its tile
to the frame as it stores it (``frames_out``). It holds where tiles overlap by no more than their stride.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import InputError
from model.vae import WanVAE


@dataclass(frozen=True)
class BlendAxis:
    """Tiles along one axis: of ``tile`` pixels, a new one every ``stride``, in a frame of ``size``."""

    size: int
    tile: int
    stride: int

    @property
    def starts(self) -> range:
        """Where tiles begin."""
        return range(0, self.size, self.stride)

    def span(self, start: int) -> slice:
        """The pixels of a tile."""
        return slice(start, min(start + self.tile, self.size))

    def fades(self, start: int) -> tuple[Tensor, Tensor]:
        """[n], [n] of the tile's n pixels: how much of a pixel is not its predecessor's (0 to 1 across their overlap),
        and how much of it is not its successor's. 1 and then 0 where the tile ends for its successor."""
        n = self.span(start).stop - start
        rise = self._rise(start, n)
        fall = torch.ones(n)
        following = start + self.stride
        if following < self.size:
            # The successor begins at ``stride``; what it has faded to 1 is not this tile's any more.
            overlap = self._rise(following, self.span(following).stop - following)[: max(n - self.stride, 0)]
            fall[self.stride :] = 0
            fall[self.stride : self.stride + len(overlap)] = 1 - overlap
        return rise, fall

    def _rise(self, start: int, n: int) -> Tensor:
        rise = torch.ones(n)
        overlap = min(self.tile - self.stride, n)
        if start > 0 and overlap > 0:
            rise[:overlap] = torch.arange(overlap) / overlap
        return rise


def window(rows: BlendAxis, columns: BlendAxis, top: int, left: int) -> Tensor:
    """The weights [h, w] of the tile that begins there; those of all tiles add up to 1 at every pixel."""
    v, down = rows.fades(top)
    u, right = columns.fades(left)
    own_rows, own_columns = (torch.arange(len(x)) < axis.stride for x, axis in ((v, rows), (u, columns)))
    # As D within its own cell, B below it, C to the right of it, A below and to the right; a cell is a stride long.
    parts = torch.where(own_rows, v, 0.0), torch.where(own_rows, 0.0, down)
    across = torch.where(own_columns, u, 0.0), torch.where(own_columns, 0.0, right)
    squared = torch.where(own_columns, u**2, 0.0), torch.where(own_columns, 0.0, 1 - (1 - right) ** 2)
    return torch.outer(parts[0], across[0] + across[1]) + torch.outer(parts[1], squared[0] + squared[1])


def decode_blended(
    vae: WanVAE, latents: Tensor, *, tile: tuple[int, int] = (256, 256), stride: tuple[int, int] = (192, 192)
) -> Tensor:
    """Latents ``[B, z, T, h, w]`` to video ``[B, 3, F, H, W]`` float32, as diffusers' ``decode`` with tiling enabled.

    As there, a frame that is no larger than a tile is decoded whole.

    Args:
        vae: the model.
        latents: normalised.
        tile, stride: pixels (rows, columns) of a tile, and from one to the next; diffusers' defaults.

    Raises:
        InputError: they are no multiples of the VAE's stride, or tiles overlap by more than the stride.
    """
    config, scale = vae.config, vae.config.spatial_stride
    axes = _axes("decode", latents.shape[3:], tile, stride, scale)
    batch, _, blocks, height, width = latents.shape
    if scale * height <= tile[0] and scale * width <= tile[1]:
        return vae.decode(latents).float()
    frames = 1 + (blocks - 1) * config.temporal_stride
    canvas = torch.zeros(batch, frames, scale * height, scale * width, 3, device=vae.device)
    # diffusers fades in the features before the last convolution's patches are unfolded.
    patch, features = config.patch_size, scale // config.patch_size
    fading = [BlendAxis(axis.size * features, axis.tile * features, axis.stride * features) for axis in axes]
    for top in axes[0].starts:
        for left in axes[1].starts:
            rows, columns = axes[0].span(top), axes[1].span(left)
            weights = window(*fading, top * features, left * features)
            weights = weights.repeat_interleave(patch, 0).repeat_interleave(patch, 1).to(vae.device)
            place = canvas[:, :, scale * rows.start : scale * rows.stop, scale * columns.start : scale * columns.stop]
            vae.decode_onto(place, latents[..., rows, columns], weights)
    return canvas.clamp_(-1, 1).permute(0, 4, 1, 2, 3)


def encode_blended(
    vae: WanVAE, video: Tensor, *, tile: tuple[int, int] = (256, 256), stride: tuple[int, int] = (192, 192)
) -> Tensor:
    """Video ``[B, 3, F, H, W]`` to normalised latents ``[B, z, T, h, w]`` float32, as diffusers' ``encode`` with tiling
    enabled.

    For Wan2.2 diffusers counts ``tile`` and ``stride`` in patches of 2x2 pixels, and encodes a frame whole that has no
    more pixels than a tile has patches; so does this.

    Raises:
        InputError: as :func:`decode_blended`.
    """
    scale = vae.config.spatial_stride
    size = (video.shape[3] // scale, video.shape[4] // scale)
    rows, columns = _axes("encode", size, tile, stride, scale // vae.config.patch_size)
    if video.shape[3] <= tile[0] and video.shape[4] <= tile[1]:
        return vae.encode(video).float()
    canvas: Tensor | None = None
    for top in rows.starts:
        for left in columns.starts:
            y, x = rows.span(top), columns.span(left)
            part = video[..., scale * y.start : scale * y.stop, scale * x.start : scale * x.stop]
            latents = vae.encode(part).float()
            if canvas is None:
                canvas = latents.new_zeros(*latents.shape[:3], *size)
            canvas[..., y, x] += window(rows, columns, top, left).to(latents.device) * latents
    assert canvas is not None
    return canvas


def _axes(
    part: str, size: tuple[int, ...], tile: tuple[int, int], stride: tuple[int, int], scale: int
) -> tuple[BlendAxis, BlendAxis]:
    """In latent pixels."""
    for name, pair in (("tile", tile), ("stride", stride)):
        if len(pair) != 2 or min(pair) < scale or any(n % scale for n in pair):
            raise InputError(f"{name}: expected two multiples of {scale} to {part}, got {tuple(pair)}")
    if any(not s <= t <= 2 * s for t, s in zip(tile, stride, strict=True)):
        raise InputError(f"stride: expected tiles to overlap by at most a stride, got tile {tile}, stride {stride}")
    height, width = (BlendAxis(n, t // scale, s // scale) for n, t, s in zip(size, tile, stride, strict=True))
    return height, width
