"""The plans of the VAE in its four places in the pipeline, and the card that plans are for.

condition: the photograph and grey frames at Stage I's size, encoded
motion:    Stage I's result, decoded at its size
reference: the motion at the target size, encoded
decode:    the clip, decoded while Stage II makes it

They are chosen together with everything else on the card (``model/memory/plan.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from model.memory.cards import chosen_gpu
from model.memory.vae_plan import PlannedVAE, device_capability
from model.vae.tiles import VAEPlans

#: The share of a card's memory that is planned with, unless a limit is given: the rest is the CUDA context, what
#: libraries take beside the allocator, and fragmentation.
USABLE = 0.88


@dataclass(frozen=True)
class Card:
    """A GPU that plans are for: its compute capability (two digits) and its memory in bytes."""

    capability: int
    memory: int

    @classmethod
    def of(cls, device: torch.device) -> Card | None:
        """Returns the card that a device is; None for a CPU."""
        capability = device_capability(device)
        return None if capability is None else cls(capability, torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class PipelinePlans:
    """The plans for the four places of the VAE, and the dtype that the reference is encoded in."""

    condition: PlannedVAE
    motion: PlannedVAE
    reference: PlannedVAE
    decode: PlannedVAE

    @property
    def encode_dtype(self) -> torch.dtype:
        """The dtype that the reference is encoded in: float32, unless that does not fit."""
        return self.reference.request.dtype

    @property
    def tiles(self) -> VAEPlans:
        """The tiles of all four places, as the pipeline takes them."""
        places = (self.condition, self.motion, self.reference, self.decode)
        return VAEPlans(*(planned.plan for planned in places), self.encode_dtype)

    def __str__(self) -> str:
        parts = []
        for name, planned in (("reference", self.reference), ("decode", self.decode)):
            plan, request = planned.plan, planned.request
            grid = [min(n, size) for n, size in zip((plan.rows, plan.columns), request.latent_size, strict=True)]
            tiles = "untiled" if math.prod(grid) == 1 else f"{grid[0]} x {grid[1]} exact tiles"
            host = ", tiles wait in host memory" if plan.park else ""
            parts.append(f"{name} {str(request.dtype).removeprefix('torch.')}, {tiles}{host}")
        return f"VAE: {'; '.join(parts)}"


def device_options(device: torch.device) -> dict[str, Any]:
    """Returns the options of a request for a device: its memory, capability, and the card whose seconds are predicted.

    A CPU has no limit.
    """
    card = Card.of(device)
    memory, capability = (None, None) if card is None else (card.memory, card.capability)
    return {"vram": memory, "capability": capability, "gpu": chosen_gpu(None, memory or 0)}
