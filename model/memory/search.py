"""The candidates of a memory plan, phase by phase, and the choice among them; see ``model/memory/plan.py``.

Phases that share a choice (reference: both VAEs; Stage II and decode: the DiT and the decoder's tiles) are one group,
and groups do not depend on each other, since device and host memory have to be enough for each phase by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.config import VAEConfig
from model.memory.cost.pipeline import resize_work
from model.memory.request import MemoryRequest
from model.memory.stage_choice import DIGITS, StageChoice, StageChoices
from model.memory.vae_choice import VAEPlace, VAEUse
from model.memory.vae_plan import Request, meta_vae

#: The process without any weights: interpreter, torch, CUDA's libraries and context. Assumed.
PROCESS_BYTES = 3_000_000_000
#: The activations of the text encoder, such as float32 scores of 64 heads. Assumed.
TEXT_WORK_BYTES = 500_000_000
_FLOAT = 4

Held = dict[str, int]


@dataclass(frozen=True)
class ReferenceChoice:
    """A way to decode the motion and encode the reference: one beside the other, or one after the other."""

    motion: VAEUse
    encode: VAEUse
    held: Held
    host: int
    key: tuple[float, ...]

    @property
    def device(self) -> int:
        """The bytes on the device at the worst moment."""
        return sum(self.held.values())


@dataclass(frozen=True)
class ClipChoice:
    """A way to run Stage II and the decoder beside it; ``clip`` is the bytes that go from one to the other."""

    stage: StageChoice
    decode: VAEUse
    clip: int

    @property
    def key(self) -> tuple[float, ...]:
        """The numbers by which choices are ordered, the smallest first."""
        spent = round(self.stage.time.total + self.decode.seconds, DIGITS)
        return self.stage.rank, spent, self.stage.streamed, self.decode.park, self.decode.order

    @property
    def device(self) -> int:
        """The bytes on the device while frames are decoded."""
        return self.stage.device + self.decode.peak + self.clip


class Search:
    """The candidates for one request. Its limit on the device is not used here: methods take one as an argument.

    ``host`` is the part of the machine's memory that is left for the process's data.
    """

    def __init__(self, request: MemoryRequest) -> None:
        self.request = r = request
        self.host = math.inf if r.usable_host is None else r.usable_host - PROCESS_BYTES
        self.vae_room = math.inf if r.vae_limit is None else r.vae_limit
        self.one, self.two = StageChoices(r, True), StageChoices(r, False)
        blocks, options = r.plan.num_blocks, {"gpu": r.gpu}
        # On a GPU, small frames are cut into tiles only where waiting tiles are in host memory; a CPU has no other.
        small = options | {"untiled": r.capability is not None}
        masked = r.stage_one.config.in_channels != r.stage_one.config.out_channels
        given = (r.num_frames, blocks) if masked else (1, 1)
        self.condition = VAEPlace(self._request("encode", True, torch.float32), *given, 1, **small)
        self.motion = VAEPlace(self._request("decode", True, r.dtype), r.num_frames, blocks, 1, **small)
        resize = resize_work(r.motion_size, r.size, r.num_frames)
        dtypes = (torch.float32, torch.bfloat16) if r.capability is not None else (torch.float32,)
        self.encode = {
            dtype: VAEPlace(self._request("encode", False, dtype), r.num_frames, 1, blocks, **options, more=resize)
            for dtype in dtypes
        }
        longest, pieces = max(len(window.noisy) for window in r.plan), len(r.plan) + 1
        self.decode = VAEPlace(self._request("decode", False, r.dtype), r.num_frames, pieces, longest, **options)

    def _request(self, half: str, low: bool, dtype: torch.dtype) -> Request:
        r = self.request
        config, size = (r.stage_one_vae, r.motion_size) if low else (r.vae, r.size)
        return Request(config, half, *size, dtype, r.capability, 1, 1)

    def vae_bytes(self, encode_dtype: torch.dtype = torch.float32) -> int:
        """Returns the bytes of all weights of the VAEs, the target's encoder in this dtype."""
        r = self.request
        total = half_bytes(r.vae, "encode", encode_dtype) + half_bytes(r.vae, "decode", r.dtype)
        if r.motion_vae is not None:
            total += half_bytes(r.motion_vae, "encode", torch.float32) + half_bytes(r.motion_vae, "decode", r.dtype)
        return total

    def _latents(self, low: bool) -> int:
        """Returns the bytes of the clip's latents in float32."""
        request = self._request("encode", low, torch.float32)
        return _FLOAT * request.config.z_dim * self.request.plan.num_blocks * math.prod(request.latent_size)

    def _picture(self, low: bool) -> int:
        return 3 * _FLOAT * math.prod(self.request.motion_size if low else self.request.size)

    def text_fits(self, room: float) -> bool:
        """Returns whether the text encoder runs on the device."""
        return self.request.text_encoder_bytes + TEXT_WORK_BYTES <= room

    @property
    def text_host(self) -> int:
        """The bytes in host memory, through which the text encoder is read wherever it runs."""
        return self.request.text_encoder_bytes

    # The condition: all weights of the VAEs, the picture, and the list of latents beside their concatenation.

    def condition_held(self, use: VAEUse) -> Held:
        """Returns the bytes on the device while the condition is encoded, by name."""
        rest = self.vae_bytes() - use.planned.peak.weights
        return vae_held("encoder", use) | {"other weights": rest, "clip": self._condition_clip}

    @property
    def _condition_clip(self) -> int:
        return self._picture(True) + 2 * self._latents(True)

    def best_condition(self, room: float) -> VAEUse | None:
        """Returns the fastest plan of the condition that fits, or None."""
        left = room - self.vae_bytes() + self.condition.weights - self._condition_clip
        return self._first(self.condition, min(left, self.vae_room), self.host)

    @staticmethod
    def _first(place: VAEPlace, room: float, host: float) -> VAEUse | None:
        return place.first(room, host, False) or place.first(room, host, True)

    # The reference: as one stream, or first the motion's frames, which wait in host memory, and then its encoding. With
    # them there are the picture, the motion's latents, and the reference's blocks beside the whole that they become.

    @property
    def _reference_clip(self) -> int:
        return self._picture(False) + self._latents(True) + 2 * self._latents(False)

    @property
    def _motion_frames(self) -> int:
        return 3 * self.request.num_frames * math.prod(self.request.motion_size) * self.request.dtype.itemsize

    def best_reference(self, room: float) -> ReferenceChoice | None:
        """Returns the fastest choice for the reference that fits, in float32 if one does, or None."""
        for dtype, encode in self.encode.items():
            found = self._references(dtype, encode, room)
            if found:
                return min(found, key=lambda choice: choice.key)
        return None

    def _references(self, dtype: torch.dtype, encode: VAEPlace, room: float) -> list[ReferenceChoice]:
        """Returns the fastest choice of every kind."""
        found: list[ReferenceChoice] = []
        for motion in self.motion.whole_frames():
            left = min(room - self._beside_rest(dtype), self.vae_room) - self._motion_idle(motion)
            found += self._beside(dtype, motion, encode.first(left, self.host, False), room)
        host, left = self.host - self._motion_frames, room - self.vae_bytes(dtype) - self._reference_clip
        low = self._first(self.motion, min(left + self.motion.weights, self.vae_room), host)
        found += self._after(dtype, low, encode.first(min(left + encode.weights, self.vae_room), host, True))
        return found

    def _least_reference(self) -> int | None:
        # The last dtype is the smallest.
        dtype, encode = list(self.encode.items())[-1]
        host = self.host - self._motion_frames
        low, high = self._least(self.motion, host), self._least(encode, host, (True,))
        sizes = [choice.device for choice in self._after(dtype, low, high)]
        for motion in self.motion.whole_frames():
            idle, rest = self._motion_idle(motion), self._beside_rest(dtype)
            below = min([*(size - rest for size in sizes), self.vae_room + 1]) - idle
            high = encode.smallest(self.host, (False,), below)
            sizes += [choice.device for choice in self._beside(dtype, motion, high, math.inf)]
        return min(sizes, default=None)

    def _least(self, place: VAEPlace, host: float, kinds: tuple[bool, ...] = (True, False)) -> VAEUse | None:
        return place.smallest(host, kinds, self.vae_room + 1)

    def _beside_rest(self, dtype: torch.dtype) -> int:
        """Returns the bytes beside what the two plans take: weights of other halves, and tensors of the clip."""
        return self._reference_clip + self.vae_bytes(dtype) - self.motion.weights - self.encode[dtype].weights

    def _motion_idle(self, motion: VAEUse) -> int:
        """Returns the bytes of the motion's decoder while the encoder works: weights, state, and the frames it made."""
        return sum(vae_idle("decoder", motion).values()) + self._low_frames

    @property
    def _low_frames(self) -> int:
        """The bytes of the frames of one of the motion's latent frames; as a result they are counted in uint8."""
        return self.motion.whole.result * self.request.dtype.itemsize

    def _beside(
        self, dtype: torch.dtype, motion: VAEUse, encode: VAEUse | None, room: float
    ) -> Iterator[ReferenceChoice]:
        """Yields the two as one stream, if they fit: one works while the other waits with its state."""
        if encode is None:
            return
        vaes = (
            vae_idle("decoder", motion) | {"motion's frames": self._low_frames} | vae_held("encoder", encode),
            vae_idle("encoder", encode) | vae_held("decoder", motion),
        )
        held = max(vaes, key=lambda held: sum(held.values()))
        rest = self._beside_rest(dtype)
        if sum(held.values()) <= min(self.vae_room, room - rest):
            held |= {"other weights": rest - self._reference_clip, "clip": self._reference_clip}
            yield ReferenceChoice(motion, encode, held, 0, self._reference_key(False, motion, encode))

    def _after(self, dtype: torch.dtype, motion: VAEUse | None, encode: VAEUse | None) -> Iterator[ReferenceChoice]:
        if motion is None or encode is None:
            return
        name, use = max((("decoder", motion), ("encoder", encode)), key=lambda u: u[1].peak - u[1].planned.peak.weights)
        rest = {"other weights": self.vae_bytes(dtype) - use.planned.peak.weights, "clip": self._reference_clip}
        host = self._motion_frames + max(motion.host, encode.host)
        key = self._reference_key(True, motion, encode)
        yield ReferenceChoice(motion, encode, vae_held(name, use) | rest, host, key)

    @staticmethod
    def _reference_key(after: bool, motion: VAEUse, encode: VAEUse) -> tuple[float, ...]:
        spent = round(motion.seconds + encode.seconds, DIGITS)
        return spent, after, encode.order, motion.park, motion.order

    # Stage I, for which the VAEs wait in host memory.

    @property
    def _motion_host(self) -> float:
        return self.host - self.vae_bytes()

    def best_motion(self, room: float) -> StageChoice | None:
        """Returns the fastest choice for Stage I that fits, or None."""
        return self.one.best(room, self._motion_host)

    # Stage II, with each number of streamed layers, and the decoder beside it.

    def best_clip(self, room: float) -> ClipChoice | None:
        """Returns the fastest Stage II and decoder that fit together, or None."""

        def found() -> Iterator[ClipChoice]:
            for quantize, streamed, least in self._clip_counts():
                for park in (False, True):
                    decode = self._decode(quantize, streamed, room, self.host - least, park)
                    yield from self._clip(quantize, streamed, decode)

        return min(found(), key=lambda choice: choice.key, default=None)

    def _decode(self, quantize: str, streamed: int, room: float, host: float, park: bool) -> VAEUse | None:
        """Returns the fastest decoder of a kind beside so many streamed layers."""
        left = room - self.two.placed(quantize, streamed, None).device - self._clip_bytes(park)
        return self.decode.first(min(left, self.vae_room), host, park)

    def _clip_bytes(self, park: bool) -> int:
        """Returns the bytes of the segment being decoded, and of its last frames unless they are in host memory."""
        longest = max(len(window.noisy) for window in self.request.plan)
        segment = longest * self._latents(False) // self.request.plan.num_blocks
        return segment if park else segment + self.decode.whole.result

    def _least_clip(self) -> int | None:
        sizes = []
        for quantize, streamed, least in self._clip_counts():
            decode = self._least(self.decode, self.host - least)
            sizes += [choice.device for choice in self._clip(quantize, streamed, decode)]
        return min(sizes, default=None)

    def _clip_counts(self) -> Iterator[tuple[str, int, int]]:
        """Yields (quantize, number of streamed layers, bytes of host memory that these take at least)."""
        for quantize, streamed in self.two.pairs():
            least = self.two.least_host(quantize, streamed)
            if least <= self.host:
                yield quantize, streamed, least

    def _clip(self, quantize: str, streamed: int, decode: VAEUse | None) -> Iterator[ClipChoice]:
        stage = None if decode is None else self.two.within(self.host - decode.host, quantize, streamed)
        if decode is not None and stage is not None:
            yield ClipChoice(stage, decode, self._clip_bytes(decode.park))

    def least_host(self, room: float) -> int | None:
        """Returns the least bytes of host memory with which a plan fits ``room`` bytes on the device, or None.

        It is meant for a search without a limit on host memory.
        """
        condition = self.best_condition(room)
        motion = (
            self.one.least_host(quantize, streamed)
            for quantize, streamed in self.one.pairs()
            if self.one.placed(quantize, streamed, None).device <= room
        )
        clip = (
            least + decode.host
            for quantize, streamed, least in self._clip_counts()
            for park in (False, True)
            if (decode := self._decode(quantize, streamed, room, math.inf, park)) is not None
        )
        references = (self._references(dtype, encode, room) for dtype, encode in self.encode.items())
        sizes = [
            None if condition is None else condition.host,
            min((self.vae_bytes() + size for size in motion), default=None),
            min((choice.host for choices in references for choice in choices), default=None),
            min(clip, default=None),
        ]
        if any(size is None for size in sizes):
            return None
        return PROCESS_BYTES + max(self.text_host, *(size for size in sizes if size is not None))

    def least_peak(self) -> int | None:
        """Returns the lowest peak on the device that the host memory allows, or None."""
        condition = self._least(self.condition, self.host)
        sizes = [
            None if condition is None else sum(self.condition_held(condition).values()),
            min((choice.device for choice in self.one.all(self._motion_host)), default=None),
            self._least_reference(),
            self._least_clip(),
        ]
        if self.text_host > self.host or any(size is None for size in sizes):
            return None
        return max(size for size in sizes if size is not None)


@functools.cache
def half_bytes(config: VAEConfig, half: str, dtype: torch.dtype) -> int:
    """Returns the bytes of the weights of one half of a VAE."""
    return sum(p.nbytes for p in meta_vae(config, dtype).weights_of(half))


def vae_held(name: str, use: VAEUse) -> Held:
    """Returns the bytes that half of a VAE holds at its worst moment, by name."""
    idle = vae_idle(name, use)
    return idle | {f"{name}'s activations": use.peak - sum(idle.values())}


def vae_idle(name: str, use: VAEUse) -> Held:
    """Returns the bytes that half of a VAE holds while it waits, by name."""
    return {f"{name}'s weights": use.planned.peak.weights, f"{name}'s state": use.planned.peak.state}
