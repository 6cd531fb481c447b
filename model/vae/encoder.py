"""The encoder of the Wan VAE: *legs* that shrink the frames tile by tile, and a *body* on whole latent frames.

legs: conv_in, residual blocks, downsampling, ..., up to the size of the latents
body: residual blocks of the last stage, middle block (its attention is over the whole frame), norm, conv_out
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from model.config import VAEConfig
from model.vae.layers import (
    CausalConv3d,
    Downsample,
    Features,
    MidBlock,
    ResidualBlocks,
    RMSNorm,
    State,
    Tile,
    levels_of,
)
from model.vae.tiles import Region
from swifti2v_kernels import rms_norm_silu


class DownStage(nn.Module):
    """An encoder stage: residual blocks, then downsampling. A stage of Wan2.2 adds its averaged input."""

    def __init__(self, dim_in: int, dim_out: int, num_resnets: int, down: bool, temporal: bool):
        super().__init__()
        self.resnets = ResidualBlocks(dim_in, dim_out, num_resnets)
        self.downsampler = Downsample(dim_out, temporal) if down else None
        self.dim_out, self.rate, self.factor = dim_out, 2 if temporal else 1, 2 if down else 1

    def shortcut(self, x: Tensor) -> Tensor:
        """Returns the stage's input ``[B, T, h, w, C]`` at the size of its output: means over cells and channels.

        Channels are averaged in groups. A clip's first frame stands alone: of the two that would be averaged, the one
        before it is zero.
        """
        batch, frames, height, width, channels = x.shape
        group = channels * self.rate * self.factor**2 // self.dim_out
        if frames % self.rate:
            x = torch.cat((x.new_zeros(batch, 1, height, width, channels), x), dim=1)
        cells = x.unflatten(3, (-1, self.factor)).unflatten(2, (-1, self.factor)).unflatten(1, (-1, self.rate))
        # [B, T', rate, h', rows, w', columns, C] -> [B, T', h', w', (C, rate, rows, columns)]
        cells = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)
        return cells.unflatten(4, (self.dim_out, group)).mean(dim=5)


class Encoder(nn.Module):
    """The half of the VAE that makes moments ``[B, T, h, w, 2z]`` of the latents from frames ``[B, F, H, W, 3]``."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        last = len(config.dim_mult) - 1
        self.residual = config.residual
        self.conv_in = CausalConv3d(config.pixel_channels, dims[0], (3, 3, 3))
        self.down_blocks = nn.ModuleList()
        self.stages: list[DownStage] = []
        for i, (dim_in, dim_out) in enumerate(itertools.pairwise(dims)):
            down, temporal = i != last, i != last and config.temporal_downsample[i]
            stage = DownStage(dim_in, dim_out, config.num_res_blocks, down, temporal)
            self.stages.append(stage)
            # The layers of all stages lie in one list in Wan2.1 (diffusers' names).
            layers = [*stage.resnets, *[stage.downsampler] * down]
            self.down_blocks.extend([stage] if config.residual else layers)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, (3, 3, 3))

    @property
    def steps(self) -> list[tuple[ResidualBlocks, Downsample]]:
        """The layers of the legs: residual blocks and the downsampling after them, from the pixels to the latents."""
        return [(stage.resnets, stage.downsampler) for stage in self.stages[:-1]]

    @property
    def feature_channels(self) -> int:
        """The number of channels of the features that the legs leave for the body."""
        return self.stages[-1].resnets[0].conv1.in_channels

    def tile(self, core: Region, frames: int, state: State) -> Tile:
        """Returns the tile ``core`` of the latents, with the regions that each stage computes for it."""
        levels = levels_of(self.steps, core)
        return Tile(core, self.conv_in.needs(levels[0].read), levels, frames, state)

    def legs(self, x: Tensor, tile: Tile, out: Tensor) -> int:
        """Writes features of some frames, at the size of the latents, to the front of ``out``; returns how many.

        Args:
            x: frames ``[B, T, h, w, 3 or 12]`` over ``tile.source``; the clip's first frame comes alone.
            tile: the tile and its state, as returned by :meth:`tile`.
            out: features ``[B, T', h', w', C]`` of the tile, to be filled.
        """
        read = tile.levels[0].read
        norm = self.stages[0].resnets[0].norm1.weight
        written = 0
        for part in x.split(tile.frames, dim=1):
            features = Features(*self.conv_in(part, tile.source, read, tile.state, norm_weight=norm), read)
            written += self._shrink(0, features, tile, out[:, written:])
        return written

    def _shrink(self, step: int, features: Features, tile: Tile, out: Tensor) -> int:
        if step == len(tile.levels):
            x = features.take("x")
            out[:, : x.shape[1]].copy_(x)
            return x.shape[1]
        stage, following, level, state = self.stages[step], self.stages[step + 1], tile.levels[step], tile.state
        down, want = stage.downsampler, level.result
        if down.time_conv is not None and not self._paired(features, down, state):
            return 0
        options = {}
        if self.residual:
            shortcut = stage.shortcut(want.scaled(2).part_of(features.x, features.region))
            options = {"residual": shortcut, "out": shortcut}
            del shortcut
        if step + 1 < len(tile.levels):
            options["norm_weight"] = following.resnets[0].norm1.weight
        stage.resnets(features, level.middle, state, None, overwrite=True)
        result = down(features.take("x"), level.middle, want, state, **options)
        shrunk = Features(*result, want) if isinstance(result, tuple) else Features(result, None, want)
        del result, options
        return self._shrink(step + 1, shrunk, tile, out)

    @staticmethod
    def _paired(features: Features, down: Downsample, state: State) -> bool:
        """Leaves an even number of frames, as temporal downsampling needs it; returns whether any are left.

        An odd frame waits in ``state`` for the next ones. The clip's first frame passes alone.
        """
        if down not in state.started:
            return True
        x, normed = features.take("x"), features.take("normed")
        if down in state.waiting:
            x, normed = (torch.cat(pair, dim=1) for pair in zip(state.waiting.pop(down), (x, normed), strict=True))
        even = x.shape[1] // 2 * 2
        if even < x.shape[1]:
            state.waiting[down] = [part[:, even:].clone() for part in (x, normed)]
        features.x, features.normed = x[:, :even], normed[:, :even]
        return even > 0

    def body(self, x: Tensor, state: State) -> Tensor:
        """Computes moments ``[B, T, h, w, 2z]`` from whole frames of the features that the legs have left."""
        whole = Region.whole(*x.shape[2:4])
        resnets = self.stages[-1].resnets
        # Wan2.2 adds the last stage's input to its output, whose numbers of channels are equal.
        shortcut = x if self.residual else None
        features = Features(x, rms_norm_silu(x, resnets[0].norm1.weight), whole)
        del x
        first = self.mid_block.resnets[0].norm1
        resnets(features, whole, state, None if self.residual else first, overwrite=shortcut is None)
        if shortcut is not None:
            features.x = features.take("x") + self.stages[-1].shortcut(shortcut)
            features.normed = rms_norm_silu(features.x, first.weight)
            del shortcut
        self.mid_block(features, state, self.norm_out, keep=False)
        return self.conv_out(features.take("normed"), whole, whole, state)
