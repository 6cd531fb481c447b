"""Cases under compute-sanitizer, many a process; a process that is not clean is split until one case is to blame."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.operators.discover import all_cases, operator_name
from bench.records.read import ROOT
from bench.sanitize.planted import PLANTED
from bench.sanitize.tool import command_of, errors_of, first_words

#: The first port that compute-sanitizer may use, and how many a process may try.
FIRST_PORT, PORTS = 49152, 16
#: Seconds for a case, and for a process to begin; generous, since a tool may slow a kernel down a hundred times.
CASE_SECONDS, BEGIN_SECONDS = 45, 60


class Watched:
    """A process that runs cases under a check; its report and the lines of its cases are there when it has ended."""

    def __init__(self, tool: Path, check: str, numbers: Sequence[int], folder: Path, slot: int, planted: bool = False):
        self.numbers, self.slot, self.report = list(numbers), slot, ""
        self.lines: dict[int, dict[str, Any]] = {}
        name = "planted" if planted else f"{numbers[0]:03}-{numbers[-1]:03}"
        self._lines, self._report = folder / f"{check}-{name}.jsonl", folder / f"{check}-{name}.txt"
        self._lines.write_text("")
        program = [sys.executable, "-m", "bench.sanitize.program", str(self._lines.resolve())]
        program += ["--seconds", str(BEGIN_SECONDS + CASE_SECONDS * len(numbers))]
        program += ["--planted", check] if planted else ["--cases", ",".join(map(str, numbers))]
        # Without torch's own cache of memory every tensor is an allocation, with an end that can be seen.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
        with self._report.open("w") as report:
            self._process = subprocess.Popen(
                command_of(tool, check, FIRST_PORT + PORTS * slot, program),
                cwd=ROOT, env=environment, stdout=report, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def ended(self) -> bool:
        """Returns whether the process has ended, and then reads what it has left."""
        if self._process.poll() is None:
            return False
        self.lines = {line["case"]: line for line in map(json.loads, self._lines.read_text().splitlines())}
        self.report = self._report.read_text(errors="replace")
        return True

    @property
    def errors(self) -> int | None:
        """The errors that the report counts; None where it is not whole."""
        return errors_of(self.report)

    def clean(self, numbers: Sequence[int]) -> bool:
        """Returns whether all of these cases ended well and nothing was found."""
        ended = all(number in self.lines and "status" not in self.lines[number] for number in numbers)
        return ended and self.errors == 0 and self._process.returncode == 0

    @property
    def why(self) -> str:
        """The reason why this process is not clean."""
        return first_words(self.report) or f"its process ended with {self._process.returncode} and said nothing"

    def kill(self) -> None:
        """Kills the process and waits for its end."""
        self._process.kill()
        self._process.wait()


def find_planted(tool: Path, check: str, folder: Path) -> str | None:
    """Returns why a check is not to be trusted on this machine; None if it finds the fault that is planted for it."""
    process = Watched(tool, check, [], folder, 0, planted=True)
    try:
        while not process.ended():
            time.sleep(0.1)
    finally:
        process.kill()
    # The kernel must be named, since a program that fails in another way is an error of the report too.
    if process.errors and PLANTED[check].__name__ in process.report:
        return None
    return f"it did not find the fault planted for it: {process.why}"


def watch_cases(tool: Path, check: str, numbers: Sequence[int], jobs: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields a row for every case, as each is known.

    Args:
        tool: the program compute-sanitizer.
        check: one of :data:`bench.sanitize.tool.TOOLS`.
        numbers: positions of the cases in ``all_cases()``.
        jobs: processes at once.
        folder: where their reports are written.
    """
    # Neighbours stay together: an operator that is not clean splits few processes.
    share = max(-(-len(numbers) // jobs), 1)
    waiting = deque(list(numbers[i : i + share]) for i in range(0, len(numbers), share))
    running: list[Watched] = []
    try:
        while waiting or running:
            free = [slot for slot in range(jobs) if slot not in {r.slot for r in running}]
            while waiting and free:
                running.append(Watched(tool, check, waiting.popleft(), folder, free.pop(0)))
            time.sleep(0.1)
            for process in [process for process in running if process.ended()]:
                running.remove(process)
                some = process.numbers
                if len(some) > 1 and not process.clean(some):
                    waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
                else:
                    yield from (_row(check, number, process) for number in some)
    finally:
        for process in running:
            process.kill()


def _row(check: str, number: int, process: Watched) -> dict[str, Any]:
    """Returns the row of a case in a clean process, or alone in one."""
    case, line = all_cases()[number], process.lines.get(number, {})
    kernels = line.get("kernels", [])
    row: dict[str, Any] = {"tool": check, "case": case.name, "operator": operator_name(case)}
    row |= {"errors": process.errors, "kernels": ", ".join(kernels)}
    if process.clean([number]):
        return row if kernels else row | {"status": "failed", "reason": "it launched no kernel of this library"}
    if "status" in line and not process.errors:
        return row | {"status": line["status"], "reason": line["reason"]}
    return row | {"status": "failed", "reason": process.why}
