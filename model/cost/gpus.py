"""Graphics cards: what their data sheets promise, and nothing measured.

Peaks are dense (without sparsity) and of bf16 products that are summed in float32, which GeForce cards run at half
rate. ``host`` is what a copy from pinned memory reaches over the card's PCI Express bus: 50 GB/s of the 63 of version
5.0 with 16 lanes, 25 of the 31.5 of version 4.0, and half of that with 8 lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import InputError


@dataclass(frozen=True)
class GPU:
    """One card.

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
        """Of the whole card."""
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


def get_gpu(name: str) -> GPU:
    """The card called ``name``.

    Raises:
        InputError: there is none; the message lists those that exist.
    """
    if name not in GPUS:
        raise InputError(f"gpu: unknown {name!r}; choose one of {', '.join(GPUS)}")
    return GPUS[name]
