"""The static report: every kernel of the library, compiled for every GPU generation, without a GPU.

Each case of each operator goes through the public function in compile-only mode (:mod:`bench.static.compile_only`); the
binary is read (:mod:`bench.static.cubin`) and compared with the card (:mod:`bench.static.bounds`). Nothing is executed:
the report predicts a bound, not a speed.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from bench.operators.discover import all_cases
from bench.static.bounds import EIGHT_BITS, occupancy, predict
from bench.static.compile_only import CompiledKernel, compiled_for, quiet_exit
from bench.static.cubin import TENSOR_OPCODES, Analysis, Loop, analyse, serialised
from model.errors import InputError, require
from swifti2v_kernels.common.cards import Card
from swifti2v_kernels.common.case import Case
from swifti2v_kernels.common.target import TARGETS

CASES = all_cases()
#: The most cases whose binaries are read together, which is quick; progress moves by as many.
CHUNK = 8
IDENTITY = ("target", "case", "kernel", "tile")
METRICS = ("registers", "spills", "shared_bytes", "programs_per_sm", "bound_fraction")
COLUMNS = (*IDENTITY, *METRICS[:4], "mma", "main_loop", "bound_fraction", "bound")
NOTE = (
    "The predicted bound is that of bench/static/bounds.py for the card named, as a fraction of its peak (tensor cores,"
    " or memory for kernels without matmul). It is not a measurement; published kernels reach 0.55 to 0.79 of such"
    " bounds."
)


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one target."""

    case: str
    capability: int
    kernel: str
    config: str
    error: str | None
    registers: int = 0
    spill_loads: int = 0
    spill_stores: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0
    programs_per_sm: int = 0
    mma: str = ""
    loop: Loop | None = None
    bound: str = ""
    bound_fraction: float | None = None
    has_matmul: bool = False
    #: The key of ``EIGHT_BITS`` for operands of 8 bits; empty for those of 16.
    operands: str = ""
    #: Why matrix multiplications wait that were written to run while the program goes on; empty if none does.
    waits: str = ""

    def faults(self) -> list[str]:
        """Returns the faults for which ``--check`` fails, in words."""
        if self.error is not None:
            return [f"does not compile: {self.error.strip().splitlines()[-1][:200]}"]
        faults = []
        if self.spill_loads or self.spill_stores:
            faults.append(f"spills: {self.spill_loads} loads, {self.spill_stores} stores")
        if self.shared_bytes > self.shared_limit:
            faults.append(f"shared memory: {self.shared_bytes} of {self.shared_limit} bytes")
        wanted = EIGHT_BITS[self.operands] if self.operands else TARGETS[self.capability].limits.mma_opcodes
        if self.has_matmul and not set(self.mma.split("+")) & set(wanted):
            faults.append(f"tensor cores: expected {' or '.join(wanted)}, got {self.mma or 'none'}")
        if self.waits:
            faults.append(self.waits)
        return faults


