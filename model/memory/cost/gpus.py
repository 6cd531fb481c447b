"""The table of graphics cards: what their data sheets promise, and nothing measured.

Peaks are dense (without sparsity) and of bf16 matmuls that are summed in float32, which GeForce cards run at half
rate. ``host`` is what a copy from pinned memory reaches over the card's PCI Express bus: 50 GB/s of the 63 of version
5.0 with 16 lanes, 25 of the 31.5 of version 4.0, and half of that with 8 lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from model.errors import InputError


@dataclass(frozen=True)
class GPU:
    """The numbers of one card.

    ``architecture`` is what efficiencies depend on; ``capability`` the compute capability as two digits. Peaks are in
    TFLOP/s (0: the card has no such units), ``bandwidth`` in TB/s, ``memory`` in GB, ``host`` in GB/s.
    """

    name: str
    architecture: str
    capability: int
    bf16: float
    fp8: float
    bandwidth: float
    memory: float
    host: float
    source: str

    @property
    def memory_bytes(self) -> int:
        """The bytes of the card's whole memory."""
        return round(self.memory * 1e9)


GPUS: Mapping[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", "hopper", 90, 989.4, 1978.9, 3.35, 80, 50, "NVIDIA H100 data sheet, SXM5"),
        GPU("H800", "hopper", 90, 989.4, 1978.9, 3.35, 80, 50, "NVIDIA H800 data sheet, SXM5: H100 but for NVLink"),
        GPU("H200", "hopper", 90, 989.4, 1978.9, 4.80, 141, 50, "NVIDIA H200 data sheet, SXM5"),
        GPU("A100", "ampere", 80, 312.0, 0.0, 2.039, 80, 25, "NVIDIA A100 80GB data sheet, SXM4"),
        *(
            GPU(f"RTX {model}", "ada-geforce", 89, bf16, 2 * bf16, bandwidth, memory, host, source)
            for model, bf16, bandwidth, memory, host, source in (
                (4060, 30.2, 0.272, 8, 12.5, "NVIDIA GeForce RTX 4060 specifications, AD107, 8 lanes"),
                (4070, 58.3, 0.504, 12, 25, "NVIDIA GeForce RTX 4070 specifications, AD104"),
                (4080, 97.5, 0.717, 16, 25, "NVIDIA Ada GPU architecture whitepaper, AD103"),
                (4090, 165.2, 1.008, 24, 25, "NVIDIA Ada GPU architecture whitepaper, AD102"),
            )
        ),
        GPU(
            "RTX 5090",
            "blackwell-geforce",
            120,
            209.5,
            419.0,
            1.792,
            32,
            50,
            "NVIDIA RTX Blackwell GPU architecture whitepaper, GB202",
        ),
        GPU("L40S", "ada", 89, 362.1, 733.0, 0.864, 48, 25, "NVIDIA L40S data sheet"),
        GPU("B200", "blackwell", 100, 2250.0, 4500.0, 8.0, 180, 50, "NVIDIA HGX B200 data sheet, an eighth of it"),
    )
}


#: Cards by the most GiB that they have; larger ones are an H200.
CLASSES = ((8, "RTX 4060"), (12, "RTX 4070"), (16, "RTX 4080"), (24, "RTX 4090"), (32, "RTX 5090"), (80, "H100"))


def get_gpu(name: str) -> GPU:
    """Returns the card called ``name``.

    Raises:
        InputError: there is none; the message lists those that exist.
    """
    if name not in GPUS:
        raise InputError(f"gpu: unknown {name!r}; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def gpu_named(name: str) -> GPU | None:
    """Returns the card whose name is part of a device's, such as ``NVIDIA GeForce RTX 4090``; None: there is none."""
    found = [known for known in GPUS if known.lower() in name.lower()]
    return GPUS[max(found, key=len)] if found else None


def gpu_of_class(memory: int) -> GPU:
    """Returns a card that is sold with so many bytes: a GeForce up to 32 GB, then an H100 or H200."""
    # A card has up to its number of GiB.
    return GPUS[next((name for most, name in CLASSES if memory <= most * 2**30), "H200")]


def chosen_gpu(name: str | None, memory: int) -> GPU:
    """Returns the card that seconds are predicted for.

    It is the one that was named, else the CUDA device if it is in the table and has that much memory, else one of the
    memory's class.

    Raises:
        InputError: the name is unknown.
    """
    if name is not None:
        return get_gpu(name)
    if torch.cuda.is_available():
        found = gpu_named(torch.cuda.get_device_name())
        if found is not None and memory <= torch.cuda.get_device_properties(0).total_memory:
            return found
    return gpu_of_class(memory)
