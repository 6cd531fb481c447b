"""The least time that a compiled loop can take on a card, from its instructions: a prediction, never a measurement.

These times are counted for one pass over the main loop, per streaming multiprocessor (SM), in cycles:

* ``tensor``: multiply-adds over the tensor cores' rate;
* ``exponent``, ``fma``, ``alu``, ``shared``, ``issue``: instructions of that kind over the rate of their unit (CUDA
  programming guide, throughput of native instructions), 4 schedulers an SM;
* ``memory``: bytes fetched over 64 B a cycle from L2;
* ``latency``: one group of warps alone: its matrix multiplications plus everything else it does one after the other
  (the larger of its stall counts and its unit times). Where the code overlaps exponentials with a multiplication in
  flight, half of the multiplications is hidden. A group is what runs without waiting for others: a warp-specialised
  consumer; with ``wgmma`` and ``tcgen05`` otherwise the whole program, whose warps meet at a barrier around every
  multiplication; with ``mma.sync`` one warp a scheduler.

All groups of warps on an SM share the units; latency is paid by each for itself. The bound is the largest of these; the
fraction is ``tensor`` over it. L2 and DRAM misses, clocks under power limits, the start and the end of a program are
left out. Published kernels reach 0.55 to 0.79 of such a bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.static.cubin import Analysis, Loop
from swifti2v_kernels.common.cards import Card
from swifti2v_kernels.common.case import Work

_ALU = (
    "FMNMX", "FMNMX3", "IADD3", "LOP3", "SEL", "FSEL", "ISETP", "FSETP", "PRMT", "SHF", "MOV", "F2FP", "LEA", "VIADD",
)  # fmt: skip
#: The cycles that an instruction of one warp takes on a unit of its scheduler.
_UNITS = {
    "fma": {"FFMA": 1, "FMUL": 1, "FADD": 1, "FFMA2": 2, "FMUL2": 2, "FADD2": 2, "IMAD": 2, "HFMA2": 2, "HMUL2": 2},
    "exponent": {"MUFU": 8, "F2F": 8, "I2F": 8, "F2I": 8},
    "alu": dict.fromkeys(_ALU, 2),
    "shared": {"SHFL": 4, "LDSM": 16, "LDS": 8, "STS": 8, "STSM": 8},
}
_L2_BYTES_PER_CYCLE = 64
#: How tensor-core opcodes begin by kind of 8-bit operands, whose rates are those of the card's limits.
EIGHT_BITS = {"float8": ("QGMMA", "QMMA", "UTCQMMA"), "int8": ("IGMMA", "IMMA", "UTCIMMA")}
#: Tensor-core instructions that one warp runs alone.
_BY_WARP = {"HMMA", "QMMA", "IMMA"}


@dataclass(frozen=True)
class Bound:
    """A bound as a ``fraction`` of the peak of the tensor cores, or of memory for kernels without matmul."""

    limit: str
    fraction: float
    cycles: Mapping[str, float]


def occupancy(analysis: Analysis, shared_bytes: int, warps: int, target: Card) -> int:
    """Returns the number of programs that fit on one SM, by registers, shared memory and warps."""
    registers = -(-analysis.registers // 8) * 8 * 32 * warps
    return min(
        65536 // registers,
        target.limits.shared_per_sm // (shared_bytes + 1024),
        target.limits.max_warps_per_sm // warps,
    )


def predict(analysis: Analysis, work: Work, warps: int, programs: int, target: Card) -> Bound | None:
    """Returns the bound of the worst main loop, or of the whole program if it has none.

    Args:
        analysis: the instructions.
        work: the work of all warps in one pass over the loop, or in the program.
        warps: the warps of one program that run through the loop.
        programs: programs on one SM, by :func:`occupancy`.
        target: the card.
    """
    if work.fma:
        if not analysis.loops or programs < 1:
            return None
        return min((_loop(x, work, warps, programs, target) for x in analysis.loops), key=lambda bound: bound.fraction)
    mix = max((loop.mix for loop in analysis.loops), key=lambda mix: sum(mix.values()), default=analysis.mix)
    cycles = {"issue": sum(mix.values()) * warps / 4}
    cycles |= {unit: time * warps / 4 for unit, time in _unit_times(mix, target).items()}
    per_cycle = target.bandwidth * 1e12 / (target.sms * target.clock_ghz * 1e9)
    cycles["memory"] = work.loaded / per_cycle
    limit = max(cycles, key=lambda name: cycles[name])
    return Bound(limit, cycles["memory"] / cycles[limit], cycles)


def _loop(loop: Loop, work: Work, warps: int, programs: int, target: Card) -> Bound:
    parts = max(warps // 4, 1) if _BY_WARP & loop.mix.keys() else work.groups
    groups = programs * parts
    share = warps / parts / 4
    tensor = work.fma / parts / (_rate(loop.mix, target) * target.limits.bf16_fma)
    units = {unit: time * share for unit, time in _unit_times(loop.mix, target).items()}
    units["issue"] = loop.instructions * share
    alone = max(loop.stalls, *units.values())
    cycles = {unit: groups * time for unit, time in units.items()}
    cycles["tensor"] = groups * tensor
    cycles["memory"] = programs * work.loaded / _L2_BYTES_PER_CYCLE
    cycles["latency"] = (tensor / 2 if loop.overlapped else tensor) + alone
    limit = max(cycles, key=lambda name: (cycles[name], name == "tensor"))
    return Bound(limit, cycles["tensor"] / cycles[limit], cycles)


def _rate(mix: Mapping[str, int], target: Card) -> int:
    """Returns the tensor cores' rate in a loop over that for bf16; 1 where the loop mixes kinds of operands."""
    if any(name in mix for name in target.limits.mma_opcodes):
        return 1
    return next((getattr(target.limits, kind) for kind, names in EIGHT_BITS.items() if mix.keys() & set(names)), 1)


def _unit_times(mix: Mapping[str, int], target: Card) -> dict[str, float]:
    """Returns the cycles of one warp on every unit of its scheduler."""
    times = {
        unit: float(sum(mix.get(name, 0) * rate for name, rate in rates.items())) for unit, rates in _UNITS.items()
    }
    if target.capability == 80:
        times["fma"] *= 2  # 16 lanes a scheduler instead of 32
    return times
