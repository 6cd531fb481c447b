"""The card that a plan is for: by name, by the CUDA device, or by memory."""

from __future__ import annotations

from typing import Any

import torch

from model.errors import InputError
from swifti2v_kernels.common.cards import CARDS, Card, card_named, card_of_memory


def chosen_gpu(name: str | None, memory: int) -> Card:
    """Returns the card that seconds are predicted for.

    It is the one that was named, else the CUDA device if it is in the table and has that much memory, else one of the
    memory's class.

    Raises:
        InputError: the name is unknown; the message lists those that exist.
    """
    if name is not None:
        if name not in CARDS:
            raise InputError(f"gpu: unknown {name!r}; choose one of {', '.join(CARDS)}")
        return CARDS[name]
    if torch.cuda.is_available():
        found = card_named(torch.cuda.get_device_name())
        if found is not None and memory <= torch.cuda.get_device_properties(0).total_memory:
            return found
    return card_of_memory(memory)


def device_options(device: torch.device) -> dict[str, Any]:
    """Returns a memory request's options for a device: memory, capability, and the card whose seconds are predicted.

    A CPU has no limit and no capability.
    """
    if device.type != "cuda":
        return {"vram": None, "capability": None, "gpu": chosen_gpu(None, 0)}
    memory = torch.cuda.get_device_properties(device).total_memory
    major, minor = torch.cuda.get_device_capability(device)
    return {"vram": memory, "capability": 10 * major + minor, "gpu": chosen_gpu(None, memory)}
