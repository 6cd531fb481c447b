"""Reading a compiled kernel's machine code: its registers, its spills, and the instructions of its loops.

The ``cuobjdump`` and ``nvdisasm`` that come with Triton are used, so nothing else must be installed. ``nvdisasm`` takes
most of a second to start, so the code of many kernels is joined and read at once.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

#: ``wgmma`` of 16-bit, float8 and int8 operands, which a Hopper GPU runs while its warps go on.
WGMMA_OPCODES = ("HGMMA", "QGMMA", "IGMMA")
TENSOR_OPCODES = (*WGMMA_OPCODES, "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCMMA")

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)$")
_USAGE = re.compile(r"REG:(\d+)")
#: The bytes of an instruction.
_SIZE = 16


@dataclass(frozen=True)
class Loop:
    """An innermost loop with tensor-core instructions or, in a kernel that has none, with loads from global memory.

    ``stalls`` sums the fixed stall counts that the compiler wrote into the instructions: the least cycles that one warp
    needs for one pass. ``overlapped`` says whether exponentials run while a matrix multiplication is in flight.
    """

    instructions: int
    stalls: int
    mix: dict[str, int]
    overlapped: bool


@dataclass(frozen=True)
class Analysis:
    """The contents of one kernel: registers, spills, counts of instructions by name, and its main loops."""

    registers: int
    spill_loads: int
    spill_stores: int
    instructions: int
    mix: dict[str, int]
    loops: list[Loop]
    #: Whether the kernel has ``wgmma`` instructions and waits for each of them before it issues the next.
    one_by_one: bool = False


def analyse(binaries: Sequence[bytes], arch: str) -> list[Analysis]:
    """Reads cubins that were compiled for one architecture, as PTX names it: ``sm_90a``; returns their analyses."""
    codes = [_code(binary) for binary in binaries]
    instructions = _instructions(_run("nvdisasm", b"".join(codes), "-hex", "-b", arch.replace("sm_", "SM")))
    if len(instructions) * _SIZE != sum(map(len, codes)):
        raise ValueError(f"nvdisasm: expected {sum(map(len, codes)) // _SIZE} instructions, got {len(instructions)}")
    analyses, first = [], 0
    for binary, code in zip(binaries, codes, strict=True):
        last = first + len(code) // _SIZE
        analyses.append(_read(instructions[first:last], first, _run("cuobjdump", binary, "-res-usage")))
        first = last
    return analyses


def serialised(analysis: Analysis, ptx: str, arch: str) -> str | None:
    """Returns why ptxas made the ``wgmma`` of a kernel wait for each other, in its own words; None if it did not.

    It then does so in the whole kernel and says so in a log that Triton drops. The machine code tells as much, at no
    cost: every ``wgmma`` is waited for, although the PTX groups them or goes on while one is in flight. So ptxas runs
    again only to name the reason.
    """
    together = ptx.count("wgmma.mma_async") > ptx.count("wgmma.commit_group")
    if not analysis.one_by_one or not (together or re.search(r"wgmma\.wait_group\S* [1-9]", ptx)):
        return None
    from triton.backends.nvidia.compiler import get_ptxas

    log = _run(get_ptxas(90).path, ptx.encode(), f"--gpu-name={arch}", f"--output-file={os.devnull}")
    found = re.search(r"instructions are serialized due to (.*) in the function", log)
    return found[1] if found else "every wgmma is waited for at once"


def _code(binary: bytes) -> bytes:
    """Returns the machine code in a cubin, an ELF file with one section of code for its one kernel."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, number, names = struct.unpack_from("<HHH", binary, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", binary, table + i * size) for i in range(number)]
    start = sections[names][4]
    (code,) = [s for s in sections if binary.startswith(b".text.", start + s[0])]
    return binary[code[4] : code[4] + code[5]]


def _run(tool: str, content: bytes, *options: str) -> str:
    """Returns what a tool, of Triton's or at a path, prints of a file with this content."""
    import triton.backends.nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        path = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
        command = [path, *options, file.name]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def _read(instructions: list[tuple[str, int]], address: int, usage: str) -> Analysis:
    opcodes = [opcode(text) for text, _ in instructions]
    mix = Counter(opcodes)
    found = _USAGE.search(usage)
    if found is None:
        raise ValueError(f"cuobjdump did not report registers: {usage[:200]!r}")
    loops = []
    for first, last in _main_loops(instructions, address, opcodes):
        body = instructions[first : last + 1]
        loops.append(
            Loop(
                len(body),
                sum(stall for _, stall in body),
                dict(Counter(opcodes[first : last + 1])),
                _overlaps([text for text, _ in body]),
            )
        )
    alone = _one_by_one([text for text, _ in instructions], opcodes)
    return Analysis(int(found[1]), mix["LDL"], mix["STL"], len(instructions), dict(mix), loops, alone)


def _instructions(listing: str) -> list[tuple[str, int]]:
    """Returns the instructions with their stall counts."""
    instructions: list[tuple[str, int]] = []
    for line in listing.splitlines():
        if found := _INSTRUCTION.match(line):
            instructions.append((found[2].strip(), 0))
        elif (second := _SECOND_WORD.match(line)) and instructions:
            # Bits 105 to 108 of the 128-bit instruction word.
            instructions[-1] = (instructions[-1][0], (int(second[1], 16) >> 41) & 0xF)
    return instructions


def opcode(text: str) -> str:
    """Returns the name of an instruction: ``HMMA`` of ``@!P0 HMMA.16816.F32 R4, ...``."""
    text = re.sub(r"^@!?U?P\w+\s+", "", text)
    return text.split()[0].split(".")[0].rstrip(";")


def _main_loops(instructions: list[tuple[str, int]], address: int, opcodes: list[str]) -> list[tuple[int, int]]:
    """Returns first and last instruction of each backward branch that does the kernel's work, innermost ones only.

    ``address`` is the number of the kernel's first instruction, as branches count.
    """
    wanted = set(TENSOR_OPCODES) if set(TENSOR_OPCODES) & set(opcodes) else {"LDG"}
    loops = []
    for i, (text, _) in enumerate(instructions):
        branch = _BRANCH.search(text)
        start = int(branch[1], 16) // _SIZE - address if branch else None
        # Out-of-line retries of barrier waits and the dispatch of specialised warps jump back as well.
        if start is None or start > i or {"EXIT", "BRX"} & set(opcodes[start:i]):
            continue
        if wanted & set(opcodes[start : i + 1]):
            loops.append((start, i))
    return [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def _one_by_one(texts: list[str], opcodes: list[str]) -> bool:
    """Returns whether there are ``wgmma`` instructions and a wait for all stands after each, before the next one."""
    steps = [text for text, name in zip(texts, opcodes, strict=True) if name in (*WGMMA_OPCODES, "WARPGROUP")]
    after = [step for before, step in pairwise([*steps, ""]) if opcode(before) in WGMMA_OPCODES]
    return bool(after) and all("DEPBAR" in step and step.endswith(" 0x0") for step in after)


def _overlaps(body: list[str]) -> bool:
    """Returns whether most exponentials run while a matrix multiplication is in flight.

    These stand between a wait that leaves a multiplication in flight and the wait for that multiplication.
    """
    inside = outside = 0
    in_flight = False
    for text in body:
        name = opcode(text)
        if name == "WARPGROUP" and "DEPBAR" in text:
            left = re.search(r"gsb\d+, (0x\w+)", text)
            in_flight = left is not None and int(left[1], 16) > 0
        elif name == "MUFU":
            inside, outside = inside + in_flight, outside + (not in_flight)
    return inside > outside
