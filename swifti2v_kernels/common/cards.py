"""The one table of graphics cards: kernels are compiled for them, bounds, plans and predictions are about them.

A new card is one entry of :data:`CARDS`; a new compute capability needs its :class:`Limits` too. Everything is from
data sheets, nothing is measured. Sources of limits: CUDA programming guide (limits and throughput tables), vendor data
sheets and architecture whitepapers (rates of 8-bit operands).

Peaks are dense (without sparsity) and of bf16 matmuls that are summed in float32, which GeForce cards run at half
rate. ``host`` is what a copy from pinned memory reaches over the card's PCI Express bus: 50 GB/s of the 63 of version
5.0 with 16 lanes, 25 of the 31.5 of version 4.0, and half of that with 8 lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_KIB = 1024


@dataclass(frozen=True)
class Limits:
    """The limits of a streaming multiprocessor (SM) of one compute capability, and of one program.

    Shared memory is in bytes. ``bf16_fma`` is the fused multiply-adds a clock of dense bf16 matmuls with float32 sums.
    ``mma_opcodes`` are those of tensor-core instructions that a bf16 matmul must show in the compiled code, and
    ``float8`` and ``int8`` the rate of such operands over that of bf16 (0: the cards have no such units).
    """

    capability: int
    shared_per_block: int
    shared_per_sm: int
    max_warps_per_sm: int
    bf16_fma: int
    mma_opcodes: tuple[str, ...]
    float8: int
    int8: int


@dataclass(frozen=True)
class Card:
    """One card. ``architecture`` is what efficiencies depend on.

    ``clock_ghz`` is the boost clock, ``bf16`` and ``fp8`` are in TFLOP/s (0: the card has no such units),
    ``bandwidth`` in TB/s, ``memory`` in GB, ``host`` in GB/s. ``stands`` says that plans take it for any card of its
    memory that is not named.
    """

    name: str
    architecture: str
    limits: Limits
    sms: int
    clock_ghz: float
    bf16: float
    fp8: float
    bandwidth: float
    memory: float
    host: float
    source: str
    stands: bool = False

    @property
    def capability(self) -> int:
        """The compute capability as two digits, 90 for 9.0."""
        return self.limits.capability

    @property
    def memory_bytes(self) -> int:
        """The bytes of the card's whole memory."""
        return round(self.memory * 1e9)


_SM80 = Limits(80, 163 * _KIB, 164 * _KIB, 64, 1024, ("HMMA",), 0, 2)
_SM86 = Limits(86, 99 * _KIB, 100 * _KIB, 48, 256, ("HMMA",), 0, 4)
_SM89 = Limits(89, 99 * _KIB, 100 * _KIB, 48, 256, ("HMMA",), 2, 4)
_SM90 = Limits(90, 227 * _KIB, 228 * _KIB, 64, 2048, ("HGMMA",), 2, 2)
_SM100 = Limits(100, 227 * _KIB, 228 * _KIB, 64, 4096, ("UTCHMMA", "UTCMMA"), 2, 2)
_SM120 = Limits(120, 99 * _KIB, 100 * _KIB, 48, 256, ("HMMA",), 2, 4)

_ADA = "NVIDIA Ada GPU architecture whitepaper"
#: By name. The entries in 8.9 but for the L40S, whose tensor cores run at full rate, share one kind of SM.
CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        Card("H100", "hopper", _SM90, 132, 1.83, 989.4, 1978.9, 3.35, 80, 50, "NVIDIA H100 data sheet, SXM5", True),
        Card("H800", "hopper", _SM90, 132, 1.83, 989.4, 1978.9, 3.35, 80, 50,
             "NVIDIA H800 data sheet, SXM5: H100 but for NVLink"),
        Card("H200", "hopper", _SM90, 132, 1.83, 989.4, 1978.9, 4.80, 141, 50, "NVIDIA H200 data sheet, SXM5", True),
        Card("A100", "ampere", _SM80, 108, 1.41, 312.0, 0.0, 2.039, 80, 25, "NVIDIA A100 80GB data sheet, SXM4"),
        Card("RTX 3090", "ampere-geforce", _SM86, 82, 1.695, 71.2, 0.0, 0.936, 24, 25,
             "NVIDIA Ampere GA102 GPU architecture whitepaper"),
        Card("RTX 4060", "ada-geforce", _SM89, 24, 2.46, 30.2, 60.4, 0.272, 8, 12.5,
             "NVIDIA GeForce RTX 4060 specifications, AD107, 8 lanes", True),
        Card("RTX 4070", "ada-geforce", _SM89, 46, 2.475, 58.3, 116.6, 0.504, 12, 25,
             "NVIDIA GeForce RTX 4070 specifications, AD104", True),
        Card("RTX 4080", "ada-geforce", _SM89, 76, 2.505, 97.5, 195.0, 0.717, 16, 25, f"{_ADA}, AD103", True),
        Card("RTX 4090", "ada-geforce", _SM89, 128, 2.52, 165.2, 330.4, 1.008, 24, 25, f"{_ADA}, AD102", True),
        Card("RTX 5090", "blackwell-geforce", _SM120, 170, 2.407, 209.5, 419.0, 1.792, 32, 50,
             "NVIDIA RTX Blackwell GPU architecture whitepaper, GB202", True),
        Card("L40S", "ada", _SM89, 142, 2.52, 362.1, 733.0, 0.864, 48, 25, "NVIDIA L40S data sheet"),
        Card("B200", "blackwell", _SM100, 148, 1.85, 2250.0, 4500.0, 8.0, 180, 50,
             "NVIDIA HGX B200 data sheet, an eighth of it"),
    )
}  # fmt: skip


def by_capability() -> dict[int, Card]:
    """Returns the card with the most bandwidth of each compute capability: compiled code is judged by it."""
    ascending = sorted(CARDS.values(), key=lambda card: (card.capability, card.bandwidth))
    return {card.capability: card for card in ascending}


def card_named(name: str) -> Card | None:
    """Returns the card whose name is part of a device's, such as ``NVIDIA GeForce RTX 4090``; None: there is none."""
    found = [card for card in CARDS.values() if card.name.lower() in name.lower()]
    return max(found, key=lambda card: len(card.name), default=None)


def card_of_memory(memory: int) -> Card:
    """Returns a card that is sold with so many bytes, a card having up to its number of GiB; else the largest."""
    usual = sorted((card for card in CARDS.values() if card.stands), key=lambda card: card.memory)
    return next((card for card in usual if memory <= card.memory * 2**30), usual[-1])
