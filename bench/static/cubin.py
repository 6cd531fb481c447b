"""Reading a compiled kernel's machine code: its registers, its spills, and the instructions of its loops.

The ``cuobjdump`` and ``nvdisasm`` that come with Triton are used, so nothing else must be installed. ``nvdisasm`` takes
most of a second to start, so the code of many kernels is joined and read at once.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TENSOR_OPCODES = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCMMA")

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


def _code(binary: bytes) -> bytes:
    """Returns the machine code in a cubin, an ELF file with one section of code for its one kernel."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, number, names = struct.unpack_from("<HHH", binary, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", binary, table + i * size) for i in range(number)]
    start = sections[names][4]
    (code,) = [s for s in sections if binary.startswith(b".text.", start + s[0])]
    return binary[code[4] : code[4] + code[5]]


def _run(tool: str, content: bytes, *options: str) -> str:
    """Returns what a tool prints of a file with this content."""
    import triton.backends.nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        path = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


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
    return Analysis(int(found[1]), mix["LDL"], mix["STL"], len(instructions), dict(mix), loops)


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
