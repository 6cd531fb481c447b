"""The choice of a memory plan, phase by phase, by bytes; see ``model/memory/plan.py`` for the order.

Phases that share a choice (reference: both VAEs; Stage II and decode: the DiT and the decoder's tiles) are one group,
and groups do not depend on each other, since device and host memory have to be enough for each phase by itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from model.memory.dit_bytes import StageChoice, StageChoices
from model.memory.request import MemoryRequest
from model.memory.vae_plan import FRAMES, PlannedVAE, Request, half_bytes, waiting_bytes

#: The process without any weights: interpreter, torch, CUDA's libraries and context. Assumed.
PROCESS_BYTES = 3_000_000_000
#: The activations of the text encoder, such as float32 scores of 64 heads. Assumed.
TEXT_WORK_BYTES = 500_000_000
_FLOAT = 4


class ReferenceChoice(NamedTuple):
    """A way to decode the motion and encode the reference: one beside the other, or one after the other."""

    motion: PlannedVAE
    encode: PlannedVAE
    held: dict[str, int]
    host: int


#: The choices of all groups: condition, Stage I, reference, Stage II and decode.
Choices = tuple[PlannedVAE, StageChoice, ReferenceChoice, StageChoice, PlannedVAE]


class Search:
    """The candidates for one request. Its limit on the device is not used here: methods take one as an argument.

    ``host`` is the part of the machine's memory that is left for the process's data.
    """

    def __init__(self, request: MemoryRequest) -> None:
        self.request = r = request
        self.host = math.inf if r.usable_host is None else r.usable_host - PROCESS_BYTES
        self.vae_room = math.inf if r.vae_limit is None else r.vae_limit
        self.one, self.two = StageChoices(r, True), StageChoices(r, False)
        self.parks = r.capability is not None  # a CPU has no other memory
        blocks, longest = r.plan.num_blocks, max(len(window.noisy) for window in r.plan)

        def place(low: bool, half: str, dtype: torch.dtype, **clip: int) -> Request:
            config, size = (r.stage_one_vae, r.motion_size) if low else (r.vae, r.size)
            return Request(config, half, *size, dtype, r.capability, 1, **clip)

        # On a GPU, small frames are cut into tiles only where waiting tiles are in host memory.
        small = {"waiting": 1, "untiled": self.parks}
        self.condition = place(True, "encode", torch.float32, pieces=blocks if r.masked else 1, **small)
        self.motion = place(True, "decode", r.dtype, pieces=blocks, **small)
        self.whole_motions = [self.motion.planned((1, 1), frames, False) for frames in FRAMES]
        self.encode = {
            dtype: place(False, "encode", dtype, pieces=1, waiting=blocks)
            for dtype in ((torch.float32, torch.bfloat16) if self.parks else (torch.float32,))
        }
        self.decode = place(False, "decode", r.dtype, pieces=len(r.plan) + 1, waiting=longest)
        # Tensors of the clip beside the models: pictures and latents in float32, and frames.
        picture, low_picture = (3 * _FLOAT * math.prod(size) for size in (r.size, r.motion_size))
        latents, low_latents = (
            _FLOAT * one.config.z_dim * blocks * math.prod(one.latent_size) for one in (self.decode, self.condition)
        )
        self.segment = longest * latents // blocks
        # The list of latents is there beside their concatenation; so are the reference's blocks.
        self.condition_clip = low_picture + 2 * low_latents
        self.reference_clip = picture + low_latents + 2 * latents
        self.motion_frames = 3 * r.num_frames * math.prod(r.motion_size) * r.dtype.itemsize
        # Of one of the motion's latent frames; as a result they are counted in uint8.
        self.low_frames = waiting_bytes(self.motion)[1] * r.dtype.itemsize

    def vae_bytes(self, encode_dtype: torch.dtype = torch.float32) -> int:
        """Returns the bytes of all weights of the VAEs, the target's encoder in this dtype."""
        r = self.request
        total = half_bytes(r.vae, "encode", encode_dtype) + half_bytes(r.vae, "decode", r.dtype)
        if r.motion_vae is not None:
            total += half_bytes(r.motion_vae, "encode", torch.float32) + half_bytes(r.motion_vae, "decode", r.dtype)
        return total

    def _least(self, place: Request, host: float) -> PlannedVAE | None:
        """Returns the plan of a place with the lowest peak: with tiles in host memory where there is one."""
        return place.smallest(host, self.parks, self.vae_room + 1)

    # The reference: as one stream, or first the motion's frames, which wait in host memory, and then its encoding.

    def best_reference(self, room: float) -> ReferenceChoice | None:
        """Returns the first choice for the reference that fits, in float32 if one does, or None.

        First comes what has nothing in host memory, then what has all of it there.
        """
        for dtype, encode in self.encode.items():
            left = min(room - self._beside_rest(dtype), self.vae_room)
            for motion in self.whole_motions if left >= self.motion.weights + encode.weights else ():
                high = encode.first(left - self._motion_idle(motion), self.host, False)
                if high is not None and (found := self._beside(dtype, motion, high, room)) is not None:
                    return found
            host, left = self.host - self.motion_frames, room - self.vae_bytes(dtype) - self.reference_clip
            high = encode.first(min(left + encode.weights, self.vae_room), host, True)
            if high is not None:
                low = self.motion.best(min(left + self.motion.weights, self.vae_room), host)
                if low is not None:
                    return self._after(dtype, low, high)
        return None

    def _least_reference(self) -> ReferenceChoice | None:
        dtype, encode = list(self.encode.items())[-1]  # the smallest
        if self.parks:
            host = self.host - self.motion_frames
            low, high = self._least(self.motion, host), self._least(encode, host)
            return None if low is None or high is None else self._after(dtype, low, high)
        found = []
        for motion in self.whole_motions:
            high = encode.smallest(self.host, False, self.vae_room + 1 - self._motion_idle(motion))
            found += [] if high is None else [self._beside(dtype, motion, high, math.inf)]
        return min(filter(None, found), key=lambda choice: sum(choice.held.values()), default=None)

    def _beside_rest(self, dtype: torch.dtype) -> int:
        """Returns the bytes beside what the two plans take: weights of other halves, and tensors of the clip."""
        return self.reference_clip + self.vae_bytes(dtype) - self.motion.weights - self.encode[dtype].weights

    def _motion_idle(self, motion: PlannedVAE) -> int:
        """Returns the bytes of the motion's decoder while the encoder works: weights, state, and the frames it made."""
        return sum(motion.idle.values()) + self.low_frames

    def _beside(
        self, dtype: torch.dtype, motion: PlannedVAE, encode: PlannedVAE, room: float
    ) -> ReferenceChoice | None:
        """Returns the two as one stream, if they fit: one works while the other waits with its state."""
        one, other = motion.idle | {"motion's frames": self.low_frames} | encode.held, encode.idle | motion.held
        held = max(one, other, key=lambda held: sum(held.values()))
        rest = self._beside_rest(dtype)
        if sum(held.values()) > min(self.vae_room, room - rest):
            return None
        held |= {"other weights": rest - self.reference_clip, "clip": self.reference_clip}
        return ReferenceChoice(motion, encode, held, 0)

    def _after(self, dtype: torch.dtype, motion: PlannedVAE, encode: PlannedVAE) -> ReferenceChoice:
        larger = max(motion, encode, key=lambda planned: planned.peak.total - planned.peak.weights)
        rest = self.vae_bytes(dtype) - larger.peak.weights
        held = larger.held | {"other weights": rest, "clip": self.reference_clip}
        return ReferenceChoice(motion, encode, held, self.motion_frames + max(motion.host, encode.host))

    # Stage II, and the decoder beside it.

    def best_clip(self, room: float) -> tuple[StageChoice, PlannedVAE] | None:
        """Returns the first Stage II and decoder that fit together, or None.

        In the preferred form, tiles are first made as few as beside the fewest layers on the device, and then as many
        layers stay there as fit beside these tiles.
        """
        for quantize in self.two.forms:
            for park in (False, True):
                for least in self.two.least(self.host, quantize):
                    left = room - least.device - self.clip_bytes(park)
                    host = self.host - self.two.least_host(quantize, least.streamed)
                    decode = self.decode.first(min(left, self.vae_room), host, park)
                    if decode is not None:
                        left = room - decode.peak.total - self.clip_bytes(park)
                        host = self.host - decode.host
                        stage = self.two.fewest(left, host, quantize)
                        stage = stage or self.two.within(host, quantize, least.streamed)
                        if stage is not None:
                            return stage, decode
                    if left < self.decode.weights or self.host == math.inf:
                        break  # fewer streamed layers leave less
        return None

    def clip_bytes(self, park: bool) -> int:
        """Returns the bytes of the segment being decoded, and of its last frames unless they are in host memory."""
        return self.segment if park else self.segment + waiting_bytes(self.decode)[1]

    def _least_clip(self) -> tuple[StageChoice, PlannedVAE] | None:
        found = []
        for quantize in self.two.forms:
            for least in self.two.least(self.host, quantize):
                decode = self._least(self.decode, self.host - self.two.least_host(quantize, least.streamed))
                stage = None if decode is None else self.two.within(self.host - decode.host, quantize, least.streamed)
                if decode is not None and stage is not None:
                    found.append((stage, decode))
                    break
        return min(found, key=lambda both: both[0].device + both[1].peak.total, default=None)

    # All of them. For Stage I the VAEs wait in host memory.

    def best(self, room: float) -> Choices | None:
        """Returns the first choices within ``room`` bytes on the device, or None."""
        of, host = self.request.room, self.host - self.vae_bytes()
        # What needs no run of the VAE is asked first.
        stages = (self.one.fewest(of(room, "Stage I"), host, quantize) for quantize in self.one.forms)
        one = next(filter(None, stages), None)
        if one is None or self.request.text_encoder_bytes > self.host:
            return None
        left = of(room, "condition") - self.vae_bytes() + self.condition.weights - self.condition_clip
        if (condition := self.condition.best(min(left, self.vae_room), self.host)) is None:
            return None
        if (clip := self.best_clip(of(room, "Stage II", "decode"))) is None:
            return None
        reference = self.best_reference(of(room, "reference"))
        return None if reference is None else (condition, one, reference, *clip)

    def least(self) -> Choices | None:
        """Returns the choices with the lowest peaks on the device that the host memory allows, or None."""
        host = self.host - self.vae_bytes()
        stages = [choice for quantize in self.one.forms for choice in self.one.least(host, quantize)]
        one = min(stages, key=lambda choice: choice.device, default=None)
        condition, reference = self._least(self.condition, self.host), self._least_reference()
        choices = condition, one, reference, *(self._least_clip() or (None, None))
        return None if self.request.text_encoder_bytes > self.host or None in choices else choices