def select_tasks(targets: list[int], cases: list[int], spread: int | None = None) -> list[tuple[int, int]]:
    """Returns pairs of a target and a case to compile, in the order of targets and cases.

    Args:
        targets: capabilities of cards.
        cases: indices into ``CASES``.
        spread: how many targets each case is compiled for. The cases of an operator take turns, and where these are few
            each gets more targets, so that the operator meets them all. None stands for every target that has a
            kernel for the case.

    Raises:
        InputError: no target has a kernel for any of the cases.
    """
    kinds = {case: (CASES[case].operator, CASES[case].least_capability) for case in cases}
    number, turns, tasks = Counter(kinds.values()), Counter[Any](), set()
    for case, kind in kinds.items():
        able = [target for target in targets if target >= CASES[case].least_capability]
        share = len(able) if spread is None else min(len(able), max(spread, -(-len(able) // number[kind])))
        tasks |= {(able[(turns[kind] + i) % len(able)], case) for i in range(share)}
        turns[kind] += share
    if not tasks:
        least = min(CASES[case].least_capability for case in cases)
        raise InputError(f"targets: expected one of {least} or newer for these cases, got {max(targets)}")
    return sorted(tasks, key=lambda task: (targets.index(task[0]), task[1]))


def compile_all(tasks: list[tuple[int, int]], jobs: int) -> list[Row]:
    """Compiles pairs of a target and a case; returns rows in their order. Progress is shown on stderr."""
    tqdm = require("tqdm", "generate").tqdm
    size = min(CHUNK, -(-len(tasks) // jobs))
    by_target = {target: [case for other, case in tasks if other == target] for target in dict(tasks)}
    chunks = [(target, cases[i : i + size]) for target, cases in by_target.items() for i in range(0, len(cases), size)]
    context = multiprocessing.get_context("spawn")  # fork would copy Triton's and torch's threads
    with ProcessPoolExecutor(min(jobs, len(chunks)), context, initializer=quiet_exit) as pool:
        found = pool.map(compile_cases, *zip(*chunks, strict=True))
        bar = tqdm(found, total=len(chunks), desc="compile", dynamic_ncols=True, leave=False, disable=None)
        return [row for rows in bar for row in rows]


def compile_cases(capability: int, cases: list[int]) -> list[Row]:
    """Returns a row for each kernel that these cases launch on one target."""
    import torch

    launches: list[tuple[Case, CompiledKernel | None]] = []
    for case in (CASES[i] for i in cases):
        with warnings.catch_warnings(), compiled_for(capability) as kernels:
            warnings.simplefilter("ignore")  # Triton announces a changing default, which every launch sets
            case.run(torch.device("cpu"))
        launches += [(case, kernel) for kernel in kernels or [None]]
    return rows_of(launches, TARGETS[capability])


def rows_of(launches: Sequence[tuple[Case, CompiledKernel | None]], target: Card) -> list[Row]:
    """Returns a row for each kernel, compiled for one target; None is that of a case that launched none."""
    compiled = [kernel for _, kernel in launches if kernel is not None and kernel.error is None]
    analyses = iter(analyse([kernel.binary for kernel in compiled], compiled[0].arch) if compiled else [])
    rows = []
    for case, kernel in launches:
        if kernel is None:
            rows.append(Row(case.name, target.capability, "none", "", "the case launches no kernel"))
        elif kernel.error is not None:
            rows.append(Row(case.name, target.capability, kernel.name, _config(kernel), kernel.error))
        else:
            rows.append(_row(case, kernel, next(analyses), target))
    return rows


def _row(case: Case, kernel: CompiledKernel, analysis: Analysis, target: Card) -> Row:
    work = case.work(kernel.constants)
    programs = occupancy(analysis, kernel.shared_bytes, kernel.total_warps, target)
    bound = predict(analysis, work, kernel.num_warps * work.groups, programs, target)
    return Row(
        case.name, target.capability, kernel.name, _config(kernel), None, analysis.registers, analysis.spill_loads,
        analysis.spill_stores, kernel.shared_bytes, target.limits.shared_per_block, programs,
        "+".join(name for name in TENSOR_OPCODES if name in analysis.mix),
        max(analysis.loops, key=lambda x: x.instructions, default=None),
        bound.limit if bound else "", bound.fraction if bound else None,
        work.fma > 0, next((_OPERANDS[t] for t in kernel.signature.values() if t in _OPERANDS), ""),
        _waits(kernel, analysis, work.groups),
    )  # fmt: skip


def _waits(kernel: CompiledKernel, analysis: Analysis, groups: int) -> str:
    if reason := serialised(analysis, kernel.ptx, kernel.arch):
        return f"wgmma serialised by ptxas: {reason}"
    # A kernel is split into groups so that the softmax runs while a multiplication does, in its own loop. ptxas undoes
    # it silently where it moves a wait up. Other kernels wait before their softmax as they are written.
    overlapped = sum(loop.overlapped for loop in analysis.loops)
    if groups > 1 and overlapped < groups:
        return f"overlap: exponentials run during a multiplication in {overlapped} of {groups} loops"
    return ""


def _config(kernel: CompiledKernel) -> str:
    tiles = [
        f"{name.removeprefix('BLOCK_').lower()}{kernel.constants[name]}" for name in _TILES if name in kernel.constants
    ]
    stages = [] if "NUM_STAGES" in kernel.constants else [f"s{kernel.num_stages}"]
    flags = ["tma"] if kernel.constants.get("DESCRIPTORS") or "NUM_K" in kernel.constants else []
    return " ".join([*tiles, f"w{kernel.num_warps}", *stages, *flags])


#: The kinds of 8-bit operands by their pointer types, as Triton writes these.
_OPERANDS = {"*fp8e4nv": "float8", "*i8": "int8"}
_TILES = ("BLOCK_M", "BLOCK_N", "TAIL_N", "BLOCK_K", "BLOCK_C", "BLOCK_D", "BLOCK_H", "BLOCK_P", "BLOCK", "NUM_STAGES")


def table_row(row: Row) -> dict[str, Any]:
    """Returns a row as result files have it."""
    data: dict[str, Any] = {
        "target": f"sm_{row.capability}", "case": row.case, "kernel": row.kernel.removesuffix("_kernel"),
        "tile": row.config, "basis": "compiled",
    }  # fmt: skip
    if row.error is not None:
        return data | {"status": "failed", "reason": row.faults()[0]}
    data |= {"registers": row.registers, "spills": row.spill_loads + row.spill_stores, "shared_bytes": row.shared_bytes}
    data |= {"shared_limit": row.shared_limit, "programs_per_sm": row.programs_per_sm, "mma": row.mma}
    most = sorted(row.loop.mix.items(), key=lambda item: -item[1])[:4] if row.loop else []
    mix = " ".join(f"{name}:{count}" for name, count in most)
    data |= {"main_loop": f"{row.loop.instructions} ({mix})" if row.loop else ""}
    if row.bound_fraction is None:
        return data
    return data | {"bound_fraction": row.bound_fraction, "bound": f"{TARGETS[row.capability].name}, by {row.bound}"}
