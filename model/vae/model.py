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

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.config import VAEConfig
from model.machine.finite import Finite
from model.machine.host import Host
from model.vae.decoder import Decoder
from model.vae.encoder import Encoder
from model.vae.layers import CausalConv3d, State
from model.vae.tiles import Region, VAEPlan

#: The plan without tiles: the whole frame, and one latent frame at a time.
WHOLE = VAEPlan()


class FrameSource(Protocol):
    """Frames that can be asked for a part, and need not exist as a whole."""

    #: The shape of the whole video, ``(B, 3, F, H, W)``.
    shape: Sequence[int]

    def crop(self, start: int, stop: int, region: Region, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns frames ``start .. stop - 1`` over ``region``, ``[B, F, h, w, 3]`` in -1..1."""
        ...


class _TensorFrames:
    """The frames of a video ``[B, 3, F, H, W]`` that is in memory."""

    def __init__(self, video: Tensor):
        self.video, self.shape = video, video.shape

    def crop(self, start: int, stop: int, region: Region, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns frames ``start .. stop - 1`` over ``region``, ``[B, F, h, w, 3]`` in -1..1."""
        rows, columns = (slice(span.start, span.stop) for span in region)
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
        """Puts the weights, in place, into the order that convolutions read, channels last, and returns the model."""
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

    def encode(self, video: Tensor | FrameSource, plan: VAEPlan = WHOLE) -> Tensor:
        """Encodes a video to latents: the mode of their distribution, normalised per channel.

        Args:
            video: ``[B, 3, F, H, W]`` in -1..1, with ``F = 1 + n * temporal_stride`` frames and multiples of the
                spatial stride as H and W.
            plan: the tiles.

        Returns:
            ``[B, z, 1 + n, h, w]`` in the encoder's dtype.

        Raises:
            ValueError: the shape of ``video`` does not fit.
            NotFiniteError: it holds NaN or infinity, or the latents do.
        """
        num_frames, stride = video.shape[2], self.config.temporal_stride
        if (num_frames - 1) % stride:
            raise ValueError(f"video: expected 1 + {stride}n frames, got {num_frames}")
        return next(self.encode_stream([video], plan))

    def decode(self, latents: Tensor, plan: VAEPlan = WHOLE) -> Tensor:
        """Decodes latents to a video that is in memory as a whole; :meth:`decode_stream` gives it in pieces.

        Args:
            latents: ``[B, z, T, h, w]``.
            plan: the tiles.

        Returns:
            ``[B, 3, F, H, W]`` in the decoder's dtype, clamped to -1..1, with ``F = 1 + (T - 1) * temporal_stride``;
            in host memory with a plan that parks.

        Raises:
            ValueError: the shape of ``latents`` does not fit.
            NotFiniteError: they hold NaN or infinity, or the features before the pixels do.
        """
        return next(self.decode_stream([latents], plan))

    def encode_stream(
        self, pieces: Iterable[Tensor | FrameSource], plan: VAEPlan = WHOLE, *, host: Host | None = None
    ) -> Iterator[Tensor]:
        """Encodes a video piece by piece: yields latents as soon as their frames are there.

        Args:
            pieces: parts of a video ``[B, 3, F, H, W]`` in -1..1; the first has ``1 + n * temporal_stride`` frames,
                every other ``n * temporal_stride``.
            plan: the tiles that each piece is worked through in.
            host: the memory that keeps what waits; by default as the plan says.

        Yields:
            ``[B, z, t, h, w]`` for each piece, in the encoder's dtype.

        Raises:
            ValueError: the shape of a piece does not fit.
            NotFiniteError: a piece holds NaN or infinity, or what is made of it does.
        """
        stride = self.config.temporal_stride
        host = Host(self.device, plan.park) if host is None else host
        stream: _Encoding | None = None
        for piece, is_last in _marked(pieces):
            source = _TensorFrames(piece) if isinstance(piece, Tensor) else piece
            self._check_video(source.shape, first=stream is None)
            size = tuple(n // self.config.spatial_stride for n in source.shape[3:])
            # Frames at which a latent frame begins, and the end.
            bounds = [0, *range(1 if stream is None else stride, source.shape[2] + 1, stride)]
            if stream is None:
                stream = _Encoding(self, plan, host, size)
            elif size != stream.size:
                raise ValueError(f"video: expected {stream.size} latent pixels as before, got {size}")
            parts = [source]
            del source, piece
            yield stream.run(parts.pop(), bounds, is_last)

    def decode_stream(
        self, pieces: Iterable[Tensor], plan: VAEPlan = WHOLE, *, host: Host | None = None
    ) -> Iterator[Tensor]:
        """Decodes latents piece by piece: yields the frames of each piece as soon as it is there.

        Args:
            pieces: parts of latents ``[B, z, T, h, w]``, with any number of latent frames each.
            plan: the tiles that each piece is worked through in.
            host: the memory that keeps what waits; by default as the plan says.

        Yields:
            ``[B, 3, f, H, W]`` for each piece, in the decoder's dtype, clamped to -1..1, with the channels last in
            memory.

        Raises:
            ValueError: the shape of a piece does not fit.
            NotFiniteError: a piece holds NaN or infinity, or what is made of it does.
        """
        for frames in self._decode(pieces, plan, host, self.decode_dtype):
            yield frames.permute(0, 4, 1, 2, 3)

    def decode_frames(
        self, pieces: Iterable[Tensor], plan: VAEPlan = WHOLE, *, host: Host | None = None
    ) -> Iterator[Tensor]:
        """Decodes as :meth:`decode_stream` does, to uint8 frames ``[B, f, H, W, 3]``, which the last layer writes."""
        return self._decode(pieces, plan, host, torch.uint8)

    def _decode(
        self, pieces: Iterable[Tensor], plan: VAEPlan, host: Host | None, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        host = Host(self.device, plan.park) if host is None else host
        stream: _Decoding | None = None
        for latents, is_last in _marked(pieces):
            if latents.ndim != 5 or latents.shape[1] != self.config.z_dim or 0 in latents.shape:
                raise ValueError(f"latents: expected [B, {self.config.z_dim}, T, h, w], got {tuple(latents.shape)}")
            size = tuple(latents.shape[3:])
            if stream is None:
                stream = _Decoding(self, plan, host, size)
            elif size != stream.size:
                raise ValueError(f"latents: expected {stream.size} pixels as before, got {size}")
            # Neither the piece nor its frames have a name here: only the caller decides how long they live.
            piece = [latents]
            del latents
            yield stream.frames(piece.pop(), dtype, is_last)

    def statistics(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the latents' channels, ``[z]`` each."""
        config = self.config
        mean, std = (torch.tensor(v, device=device, dtype=dtype) for v in (config.latents_mean, config.latents_std))
        return mean, std

    def _check_video(self, shape: Sequence[int], first: bool) -> None:
        stride, temporal = self.config.spatial_stride, self.config.temporal_stride
        if len(shape) != 5 or shape[1] != 3 or 0 in shape:
            raise ValueError(f"video: expected [B, 3, F, H, W], got {tuple(shape)}")
        frames, height, width = shape[2:]
        if height % stride or width % stride:
            raise ValueError(f"video: height and width must be multiples of {stride}, got {height} x {width}")
        if (frames - first) % temporal:
            wanted = f"1 + {temporal}n" if first else f"a multiple of {temporal}"
            raise ValueError(f"video: expected {wanted} frames in this piece, got {frames}")


def _marked(pieces: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yields each piece and whether it is known to be the last, which no piece of a generator is; keeps none."""
    count = len(pieces) if isinstance(pieces, Sequence) else None
    iterator, box, number = iter(pieces), [], 0
    while True:
        try:
            box.append(next(iterator))
        except StopIteration:
            return
        number += 1
        yield box.pop(), number == count


class _Decoding:
    """A clip on its way through the decoder."""

    def __init__(self, vae: WanVAE, plan: VAEPlan, host: Host, size: tuple[int, int]):
        self.vae, self.plan, self.host, self.size = vae, plan, host, size
        self.weights: dict[nn.Module, Tensor] = {}
        self.head = State(self.weights)
        self.done = 0  # latent frames
        self.tiles = [vae.decoder.tile(core, plan.frames, State(self.weights)) for core in plan.regions(*size)]

    @torch.no_grad()
    def frames(self, latents: Tensor, dtype: torch.dtype, is_last: bool) -> Tensor:
        """Returns the next latent frames decoded into new frames ``[B, F, H, W, 3]``, as :meth:`run` decodes them."""
        config, count = self.vae.config, latents.shape[2]
        rate, (height, width) = config.temporal_stride, (config.spatial_stride * n for n in self.size)
        number = count * rate - (rate - 1 if self.done == 0 else 0)
        frames = self.host.empty((latents.shape[0], number, height, width, 3), dtype)
        self.run(latents, frames, is_last)
        return frames

    @torch.no_grad()
    def run(self, latents: Tensor, frames: Tensor, is_last: bool) -> int:
        """Decodes the next latent frames to the front of ``frames`` and returns how many frames these are.

        Args:
            latents: the next latent frames, ``[B, z, t, h, w]``.
            frames: ``[B, F, H, W, 3]``, uint8 or floating, to be filled.
            is_last: whether the clip ends here, so that nothing is kept.
        """
        check_latents("latents", latents, self.done)
        count = latents.shape[2]
        chunk, written = self.plan.chunk or count, 0
        for start in range(0, count, chunk):
            part = latents[:, :, start : start + chunk]
            written += self._chunk(part, frames[:, written:], is_last and start + chunk >= count)
        for tile in self.tiles:
            tile.finite.check()
        return written

    def _chunk(self, latents: Tensor, frames: Tensor, is_last: bool) -> int:
        """Decodes all tiles of some latent frames to the front of ``frames``; returns how many frames these are."""
        vae, host = self.vae, self.host
        # The clip's first latent frame goes alone: it becomes one frame, and every other as many as the stride.
        alone = int(self.done == 0)
        steps = [*[1] * alone, *_shares(latents.shape[2] - alone, self.plan.frames)]
        counts = [step * vae.config.temporal_stride for step in steps]
        counts[:alone] = [1] * alone
        features = [
            [host.park(x) for x in vae.decoder.head(self._denormalised(z), self.head)]
            for z in latents.split(steps, dim=2)
        ]
        stride = vae.config.spatial_stride
        for tile in self.tiles:
            tile.state.move(host.fetch)
            rows, columns = (slice(stride * span.start, stride * span.stop) for span in tile.core)
            start = 0
            for parked, count in zip(features, counts, strict=True):
                target = frames[:, start : start + count, rows, columns]
                out = host.near(target)
                vae.decoder.tail([host.fetch(x) for x in vae.decoder.cut(parked, tile)], tile, out)
                if out is not target:
                    target.copy_(out)
                start += count
                del out
            if is_last:
                tile.state.clear()
            else:
                tile.state.move(host.park)
        self.done += latents.shape[2]
        return sum(counts)

    def _denormalised(self, latents: Tensor) -> Tensor:
        """Returns latents ``[B, z, T, h, w]`` of any dtype as conv_in reads them: ``[B, T, h, w, z]``, written once."""
        vae = self.vae
        dtype, device = vae.decode_dtype, vae.device
        batch, channels, *rest = latents.shape
        mean, std = vae.statistics(device, dtype)
        z = torch.empty((batch, *rest, channels), dtype=dtype, device=device)
        torch.addcmul(mean, latents.to(device, dtype).permute(0, 2, 3, 4, 1), std, out=z)
        whole = Region.whole(*self.size)
        return vae.post_quant_conv(z, whole, whole, self.head)


class _Encoding:
    """A clip on its way through the encoder."""

    def __init__(self, vae: WanVAE, plan: VAEPlan, host: Host, size: tuple[int, int]):
        self.vae, self.plan, self.host, self.size = vae, plan, host, size
        self.weights: dict[nn.Module, Tensor] = {}
        self.body = State(self.weights)
        self.done = 0  # latent frames
        self.tiles = [vae.encoder.tile(core, plan.frames, State(self.weights)) for core in plan.regions(*size)]

    @torch.no_grad()
    def run(self, source: FrameSource, bounds: Sequence[int], is_last: bool) -> Tensor:
        """Encodes the frames between ``bounds``, of which each two enclose one latent frame.

        Returns:
            ``[B, z, t, h, w]``. If ``is_last``, the clip ends here and nothing is kept.
        """
        step = self.plan.chunk or len(bounds)
        starts = range(0, len(bounds) - 1, step)
        parts = [self._chunk(source, bounds[i : i + step + 1], is_last and i == starts[-1]) for i in starts]
        return torch.cat(parts, dim=2)

    def _chunk(self, source: FrameSource, bounds: Sequence[int], is_last: bool) -> Tensor:
        vae, host, plan = self.vae, self.host, self.plan
        patch, count = vae.config.patch_size, len(bounds) - 1
        shape = (source.shape[0], count, *self.size, vae.encoder.feature_channels)
        features = host.empty(shape, vae.encode_dtype)
        # Pixels of few latent frames at a time, and the clip's first frame alone.
        alone = int(self.done == 0)
        groups = [*[1] * alone, *_shares(count - alone, max(plan.frames // vae.config.temporal_stride, 1))]
        for tile in self.tiles:
            tile.state.move(host.fetch)
            rows, columns = (slice(span.start, span.stop) for span in tile.core)
            start = 0
            for number in groups:
                region = tile.pixels.scaled(patch)
                x = source.crop(bounds[start], bounds[start + number], region, vae.device, vae.encode_dtype)
                x = _folded(x, patch) if patch > 1 else x
                target = features[:, start : start + number, rows, columns]
                out = host.near(target)
                written = vae.encoder.legs(x, tile, out)
                assert written == number
                if out is not target:
                    target.copy_(out)
                start += number
                del x, out
            if is_last:
                tile.state.clear()
            else:
                tile.state.move(host.park)
        result = torch.cat([self._latents(host.fetch(part)) for part in features.split(plan.frames, dim=1)], dim=2)
        check_latents("the VAE's encoder", result, self.done)
        self.done += count
        return result

    def _latents(self, features: Tensor) -> Tensor:
        vae, whole = self.vae, Region.whole(*self.size)
        moments = vae.encoder.body(features, self.body)
        mode = vae.quant_conv(moments, whole, whole, self.body)[..., : vae.config.z_dim]
        mean, std = vae.statistics(mode.device, mode.dtype)
        return ((mode - mean) / std).permute(0, 4, 1, 2, 3).contiguous()


def _shares(count: int, most: int) -> list[int]:
    return [min(most, count - start) for start in range(0, count, most)]


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
