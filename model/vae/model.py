"""The Wan video autoencoder, versions 2.1 (4x8x8, 16 channels) and 2.2 (4x16x16, 48 channels), streamed and tiled.

Both are causal: an output depends on its own and earlier frames only. Every temporal convolution therefore keeps the
last frames of its input in a *state*, and a clip may be pushed through in pieces of any length:

* the encoder takes the first frame and then groups of 4, one latent frame each;
* the decoder takes one latent frame at a time, the first of which gives 1 frame and every other 4.

In space a :class:`model.vae.tiles.VAEPlan` cuts the frame into tiles that read their true surroundings. Neither pieces
nor tiles change the result by more than rounding. Which plan fits in how much memory is found by
``model/memory/vae_plan.py``.

Encoder and decoder share no weights and may have different dtypes: decoding in bfloat16 is practically lossless,
encoding the conditioning image in it is not. Module names are those of diffusers' ``AutoencoderKLWan``; see
``model/weights/load.py`` for the original key names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.config import VAEConfig
from model.machine.finite import Finite
from model.machine.host import Host
from model.vae.decoder import Decoder
from model.vae.encoder import Encoder
from model.vae.layers import CausalConv3d, State, Tile
from model.vae.tiles import Region, VAEPlan

#: The plan without tiles: the whole frame, and one latent frame at a time.
WHOLE = VAEPlan()


class Frames:
    """The frames of a video ``[B, 3, F, H, W]``, which are asked for by parts; a subclass makes them as they are read.

    ``shape`` is that of the whole video, which need not exist.
    """

    def __init__(self, video: Tensor):
        self.video, self.shape = video, tuple(video.shape)

    def crop(self, start: int, stop: int, region: Region, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns frames ``start .. stop - 1`` over ``region``, ``[B, F, h, w, 3]`` in -1..1."""
        rows, columns = region.slices
        part = self.video[:, :, start:stop, rows, columns].permute(0, 2, 3, 4, 1)
        return torch.empty(part.shape, device=device, dtype=dtype).copy_(part)


