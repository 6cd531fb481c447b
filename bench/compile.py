"""The static report: every kernel of the library, compiled for every GPU generation, without a GPU.

Each case of each operator goes through the public function in compile-only mode (:mod:`bench.compile_only`); the binary
is read (:mod:`bench.cubin`) and held against the card (:mod:`bench.bounds`). Nothing is executed: what the report
predicts is a bound, not a speed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from bench.bounds import occupancy, predict
from bench.compile_only import CompiledKernel, compiled_for, quiet_exit
from bench.cubin import TENSOR_OPCODES, analyse
from model.errors import InputError, require
from swifti2v_kernels import adaln, attention, attention_merge
from swifti2v_kernels.causal_conv3d import CASES as CAUSAL_CONV3D_CASES
from swifti2v_kernels.common.case import Case
from swifti2v_kernels.common.target import TARGETS, Target
from swifti2v_kernels.embed_window import CASES as EMBED_WINDOW_CASES
from swifti2v_kernels.frames_out import CASES as FRAMES_OUT_CASES
from swifti2v_kernels.project_step import CASES as PROJECT_STEP_CASES
from swifti2v_kernels.qk_norm_rope import CASES as QK_NORM_ROPE_CASES
from swifti2v_kernels.rms_norm_silu import CASES as RMS_NORM_SILU_CASES
from swifti2v_kernels.upsample_conv2d import CASES as UPSAMPLE_CONV2D_CASES

SCHEMA = "swifti2v-compile-1"
CASES: tuple[Case, ...] = (
    *attention.CASES,
    *attention_merge.CASES,
    *adaln.CASES,
    *QK_NORM_ROPE_CASES,
    *EMBED_WINDOW_CASES,
    *PROJECT_STEP_CASES,
    *CAUSAL_CONV3D_CASES,
    *UPSAMPLE_CONV2D_CASES,
    *FRAMES_OUT_CASES,
    *RMS_NORM_SILU_CASES,
)

EXAMPLES = """\
examples:
  python -m bench compile                          the whole table, about six minutes on two cores the first time
  python -m bench compile --check                  also fail on spills, too much shared memory, missing MMA (CI)
  python -m bench compile --targets 89,90 --cases "d128"
  python -m bench compile --json > report.json

