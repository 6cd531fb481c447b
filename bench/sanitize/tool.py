"""NVIDIA's compute-sanitizer: where it is, how it is called, and what its reports say."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from model.errors import InputError

NAME = "compute-sanitizer"
#: The faults that each tool finds: ``memcheck`` in global, shared and local memory, ``racecheck`` in shared memory.
TOOLS = {
    "memcheck": "accesses out of bounds or misaligned, bulk copies and warp-group matmul included",
    "racecheck": "hazards between threads in shared memory, asynchronous copies included",
}
#: Only kernels of this form are watched: ours all end so, and those of torch and of its libraries have mangled names.
KERNELS = r"^[a-z]\w*_kernel$"
#: Seconds until the program first calls CUDA; the tool's own ten are over before torch is imported and a GPU found.
LAUNCH_SECONDS = 120
#: Bytes between allocations, so that what runs over one does not land in the next.
PADDING = 512
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) ")
_LINE = re.compile(r"^=+ ?(.*)$", re.MULTILINE)


def find_tool(given: str | None = None) -> Path:
    """Returns the program: as given, in PATH, or of a CUDA toolkit at its usual places.

    Raises:
        InputError: there is none.
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise InputError(f"tool: expected a program, {given!r} is none")
        return Path(found)
    places = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{x}/bin" for x in places if x), "/usr/local/cuda/bin"])
    found = shutil.which(NAME, path=path)
    if found is None:
        raise InputError(
            f"tool: no {NAME} in PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda; it is part of NVIDIA's CUDA toolkit"
        )
    return Path(found)


def command_of(tool: Path, check: str, port: int, program: Sequence[str]) -> list[str]:
    """Returns the command line that runs ``program`` under one of the checks.

    Args:
        tool: as of :func:`find_tool`.
        check: one of :data:`TOOLS`.
        port: the first port that it may use; calls that run at once need different ones.
        program: the program and its arguments.
    """
    options = ["--tool", check, "--target-processes", "application-only", "--destroy-on-device-error", "kernel"]
    options += ["--kernel-name", f"regex={KERNELS}", "--port", str(port), "--show-backtrace", "no"]
    options += ["--launch-timeout", str(LAUNCH_SECONDS)]
    # torch asks for much that a driver may not have; launches that fail are seen by the program itself.
    options += ["--report-api-errors", "no", "--padding", str(PADDING)] if check == "memcheck" else []
    return [str(tool), *options, *program]


def errors_of(text: str) -> int | None:
    """Returns how many errors or hazards a report counts; None where it is not whole."""
    found = _SUMMARY.findall(text)
    return int(found[-1]) if found else None


def first_words(text: str) -> str | None:
    """Returns the first thing that a report says beyond its title, in one line; None if it says nothing."""
    words: list[str] = []
    for line in _LINE.findall(text):
        if line.strip() == "COMPUTE-SANITIZER" or _SUMMARY.match(f"= {line}"):
            continue
        if not line.strip():
            if words:
                break
            continue
        words.append(line.strip())
    return " ".join(words)[:300] or None
