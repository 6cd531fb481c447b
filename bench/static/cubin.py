"""Reading a compiled kernel's machine code: its registers, its spills, and the instructions of its loops.

The ``cuobjdump`` and ``nvdisasm`` that come with Triton are used, so nothing else must be installed. Results are kept
by the hash of the binary, since disassembling is most of a warm report's time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from model.io.durable import write_text

#: The version of stored results, which changes with their meaning.
VERSION = 4
TENSOR_OPCODES = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCMMA")

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_x_\d+|\.L_\d+):")
_USAGE = re.compile(r"REG:(\d+)")


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


def analyse(binary: bytes) -> Analysis:
    """Reads a cubin, or the stored result of the same cubin, and returns its analysis."""
    path = cache_directory() / f"{hashlib.sha256(binary).hexdigest()}-{VERSION}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        return Analysis(**{**stored, "loops": [Loop(**loop) for loop in stored["loops"]]})
    result = _read(*_disassemble(binary))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(result)))
    return result


def cache_directory() -> Path:
    """Returns ``$XDG_CACHE_HOME/swifti2v/cubin``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swifti2v" / "cubin"


def _disassemble(binary: bytes) -> tuple[str, str]:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        run = [
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in (
                [tools / "nvdisasm", "-hex", "-c", file.name],
                [tools / "cuobjdump", "-res-usage", file.name],
            )
        ]
    return run[0], run[1]


def _read(listing: str, usage: str) -> Analysis:
    instructions, labels = _parse(listing)
    opcodes = [opcode(text) for text, _ in instructions]
    mix = Counter(opcodes)
    found = _USAGE.search(usage)
    if found is None:
        raise ValueError(f"cuobjdump did not report registers: {usage[:200]!r}")
    loops = []
    for first, last in _main_loops(instructions, labels, opcodes):
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


def _parse(listing: str) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Returns the instructions with their stall counts, and the positions of labels."""
    instructions: list[tuple[str, int]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[2].strip(), 0))
        elif (second := _SECOND_WORD.match(line)) and instructions:
            # Bits 105 to 108 of the 128-bit instruction word.
            instructions[-1] = (instructions[-1][0], (int(second[1], 16) >> 41) & 0xF)
    return instructions, labels


def opcode(text: str) -> str:
    """Returns the name of an instruction: ``HMMA`` of ``@!P0 HMMA.16816.F32 R4, ...``."""
    text = re.sub(r"^@!?U?P\w+\s+", "", text)
    return text.split()[0].split(".")[0].rstrip(";")


def _main_loops(
    instructions: list[tuple[str, int]], labels: dict[str, int], opcodes: list[str]
) -> list[tuple[int, int]]:
    """Returns first and last instruction of each backward branch that does the kernel's work, innermost ones only."""
    wanted = set(TENSOR_OPCODES) if set(TENSOR_OPCODES) & set(opcodes) else {"LDG"}
    loops = []
    for i, (text, _) in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", text)
        start = labels.get(branch[1]) if branch else None
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