Predicted bound: model of bench/bounds.py for the card named, as a fraction of its peak (tensor cores, or memory for
kernels without products). It is not a measurement; published kernels reach 0.55 to 0.79 of such bounds.
"""


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
    loop_instructions: int = 0
    loop_mix: dict[str, int] | None = None
    bound: str = ""
    bound_fraction: float | None = None
    bound_tflops: float | None = None
    seconds: float = 0.0
    computes_products: bool = False

    def faults(self) -> list[str]:
        """What ``--check`` objects to."""
        if self.error is not None:
            return [f"does not compile: {self.error.strip().splitlines()[-1][:200]}"]
        faults = []
        if self.spill_loads or self.spill_stores:
            faults.append(f"spills: {self.spill_loads} loads, {self.spill_stores} stores")
        if self.shared_bytes > self.shared_limit:
            faults.append(f"shared memory: {self.shared_bytes} of {self.shared_limit} bytes")
        if self.computes_products and not set(self.mma.split("+")) & set(TARGETS[self.capability].mma_opcodes):
            faults.append(
                f"tensor cores: expected {' or '.join(TARGETS[self.capability].mma_opcodes)}, got {self.mma or 'none'}"
            )
        return faults


def add_parser(commands: Any, name: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        name,
        help="registers, spills, shared memory and predicted bounds of every kernel, without a GPU",
        description="Compiles every kernel in every shipped configuration for every target and reads the binaries.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", metavar="CC,CC,...", help=f"default {','.join(map(str, TARGETS))}")
    parser.add_argument("--cases", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    parser.add_argument("--check", action="store_true", help="exit with an error if any kernel has a fault")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--quick", action="store_true", help="only head_dim 128 on the newest of each kind: 89, 90")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """The report."""
    require("tabulate", "bench")
    targets, cases = _select(args)
    rows = compile_all(targets, cases, args.jobs)
    faults = [(row, fault) for row in rows for fault in row.faults()]
    if args.json:
        print(json.dumps(to_json(rows), indent=1))
    else:
        print(format_table(rows))
    if faults:
        lines = [f"  sm_{row.capability} {row.case} {row.kernel} {row.config}: {fault}" for row, fault in faults]
        message = f"{len(faults)} fault(s) in {len(rows)} kernels:\n" + "\n".join(lines)
        if args.check:
            raise InputError(message)
        print(message)
    elif args.check and not args.json:
        print(f"{len(rows)} kernels: no spills, shared memory within limits, tensor-core instructions as meant")


def _select(args: argparse.Namespace) -> tuple[list[int], list[int]]:
    text = args.targets or ("89,90" if args.quick else ",".join(map(str, TARGETS)))
    targets = []
    for part in text.split(","):
        if not part.strip().isdigit() or int(part) not in TARGETS:
            raise InputError(f"targets: expected some of {', '.join(map(str, TARGETS))}, got {part.strip()!r}")
        targets.append(int(part))
    wanted = args.cases or ("d128" if args.quick else "")
    cases = [i for i, case in enumerate(CASES) if wanted in case.name]
    if not cases:
        names = ", ".join(case.name for case in CASES)
        raise InputError(f"cases: no case contains {wanted!r}; the cases are {names}")
    if args.jobs < 1:
        raise InputError(f"jobs: expected at least 1, got {args.jobs}")
    return targets, cases


def compile_all(targets: list[int], cases: list[int], jobs: int) -> list[Row]:
    """Rows in the order of targets and cases; progress on stderr."""
    tqdm = require("tqdm", "generate").tqdm
    tasks = [(target, case) for target in targets for case in cases]
    results: dict[tuple[int, int], list[Row]] = {}
    context = multiprocessing.get_context("spawn")  # fork would copy Triton's and torch's threads
    with (
        tqdm(total=len(tasks), unit="kernel", dynamic_ncols=True, desc="compile", leave=False, disable=None) as bar,
        ProcessPoolExecutor(min(jobs, len(tasks)), context, initializer=quiet_exit) as pool,
    ):
        futures = {pool.submit(compile_case, *task): task for task in tasks}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            bar.update()
    return [row for task in tasks for row in results[task]]


def compile_case(capability: int, case: int) -> list[Row]:
    """The kernels that one case launches on one target."""
    import torch

    with warnings.catch_warnings(), compiled_for(capability) as kernels:
        warnings.simplefilter("ignore")  # Triton announces a changing default that every launch here sets explicitly
        CASES[case].run(torch.device("cpu"))
    if not kernels:
        return [Row(CASES[case].name, capability, "none", "", "the case launches no kernel")]
    return [_row(CASES[case], kernel, TARGETS[capability]) for kernel in kernels]


def _row(case: Case, kernel: CompiledKernel, target: Target) -> Row:
    tiles = [
        f"{name.removeprefix('BLOCK_').lower()}{kernel.constants[name]}" for name in _TILES if name in kernel.constants
    ]
    stages = [] if "NUM_STAGES" in kernel.constants else [f"s{kernel.num_stages}"]
    flags = ["tma"] if kernel.constants.get("DESCRIPTORS") or "NUM_K" in kernel.constants else []
    config = " ".join([*tiles, f"w{kernel.num_warps}", *stages, *flags])
    if kernel.error is not None:
        return Row(case.name, target.capability, kernel.name, config, kernel.error)
    analysis = analyse(kernel.binary)
    work = case.work(kernel.constants)
    programs = occupancy(analysis, kernel.shared_bytes, kernel.total_warps, target)
    bound = predict(analysis, work, kernel.num_warps * work.groups, programs, target)
    loop = max(analysis.loops, key=lambda x: x.instructions, default=None)
    return Row(
        case.name, target.capability, kernel.name, config, None, analysis.registers, analysis.spill_loads,
        analysis.spill_stores, kernel.shared_bytes, target.shared_per_block, programs,
        "+".join(name for name in TENSOR_OPCODES if name in analysis.mix),
        loop.instructions if loop else 0, loop.mix if loop else None,
        bound.limit if bound else "", bound.fraction if bound else None, bound.tflops(target) if bound else None,
        kernel.seconds, work.fma > 0,
    )  # fmt: skip


_TILES = ("BLOCK_M", "BLOCK_N", "TAIL_N", "BLOCK_K", "BLOCK_C", "BLOCK_D", "BLOCK_H", "BLOCK_P", "BLOCK", "NUM_STAGES")


def to_json(rows: list[Row]) -> dict[str, Any]:
    """The report as JSON, with the versions that it depends on."""
    import torch
    import triton

    return {
        "schema": SCHEMA,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "predicted_by": "bench/bounds.py; a bound, not a measurement",
        "cards": {str(cc): target.card for cc, target in TARGETS.items()},
        "rows": [vars(row) for row in rows],
    }


def format_table(rows: list[Row]) -> str:
    """The report for people."""
    from tabulate import tabulate

    cells = []
    for row in rows:
        card = TARGETS[row.capability].card
        if row.error is not None:
            cells.append([f"sm_{row.capability}", row.case, row.kernel, row.config, *[""] * 6, "does not compile"])
            continue
        mix = " ".join(f"{k}:{v}" for k, v in sorted((row.loop_mix or {}).items(), key=lambda item: -item[1])[:4])
        bound = "" if row.bound_fraction is None else f"{row.bound_fraction:.2f} {card}, by {row.bound}"
        cells.append([
            f"sm_{row.capability}", row.case, row.kernel.removesuffix("_kernel"), row.config, row.registers,
            f"{row.spill_loads}/{row.spill_stores}", f"{row.shared_bytes / 1024:.0f}/{row.shared_limit // 1024}",
            row.programs_per_sm, row.mma, f"{row.loop_instructions} ({mix})" if mix else "", bound,
        ])  # fmt: skip
    headers = [
        "target",
        "case",
        "kernel",
        "tile",
        "registers",
        "spills",
        "shared KiB",
        "programs/SM",
        "MMA",
        "main loop",
        "predicted bound",
    ]
    return tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True)
