"""The decoder of the Wan VAE: a *head* on whole latent frames, and a *tail* that enlarges them tile by tile.

    head: conv_in, middle block (its attention is over the whole frame), residual blocks of the first stage
    tail: upsampling, residual blocks, ..., norm, last convolution straight into the frames

The tail goes depth first: a few frames run up to the pixels before the next ones are enlarged, so that never more than
these are alive at the higher resolutions.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from model.config import VAEConfig
from model.vae.layers import CausalConv3d, Features, MidBlock, ResidualBlocks, RMSNorm, State, Tile, Upsample, levels_of
from model.vae.tiles import Region, conv_padding
from swifti2v_kernels import frames_out


class UpStage(nn.Module):
    """A decoder stage: residual blocks, then upsampling, to half the channels in Wan2.1; diffusers' names of either.

    A stage of Wan2.2 (``residual``) adds its repeated input (:meth:`shortcut`).
    """

    def __init__(self, dim_in: int, dim_out: int, num_resnets: int, *, up: bool, temporal: bool, residual: bool):
        super().__init__()
        self.resnets = ResidualBlocks(dim_in, dim_out, num_resnets)
        self.dim_out, self.rate, self.residual = dim_out, 2 if temporal else 1, residual
        upsampling = [Upsample(dim_out, dim_out if residual else dim_out // 2, temporal)] if up else []
        if residual:
            self.upsampler = upsampling[0] if up else None
        else:
            self.upsamplers = nn.ModuleList(upsampling)

    @property
    def up(self) -> Upsample:
        """The upsampling; the last stage has none."""
        return self.upsampler if self.residual else self.upsamplers[0]

    def shortcut(self, x: Tensor, have: Region, want: Region, start: int, count: int) -> Tensor:
        """Returns the stage's input at the size of its output, over the region ``want``.

        ``x`` holds the input ``[B, T, h, w, C]`` over ``have``. The result is ``[B, count, h', w', C']``: frames from
        ``start`` on of the ``T * rate`` that the input becomes. Output channel c of the pixel (row, column) in the cell
        of an input pixel, and of the frame among the ``rate`` that it becomes, is input channel
        ``((c * rate + frame) * 4 + row * 2 + column) // copies``.
        """
        cells = want.halved()
        x = cells.part_of(x, have).unflatten(4, (self.dim_out, -1))
        copies = 4 * self.rate // x.shape[5]
        top, left = want.rows.start % 2, want.columns.start % 2
        out = x.new_empty(x.shape[0], count, len(want.rows), len(want.columns), self.dim_out)
        for i, row, column in itertools.product(range(count), range(2), range(2)):
            frame, part = divmod(start + i, self.rate)
            down, right = (row - top) % 2, (column - left) % 2  # the first output pixel of this phase
            cell = x[:, frame, (down + top) // 2 :, (right + left) // 2 :, :, (part * 4 + row * 2 + column) // copies]
            target = out[:, i, down::2, right::2]
            target.copy_(cell[:, : target.shape[1], : target.shape[2]])
        return out


class Decoder(nn.Module):
    """The half of the VAE that makes frames ``[B, F, H, W, 3]`` of latents ``[B, T, h, w, z]``."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.decoder_base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        temporal_upsample = (*reversed(config.temporal_downsample), False)
        last = len(config.dim_mult) - 1
        self.patch_size = config.patch_size
        self.conv_in = CausalConv3d(config.z_dim, dims[0], (3, 3, 3))
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(itertools.pairwise(dims)):
            # In Wan2.1 the upsampling before has halved the channels already.
            width = dim_in // 2 if i and not config.residual else dim_in
            kind = {"up": i != last, "temporal": temporal_upsample[i], "residual": config.residual}
            self.up_blocks.append(UpStage(width, dim_out, config.num_res_blocks + 1, **kind))
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.pixel_channels, (3, 3, 3))
        self.residual = config.residual

    @property
    def steps(self) -> list[tuple[Upsample, ResidualBlocks]]:
        """The layers of the tail: upsampling and the residual blocks after it, from the latents' size to the pixels."""
        return [(before.up, stage.resnets) for before, stage in itertools.pairwise(self.up_blocks)]

    @property
    def feature_channels(self) -> int:
        """The number of channels of all features that the head leaves: with shortcuts the first stage's input too."""
        return (1 + self.residual) * self.conv_in.out_channels

    def head(self, z: Tensor, state: State) -> list[Tensor]:
        """Computes the tail's input, one or two tensors ``[B, T, h, w, C]``, from whole latent frames."""
        stage, whole = self.up_blocks[0], Region.whole(*z.shape[2:4])
        x, normed = self.conv_in(z, whole, whole, state, norm_weight=self.mid_block.resnets[0].norm1.weight)
        features = Features(x, normed, whole)
        del x, normed
        self.mid_block(features, state, stage.resnets[0].norm1, keep=True)
        shortcut = [features.x] if self.residual else []
        stage.resnets(features, whole, state, None, overwrite=not shortcut)
        return [features.take("x"), *shortcut]

    def tile(self, core: Region, frames: int, state: State) -> Tile:
        """Returns the tile ``core`` of the latents, with the regions that each step of the tail works on for it."""
        levels = levels_of(self.steps, self.conv_out.needs(self._features(core)))
        return Tile(core, levels[0].read, levels, frames, state)

    def tail(self, inputs: list[Tensor], tile: Tile, out: Tensor) -> None:
        """Writes the frames of one tile.

        Args:
            inputs: the part over ``tile.source`` of the next features, which :meth:`head` has left.
            tile: the tile and its state, as returned by :meth:`tile`.
            out: frames ``[B, F, H, W, 3]`` of the tile, uint8 or floating, to be filled.
        """
        self._enlarge(0, inputs, [tile.source] * len(inputs), tile, out)

    def _enlarge(self, step: int, inputs: list[Tensor], have: list[Region], tile: Tile, out: Tensor) -> int:
        """Runs the tail from stage ``step`` on and returns how many frames it has written.

        ``inputs`` are the output of that stage and, where the stage has a shortcut, its input; ``have`` are their
        regions.
        """
        stage, following, level, state = self.up_blocks[step], self.up_blocks[step + 1], tile.levels[step], tile.state
        last, temporal = step + 2 == len(self.up_blocks), stage.up.time_conv is not None
        pieces = max(tile.frames // 2, 1) if temporal else tile.frames
        written = 0
        for x, *given in zip(*(part.split(pieces, dim=1) for part in inputs), strict=True):
            # Of the two frames that a shortcut makes of the clip's first one, the second counts.
            skipped = int(temporal and stage.up not in state.started)
            source = level.read if temporal else have[0]
            doubled = stage.up.double_frames(x, have[0], source, state) if temporal else x
            for start in range(0, doubled.shape[1], tile.frames):
                part = doubled[:, start : start + tile.frames]
                options = {"norm_weight": following.resnets[0].norm1.weight}
                if given:
                    first = start + skipped
                    shortcut = stage.shortcut(given[0], have[1], level.middle, first, part.shape[1])
                    options |= {"residual": shortcut, "out": shortcut}
                    del shortcut
                features = Features(*stage.up.enlarge(part, source, level.middle, state, **options), level.middle)
                del part, options
                inner = [features.x] if given and not last else []
                norm = self.norm_out if last else None
                following.resnets(features, level.result, state, norm, overwrite=not inner, keep=not last)
                if last:
                    written += self._store(features, tile, out[:, written:])
                    continue
                inner.insert(0, features.take("x"))
                regions = [level.result, level.middle][: len(inner)]
                written += self._enlarge(step + 1, inner, regions, tile, out[:, written:])
                del inner
        return written

    def _store(self, features: Features, tile: Tile, out: Tensor) -> int:
        x = features.take("normed")
        tile.finite.note(x)
        padding = conv_padding(features.region, self._features(tile.core))
        frames_out(
            x, self.conv_out.weight, self.conv_out.bias, out[:, : x.shape[1]],
            past=tile.state.past.get(self.conv_out), padding=padding, patch_size=self.patch_size,
        )  # fmt: skip
        tile.state.remember(self.conv_out, x, self.conv_out.kernel_size[0] - 1)
        return x.shape[1]

    def _features(self, core: Region) -> Region:
        """Returns the region of the features before the last convolution that a tile of the latents becomes."""
        return core.scaled(2 ** (len(self.up_blocks) - 1))
