"""The card that a plan's time is predicted for: by name, by the CUDA device, or by memory."""

from __future__ import annotations

import torch

from model.errors import InputError
from swifti2v_kernels.common.cards import CARDS, Card, card_named, card_of_memory


def get_gpu(name: str) -> Card:
    """Returns the card called ``name``.

    Raises:
        InputError: there is none; the message lists those that exist.
    """
    if name not in CARDS:
        raise InputError(f"gpu: unknown {name!r}; choose one of {', '.join(CARDS)}")
    return CARDS[name]


def chosen_gpu(name: str | None, memory: int) -> Card:
    """Returns the card that seconds are predicted for.

    It is the one that was named, else the CUDA device if it is in the table and has that much memory, else one of the
    memory's class.

    Raises:
        InputError: the name is unknown.
    """
    if name is not None:
        return get_gpu(name)
    if torch.cuda.is_available():
        found = card_named(torch.cuda.get_device_name())
        if found is not None and memory <= torch.cuda.get_device_properties(0).total_memory:
            return found
    return card_of_memory(memory)
