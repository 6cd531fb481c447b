"""The choice of a memory plan, phase by phase, by bytes; see ``model/memory/plan.py`` for the order.

Phases that share a choice (reference: both VAEs; Stage II and decode: the DiT and the decoder's tiles) are one group,
and groups do not depend on each other, since device and host memory have to be enough for each phase by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.memory.request import MemoryRequest
from model.memory.stage_choice import StageChoice, StageChoices
from model.memory.vae_choice import VAEPlace, VAEUse
from model.memory.vae_plan import Request, half_bytes, waiting_bytes

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
    def device(self) -> int:
        """The bytes on the device while frames are decoded."""
        return self.stage.device + self.decode.peak + self.clip


class Choices(NamedTuple):
    """The choices of all groups."""

    condition: VAEUse
    one: StageChoice
    reference: ReferenceChoice
    clip: ClipChoice


class Search:
    """The candidates for one request. Its limit on the device is not used here: methods take one as an argument.

    ``host`` is the part of the machine's memory that is left for the process's data.
    """

    def __init__(self, request: MemoryRequest) -> None:
        self.request = r = request
        self.host = math.inf if r.usable_host is None else r.usable_host - PROCESS_BYTES
        self.vae_room = math.inf if r.vae_limit is None else r.vae_limit
        self.one, self.two = StageChoices(r, True), StageChoices(r, False)
        blocks = r.plan.num_blocks
        # On a GPU, small frames are cut into tiles only where waiting tiles are in host memory; a CPU has no other.
        small = r.capability is not None
        masked = r.stage_one.config.in_channels != r.stage_one.config.out_channels
        given = blocks if masked else 1
        self.condition = VAEPlace(self._request("encode", True, torch.float32), given, 1, small)
        self.motion = VAEPlace(self._request("decode", True, r.dtype), blocks, 1, small)
        dtypes = (torch.float32, torch.bfloat16) if r.capability is not None else (torch.float32,)
        self.encode = {dtype: VAEPlace(self._request("encode", False, dtype), 1, blocks) for dtype in dtypes}
        longest, pieces = max(len(window.noisy) for window in r.plan), len(r.plan) + 1
        self.decode = VAEPlace(self._request("decode", False, r.dtype), pieces, longest)

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
        """Returns the first plan of the condition that fits, or None."""
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
        """Returns the first choice for the reference that fits, in float32 if one does, or None."""
        for dtype in self.encode:
            found = next(self._references(dtype, room), None)
            if found is not None:
                return found
        return None

    def _references(self, dtype: torch.dtype, room: float) -> Iterator[ReferenceChoice]:
        """Yields the choices that fit: first those with nothing in host memory, then those with all of it there."""
        encode = self.encode[dtype]
        left = min(room - self._beside_rest(dtype), self.vae_room)
        for motion in self.motion.whole_frames() if left >= self.motion.weights + encode.weights else ():
            yield from self._beside(
                dtype, motion, encode.first(left - self._motion_idle(motion), self.host, False), room
            )
        host, left = self.host - self._motion_frames, room - self.vae_bytes(dtype) - self._reference_clip
        high = encode.first(min(left + encode.weights, self.vae_room), host, True)
        if high is not None:
            low = self._first(self.motion, min(left + self.motion.weights, self.vae_room), host)
            yield from self._after(dtype, low, high)

    def _least_reference(self) -> ReferenceChoice | None:
        # The last dtype is the smallest; a CPU has no host memory besides, so there both are one stream.
        dtype, encode = list(self.encode.items())[-1]
        if self.request.capability is not None:
            host = self.host - self._motion_frames
            return next(self._after(dtype, self._least(self.motion, host), self._least(encode, host)), None)
        found = []
        for motion in self.motion.whole_frames():
            high = encode.smallest(self.host, False, self.vae_room + 1 - self._motion_idle(motion))
            found += self._beside(dtype, motion, high, math.inf)
        return min(found, key=lambda choice: choice.device, default=None)

    def _least(self, place: VAEPlace, host: float) -> VAEUse | None:
        """Returns the plan of a place with the lowest peak: with tiles in host memory where there is one."""
        return place.smallest(host, self.request.capability is not None, self.vae_room + 1)

    def _beside_rest(self, dtype: torch.dtype) -> int:
        """Returns the bytes beside what the two plans take: weights of other halves, and tensors of the clip."""
        return self._reference_clip + self.vae_bytes(dtype) - self.motion.weights - self.encode[dtype].weights

    def _motion_idle(self, motion: VAEUse) -> int:
        """Returns the bytes of the motion's decoder while the encoder works: weights, state, and the frames it made."""
        return sum(vae_idle("decoder", motion).values()) + self._low_frames

    @property
    def _low_frames(self) -> int:
        """The bytes of the frames of one of the motion's latent frames; as a result they are counted in uint8."""
        return waiting_bytes(self.motion.request)[1] * self.request.dtype.itemsize

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
            yield ReferenceChoice(motion, encode, held, 0)

    def _after(self, dtype: torch.dtype, motion: VAEUse | None, encode: VAEUse | None) -> Iterator[ReferenceChoice]:
        if motion is None or encode is None:
            return
        name, use = max((("decoder", motion), ("encoder", encode)), key=lambda u: u[1].peak - u[1].planned.peak.weights)
        rest = {"other weights": self.vae_bytes(dtype) - use.planned.peak.weights, "clip": self._reference_clip}
        host = self._motion_frames + max(motion.host, encode.host)
        yield ReferenceChoice(motion, encode, vae_held(name, use) | rest, host)

    # Stage I, for which the VAEs wait in host memory.

    @property
    def _motion_host(self) -> float:
        return self.host - self.vae_bytes()

    # Stage II, and the decoder beside it.

    def best_clip(self, room: float) -> ClipChoice | None:
        """Returns the first Stage II and decoder that fit together, or None.

        In the preferred form, tiles are first made as few as beside the fewest layers on the device, and then as many
        layers stay there as fit beside these tiles.
        """
        for quantize in self.two.forms:
            for park in (False, True):
                for least in self.two.least(self.host, quantize):
                    left = room - least.device - self._clip_bytes(park)
                    host = self.host - self.two.least_host(quantize, least.streamed)
                    decode = self.decode.first(min(left, self.vae_room), host, park)
                    if decode is not None:
                        left = room - decode.peak - self._clip_bytes(park)
                        host = self.host - decode.host
                        stage = self.two.fewest(left, host, quantize)
                        stage = stage or self.two.within(host, quantize, least.streamed)
                        if stage is not None:
                            return ClipChoice(stage, decode, self._clip_bytes(park))
                    if left < self.decode.weights or self.host == math.inf:
                        break  # fewer streamed layers leave less
        return None

    def _clip_bytes(self, park: bool) -> int:
        """Returns the bytes of the segment being decoded, and of its last frames unless they are in host memory."""
        longest = max(len(window.noisy) for window in self.request.plan)
        segment = longest * self._latents(False) // self.request.plan.num_blocks
        return segment if park else segment + waiting_bytes(self.decode.request)[1]

    def _least_clip(self) -> ClipChoice | None:
        found = []
        for quantize in self.two.forms:
            for least in self.two.least(self.host, quantize):
                decode = self._least(self.decode, self.host - self.two.least_host(quantize, least.streamed))
                stage = None if decode is None else self.two.within(self.host - decode.host, quantize, least.streamed)
                if decode is not None and stage is not None:
                    found.append(ClipChoice(stage, decode, self._clip_bytes(decode.park)))
                    break
        return min(found, key=lambda choice: choice.device, default=None)

    def best(self, room: float) -> Choices | None:
        """Returns the first choices within ``room`` bytes on the device, or None."""
        of = self.request.room
        # What needs no run of the VAE is asked first.
        if self.text_host > self.host or (one := self.one.best(of(room, "Stage I"), self._motion_host)) is None:
            return None
        if (condition := self.best_condition(of(room, "condition"))) is None:
            return None
        if (clip := self.best_clip(of(room, "Stage II", "decode"))) is None:
            return None
        reference = self.best_reference(of(room, "reference"))
        return None if reference is None else Choices(condition, one, reference, clip)

    def least(self) -> Choices | None:
        """Returns the choices with the lowest peaks on the device that the host memory allows, or None."""
        stages = [c for quantize in self.one.forms for c in self.one.least(self._motion_host, quantize)]
        condition, reference = self._least(self.condition, self.host), self._least_reference()
        clip = self._least_clip()
        if self.text_host > self.host or not stages or condition is None or reference is None or clip is None:
            return None
        return Choices(condition, min(stages, key=lambda choice: choice.device), reference, clip)


def vae_held(name: str, use: VAEUse) -> Held:
    """Returns the bytes that half of a VAE holds at its worst moment, by name."""
    idle = vae_idle(name, use)
    return idle | {f"{name}'s activations": use.peak - sum(idle.values())}


def vae_idle(name: str, use: VAEUse) -> Held:
    """Returns the bytes that half of a VAE holds while it waits, by name."""
    return {f"{name}'s weights": use.planned.peak.weights, f"{name}'s state": use.planned.peak.state}