class WanVAE(nn.Module):
    """Encoder and decoder between video ``[B, 3, F, H, W]`` in -1..1 and normalised latents ``[B, z, T, h, w]``.

    The weights are those of :func:`model.load_vae`. A clip whose frames are too large for the memory is cut into tiles
    by a :class:`model.VAEPlan`; :func:`model.plan_vae` finds one that fits.

    Examples:
        >>> from model.config import get_preset
        >>> from model.weights.load import random_weights
        >>> vae = random_weights(WanVAE, get_preset("tiny").vae, seed=0)
        >>> latents = vae.encode(torch.zeros(1, 3, 5, 16, 16))
        >>> latents.shape
        torch.Size([1, 16, 2, 2, 2])
        >>> vae.decode(latents, VAEPlan(rows=2)).shape
        torch.Size([1, 3, 5, 16, 16])
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.order_weights()

    @property
    def encode_dtype(self) -> torch.dtype:
        """The dtype of the encoder's weights."""
        return self.quant_conv.weight.dtype

    @property
    def decode_dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights."""
        return self.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.post_quant_conv.weight.device

    def to_dtypes(self, *, encode: torch.dtype | None = None, decode: torch.dtype | None = None) -> WanVAE:
        """Casts the weights of encoder and decoder in place, each unless its dtype is None, and returns the model."""
        if encode is not None:
            self.encoder.to(encode)
            self.quant_conv.to(encode)
        if decode is not None:
            self.decoder.to(decode)
            self.post_quant_conv.to(decode)
        return self

    def order_weights(self) -> WanVAE:
        """Puts the weights, in place, into the order that convolutions read, channels last, and returns the model.

        A new model has it; loading a state with ``assign=True`` and some of what moves a module lose it.
        """
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for p in self.parameters():
            p.data = p.data.contiguous(memory_format=formats.get(p.ndim, torch.contiguous_format))
        return self

    def weights_of(self, part: str) -> list[Tensor]:
        """Returns the weights that ``part``, which is ``decode`` or ``encode``, needs."""
        half = (self.decoder, self.post_quant_conv) if part == "decode" else (self.encoder, self.quant_conv)
        return [p for module in half for p in module.parameters()]

    def drop_encoder(self) -> None:
        """Releases the encoder's weights; from then on the model can only decode."""
        self.encoder = self.quant_conv = None

    def encode(self, video: Tensor | Frames, plan: VAEPlan = WHOLE) -> Tensor:
        """Encodes a video that is there as a whole, ``[B, 3, 1 + n * temporal_stride, H, W]``.

        Arguments, result and errors are those of :meth:`encode_stream`.
        """
        return next(self.encode_stream([video], plan))

    def decode(self, latents: Tensor, plan: VAEPlan = WHOLE) -> Tensor:
        """Decodes latents to a video that is in memory as a whole, host memory with a plan that parks.

        Arguments, result and errors are those of :meth:`decode_stream`.
        """
        return next(self.decode_stream([latents], plan))

    def encode_stream(
        self, pieces: Iterable[Tensor | Frames], plan: VAEPlan = WHOLE, *, host: Host | None = None
    ) -> Iterator[Tensor]:
        """Encodes a video piece by piece: yields latents as soon as their frames are there.

        Args:
            pieces: parts of a video ``[B, 3, F, H, W]`` in -1..1, with multiples of the spatial stride as H and W; the
                first has ``1 + n * temporal_stride`` frames, every other ``n * temporal_stride``.
            plan: the tiles that each piece is worked through in.
            host: the memory that keeps what waits; by default as the plan says.

        Yields:
            ``[B, z, t, h, w]`` for each piece, in the encoder's dtype: the mode of the latents' distribution,
            normalised per channel.

        Raises:
            ValueError: the shape of a piece does not fit.
            NotFiniteError: a piece holds NaN or infinity, or what is made of it does.
        """
        return _Encoding(self, self.encoder, plan, host).over(pieces)

    def decode_stream(
        self, pieces: Iterable[Tensor], plan: VAEPlan = WHOLE, *, host: Host | None = None
    ) -> Iterator[Tensor]:
        """Decodes latents piece by piece: yields the frames of each piece as soon as it is there.

        Args:
            pieces: parts of latents ``[B, z, T, h, w]``, with any number of latent frames each.
            plan, host: as for :meth:`encode_stream`.

        Yields:
            ``[B, 3, f, H, W]`` for each piece, in the decoder's dtype, clamped to -1..1, with the channels last in
            memory: ``temporal_stride`` frames for each latent frame, but one for the clip's first.

        Raises:
            ValueError, NotFiniteError: as for :meth:`encode_stream`; or features before the pixels are not finite.
        """
        frames = _Decoding(self, self.decoder, plan, host, self.decode_dtype).over(pieces)
        return (piece.permute(0, 4, 1, 2, 3) for piece in frames)

    def decode_frames(self, pieces: Iterable[Tensor], plan: VAEPlan = WHOLE) -> Iterator[Tensor]:
        """Decodes as :meth:`decode_stream` does, to uint8 frames ``[B, f, H, W, 3]``, which the last layer writes."""
        return _Decoding(self, self.decoder, plan, None, torch.uint8).over(pieces)

    def statistics(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the latents' channels, ``[z]`` each."""
        config = self.config
        mean, std = (torch.tensor(v, device=device, dtype=dtype) for v in (config.latents_mean, config.latents_std))
        return mean, std


class _Stream:
    """A clip on its way through ``half`` of the VAE: on whole frames next to the latents, else on tiles.

    Subclasses have ``run``, which takes the next piece and whether the clip ends with it, so that nothing is kept.
    """

    def __init__(
        self, vae: WanVAE, half: Encoder | Decoder, plan: VAEPlan, host: Host | None, dtype: torch.dtype | None = None
    ):
        self.vae, self.half, self.plan, self.dtype = vae, half, plan, dtype
        self.host = Host(vae.device, plan.park) if host is None else host
        self.weights: dict[nn.Module, Tensor] = {}
        self.whole = State(self.weights)
        self.size: tuple[int, ...] | None = None
        self.tiles: list[Tile] = []
        self.done = 0  # latent frames

    def over(self, pieces: Iterable[Any]) -> Iterator[Tensor]:
        """Yields what becomes of each piece."""
        # The end of a generator is not known beforehand.
        count, number = len(pieces) if isinstance(pieces, Sequence) else None, 0
        for piece in pieces:
            number += 1  # noqa: SIM113 (enumerate keeps what it has yielded)
            # Neither the piece nor its result has a name here: only the caller decides how long they live.
            box = [piece]
            del piece
            yield self.run(box.pop(), number == count)

    def begin(self, size: tuple[int, ...], expected: str) -> None:
        """Makes the tiles of latent frames of this size; later pieces must have the same."""
        if self.size is None:
            self.size = size
            self.tiles = [self.half.tile(c, self.plan.frames, State(self.weights)) for c in self.plan.regions(*size)]
        elif size != self.size:
            raise ValueError(f"{expected.format(self.size)} as before, got {size}")

    def working(self, is_last: bool) -> Iterator[Tile]:
        """Yields the tiles, each with its state on the device until the next one is asked for."""
        for tile in self.tiles:
            tile.state.move(self.host.fetch)
            yield tile
            if is_last:
                tile.state.clear()
            else:
                tile.state.move(self.host.park)

    def fill(self, target: Tensor, run: Callable[[Any, Tile, Tensor], Any], given: Any, tile: Tile) -> None:
        """Runs a tile's layers on what they are given; the result goes to ``target``, wherever that is."""
        out = self.host.near(target)
        run(given, tile, out)
        if out is not target:
            target.copy_(out)

    def shares(self, count: int, most: int, alone: bool = False) -> list[tuple[slice, slice]]:
        """Returns the next ``count`` latent frames in shares of ``most``, and the frames that these are or become.

        The clip's first latent frame is one frame and every other as many as the stride. ``alone``: the first one is a
        share by itself.
        """
        rate, begins = self.vae.config.temporal_stride, self.done == 0
        ends = sorted({0, *range(int(alone and begins), count, most), count})
        marks = [max(rate * end - (rate - 1) * begins, 0) for end in ends]
        return list(zip(map(slice, ends, ends[1:]), map(slice, marks, marks[1:]), strict=True))


class _Decoding(_Stream):
    """A clip on its way through the decoder, to frames of ``dtype``."""

    @torch.no_grad()
    def run(self, latents: Tensor, is_last: bool) -> Tensor:
        """Returns the next latent frames ``[B, z, t, h, w]`` decoded into new frames ``[B, F, H, W, 3]``."""
        config = self.vae.config
        if latents.ndim != 5 or latents.shape[1] != config.z_dim or 0 in latents.shape:
            raise ValueError(f"latents: expected [B, {config.z_dim}, T, h, w], got {tuple(latents.shape)}")
        self.begin(tuple(latents.shape[3:]), "latents: expected {} pixels")
        count = latents.shape[2]
        chunks = self.shares(count, self.plan.chunk or count)
        height, width = (config.spatial_stride * n for n in self.size)
        frames = self.host.empty((latents.shape[0], chunks[-1][1].stop, height, width, 3), self.dtype)
        check_latents("latents", latents, self.done)
        for part, target in chunks:
            self._chunk(latents[:, :, part], frames[:, target], is_last and part.stop == count)
        for tile in self.tiles:
            tile.finite.check()
        return frames

    def _chunk(self, latents: Tensor, frames: Tensor, is_last: bool) -> None:
        """Decodes all tiles of some latent frames into ``frames``."""
        decoder, host, whole = self.vae.decoder, self.host, Region.whole(*self.size)
        groups = self.shares(latents.shape[2], self.plan.frames, alone=True)
        features = [
            [host.park(x) for x in decoder.head(self._denormalised(latents[:, :, part]), self.whole)]
            for part, _ in groups
        ]
        for tile in self.working(is_last):
            rows, columns = tile.core.scaled(self.vae.config.spatial_stride).slices
            for parked, (_, target) in zip(features, groups, strict=True):
                parts = [tile.source.part_of(x, whole) for x in parked]
                self.fill(frames[:, target, rows, columns], decoder.tail, [host.fetch(x) for x in parts], tile)
        self.done += latents.shape[2]

    def _denormalised(self, latents: Tensor) -> Tensor:
        """Returns latents ``[B, z, T, h, w]`` of any dtype as conv_in reads them: ``[B, T, h, w, z]``, written once."""
        vae = self.vae
        dtype, device = vae.decode_dtype, vae.device
        batch, channels, *rest = latents.shape
        mean, std = vae.statistics(device, dtype)
        z = torch.empty((batch, *rest, channels), dtype=dtype, device=device)
        torch.addcmul(mean, latents.to(device, dtype).permute(0, 2, 3, 4, 1), std, out=z)
        whole = Region.whole(*self.size)
        return vae.post_quant_conv(z, whole, whole, self.whole)


class _Encoding(_Stream):
    """A clip on its way through the encoder."""

    @torch.no_grad()
    def run(self, piece: Tensor | Frames, is_last: bool) -> Tensor:
        """Returns the next frames encoded to ``[B, z, t, h, w]``."""
        source = Frames(piece) if isinstance(piece, Tensor) else piece
        self.begin(self._checked(source.shape), "video: expected {} latent pixels")
        count = -(-source.shape[2] // self.vae.config.temporal_stride)  # the clip's first frame is one by itself
        chunks = self.shares(count, self.plan.chunk or count)
        parts = [self._chunk(source, *chunk, is_last and chunk[0].stop == count) for chunk in chunks]
        return torch.cat(parts, dim=2)

    def _checked(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the latent pixels of frames of this shape, which must be able to come next."""
        stride, temporal, first = self.vae.config.spatial_stride, self.vae.config.temporal_stride, self.done == 0
        if len(shape) != 5 or shape[1] != 3 or 0 in shape:
            raise ValueError(f"video: expected [B, 3, F, H, W], got {tuple(shape)}")
        frames, height, width = shape[2:]
        if height % stride or width % stride:
            raise ValueError(f"video: height and width must be multiples of {stride}, got {height} x {width}")
        if (frames - first) % temporal:
            wanted = f"1 + {temporal}n" if first else f"a multiple of {temporal}"
            raise ValueError(f"video: expected {wanted} frames in this piece, got {frames}")
        return height // stride, width // stride

    def _chunk(self, source: Frames, latent: slice, frames: slice, is_last: bool) -> Tensor:
        """Encodes ``frames`` of the source, the latent frames ``latent`` of the piece."""
        vae, host, plan = self.vae, self.host, self.plan
        patch, count = vae.config.patch_size, latent.stop - latent.start
        shape = (source.shape[0], count, *self.size, vae.encoder.feature_channels)
        features = host.empty(shape, vae.encode_dtype)
        # Pixels of few latent frames at a time.
        groups = self.shares(count, max(plan.frames // vae.config.temporal_stride, 1), alone=True)
        for tile in self.working(is_last):
            rows, columns = tile.core.slices
            for target, read in groups:
                start, stop = frames.start + read.start, frames.start + read.stop
                x = source.crop(start, stop, tile.source.scaled(patch), vae.device, vae.encode_dtype)
                x = _folded(x, patch) if patch > 1 else x
                self.fill(features[:, target, rows, columns], vae.encoder.legs, x, tile)
                del x
        result = torch.cat([self._latents(host.fetch(part)) for part in features.split(plan.frames, dim=1)], dim=2)
        check_latents("the VAE's encoder", result, self.done)
        self.done += count
        return result

    def _latents(self, features: Tensor) -> Tensor:
        vae, whole = self.vae, Region.whole(*self.size)
        moments = vae.encoder.body(features, self.whole)
        mode = vae.quant_conv(moments, whole, whole, self.whole)[..., : vae.config.z_dim]
        mean, std = vae.statistics(mode.device, mode.dtype)
        return ((mode - mean) / std).permute(0, 4, 1, 2, 3).contiguous()


def _folded(x: Tensor, patch: int) -> Tensor:
    """Returns frames ``[B, T, H, W, 3]`` as ``[B, T, h, w, 3 * patch**2]``, by colour, pixel column and pixel row."""
    cells = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, T, h, rows, w, columns, 3]
    return cells.permute(0, 1, 2, 4, 6, 5, 3).flatten(4)


def check_latents(name: str, latents: Tensor, before: int) -> None:
    """Checks that latents ``[B, z, t, h, w]``, of which ``before`` came in earlier pieces, are finite.

    Numbers are read from the device, so this waits for the work before it.

    Raises:
        NotFiniteError: they are not; the message names the latent frame.
    """
    finite = Finite(name)
    for number, frame in enumerate(latents.unbind(2), start=before):
        finite.note(frame, f"in latent frame {number}")
    finite.check()
