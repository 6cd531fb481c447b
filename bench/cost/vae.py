"""Operations and bytes of the VAE, in closed form: the list of its convolutions, stage by stage, for a whole clip.

A convolution of kt x kh x kw taps from C to C' channels has ``2 kt kh kw C C'`` operations a result pixel; zeros round
a frame and before a clip count. A clip of ``F = 1 + 4 (T - 1)`` frames, T of latents, has 1 + 2 (T - 1) frames in
between. Three things deserve a word:

* Nearest upsampling is folded into the 3x3 convolution after it, as the kernels of this project do it: 4 of 36 taps
  for each of the four phases, 16 of 36 operations.
* A temporal up- or downsampling passes the clip's first frame as it is.
* Attention, in the middle, is one head over the n pixels of a latent frame: ``4 n^2 C``, and ``8 n C^2`` for its
  projections.

Bytes are those of whole frames; halos of tiles are a factor (``model.memory.vae_plan.PlannedVAE.redundancy``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from bench.cost.work import Matmul, Work
from model.config import VAEConfig
from model.sizes import check_frames
from swifti2v_kernels.conv.calls import MAX_OWNED_CHANNELS


@dataclass(frozen=True)
class Convolution:
    """A convolution over a whole clip; ``frames``, ``height`` and ``width`` are those of its result.

    ``norm`` says that a norm and SiLU follow, ``sum_kept`` that the sum before the norm is read too, ``residual`` that
    something is added. ``calls`` is how often it runs, once a latent frame; each call but the first also reads the last
    frames of the one before.
    """

    kernel: tuple[int, int, int]
    channels: int
    columns: int
    frames: int
    height: int
    width: int
    calls: int
    kind: str = "convolution"
    stride: tuple[int, int, int] = (1, 1, 1)
    norm: bool = False
    sum_kept: bool = True
    residual: bool = False

    @property
    def pixels(self) -> int:
        """The pixels of the result, in all frames."""
        return self.frames * self.height * self.width

    @property
    def inputs(self) -> int:
        """The elements that are read, each counted once."""
        scale = 4 if self.kind == "upsample" else 1
        return self.channels * self.pixels * prod(self.stride) // scale

    @property
    def history(self) -> int:
        """The elements of earlier frames that are read."""
        kept = max(self.kernel[0] - self.stride[0], 0)
        return kept * (self.calls - 1) * self.channels * self.height * self.width

    @property
    def copied(self) -> int:
        """The elements that are read or written to keep a history: none where it is all that a call has read."""
        read = self.stride[0] * -(-self.frames // self.calls)
        return 0 if read == self.kernel[0] - self.stride[0] else 2 * self.history

    @property
    def flops(self) -> int:
        """The operations, with upsampling folded."""
        taps = 4 if self.kind == "upsample" else prod(self.kernel)
        return 2 * taps * self.channels * self.columns * self.pixels

    def work(self, itemsize: int) -> Work:
        """Returns operations and bytes with elements of ``itemsize`` bytes."""
        result = self.columns * self.pixels
        # A convolution norms as it stores if one program has all channels; else the norm is an operator of its own.
        owned = self.norm and self.columns <= MAX_OWNED_CHANNELS
        apart = 2 * result * (self.norm and not owned) + self.copied
        written = result * (1 + (owned and self.sum_kept)) + result * self.residual
        extent = self.columns if self.kind == "last_convolution" else self.channels
        joined = 2 * (self.inputs + self.history) if self.kernel[0] > 1 else 0
        separate = joined + self.copied + 2 * result * self.norm + 3 * result * self.residual
        return Work(
            (Matmul(self.kind, self.flops, extent),),
            float(itemsize * (self.inputs + self.history + written + prod(self.kernel) * self.channels * self.columns)),
            float(itemsize * apart),
            float(itemsize * separate),
        )


@dataclass(frozen=True)
class _Frames:
    """A number of frames of one size on their way through the stages."""

    frames: int
    height: int
    width: int
    calls: int

    def convolution(self, kernel: tuple[int, int, int], channels: int, columns: int, **more: Any) -> Convolution:
        """Returns a convolution whose result is these frames."""
        size = {"frames": self.frames, "height": self.height, "width": self.width, "calls": self.calls}
        return Convolution(kernel, channels, columns, **size, **more)

    def block(self, channels: int, columns: int, norm: bool = True) -> Iterator[Convolution]:
        """Yields the convolutions of a residual block; ``norm`` says that a norm follows it."""
        yield self.convolution((3, 3, 3), channels, columns, norm=True, sum_kept=False)
        if channels != columns:
            yield self.convolution((1, 1, 1), channels, columns)
        yield self.convolution((3, 3, 3), columns, columns, norm=norm, residual=True)

    def middle(self, channels: int) -> Iterator[Convolution]:
        """Yields the residual blocks around the attention, which is :func:`_attention`."""
        yield from self.block(channels, channels, norm=False)
        yield from self.block(channels, channels)


def _decoder(config: VAEConfig, at: _Frames) -> tuple[list[Convolution], int]:
    """Returns the convolutions of the decoder, and the elements that the shortcuts around its stages move.

    A shortcut, which has no parameters (Wan2.2), copies a stage's input to its place in the output.
    """
    z, dims = config.z_dim, [config.decoder_base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    doubles = (*reversed(config.temporal_downsample), False)
    last, moved = len(config.dim_mult) - 1, 0
    layers = [at.convolution((1, 1, 1), z, z), at.convolution((3, 3, 3), z, dims[0], norm=True), *at.middle(dims[0])]
    for i, (dim_in, dim_out) in enumerate(itertools.pairwise(dims)):
        channels = dim_in if config.residual or i == 0 else dim_in // 2
        for j in range(config.num_res_blocks + 1):
            # After the last block of a stage, the upsampling reads the sum itself.
            norm = j < config.num_res_blocks or i == last
            layers += at.block(channels if j == 0 else dim_out, dim_out, norm)
        if i == last:
            break
        if doubles[i] and at.frames > 1:
            rest = replace(at, frames=at.frames - 1, calls=at.calls - 1)
            layers.append(rest.convolution((3, 1, 1), dim_out, 2 * dim_out))
        at = _Frames(2 * at.frames - 1 if doubles[i] else at.frames, 2 * at.height, 2 * at.width, at.calls)
        columns = dim_out if config.residual else dim_out // 2
        options = {"kind": "upsample", "norm": True, "residual": config.residual}
        layers.append(at.convolution((1, 3, 3), dim_out, columns, **options))
        moved += 2 * columns * layers[-1].pixels
    layers.append(at.convolution((3, 3, 3), dims[-1], config.pixel_channels, kind="last_convolution"))
    return layers, moved


def _encoder(config: VAEConfig, at: _Frames, num_frames: int) -> tuple[list[Convolution], int]:
    """Returns the convolutions of the encoder, and the elements that the shortcuts around its stages move.

    A shortcut puts a stage's input into cells (read and written) and averages these.
    """
    calls, moved = at.calls, 0
    dims = [config.base_dim * m for m in (1, *config.dim_mult)]
    last = len(config.dim_mult) - 1
    scale = config.spatial_stride // config.patch_size
    at = _Frames(num_frames, scale * at.height, scale * at.width, calls)
    layers = [at.convolution((3, 3, 3), config.pixel_channels, dims[0], norm=True)]
    for i, (dim_in, dim_out) in enumerate(itertools.pairwise(dims)):
        moved += 3 * dim_in * at.frames * at.height * at.width
        for j in range(config.num_res_blocks):
            norm = j + 1 < config.num_res_blocks or i == last
            layers += at.block(dim_in if j == 0 else dim_out, dim_out, norm)
        if i == last:
            break
        at = replace(at, height=at.height // 2, width=at.width // 2)
        options = {"norm": True, "stride": (1, 2, 2), "residual": config.residual}
        layers.append(at.convolution((1, 3, 3), dim_out, dim_out, **options))
        moved += dim_out * layers[-1].pixels
        if config.temporal_downsample[i] and at.frames > 1:
            half = (at.frames - 1) // 2
            later = replace(at, frames=half, calls=calls - 1)
            layers.append(later.convolution((3, 1, 1), dim_out, dim_out, stride=(2, 1, 1)))
            at = replace(at, frames=half + 1)
    layers += at.middle(dims[-1])
    layers.append(at.convolution((3, 3, 3), dims[-1], 2 * config.z_dim))
    layers.append(at.convolution((1, 1, 1), 2 * config.z_dim, 2 * config.z_dim))
    return layers, moved


def work(config: VAEConfig, part: str, width: int, height: int, num_frames: int, itemsize: int = 2) -> Work:
    """Returns the work of decoding or encoding a clip.

    Args:
        config: the shape of the VAE.
        part: ``decode`` or ``encode``.
        width, height, num_frames: the size of the clip in pixels.
        itemsize: bytes of an activation.
    """
    frames = 1 if num_frames == 1 else check_frames(num_frames, config.temporal_stride)
    at = _Frames(frames, height // config.spatial_stride, width // config.spatial_stride, frames)
    layers, shortcuts = _decoder(config, at) if part == "decode" else _encoder(config, at, num_frames)
    base = config.decoder_base_dim if part == "decode" else config.base_dim
    result = _attention(at, base * config.dim_mult[-1], itemsize)
    for layer in layers:
        result += layer.work(itemsize)
    moved = float(itemsize * shortcuts) if config.residual else 0.0
    return result + Work(fused=moved, separate=moved)


def _attention(at: _Frames, channels: int, itemsize: int) -> Work:
    """Returns the work of the attention over each latent frame, with its norm, projections and sum."""
    pixels = at.height * at.width
    flops, projections = 4 * at.frames * pixels**2 * channels, 8 * at.frames * pixels * channels**2
    matmuls = (Matmul("frame_attention", flops, channels), Matmul("linear", projections, channels))
    row = float(itemsize * at.frames * pixels * channels)
    return Work(matmuls, 10 * row + itemsize * 4 * channels**2, 5 * row, 5 * row)
