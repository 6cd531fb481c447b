"""Runs the tests marked ``gpu`` in several processes and makes a row of each.

A device that is lost ends its process, and the tests that were left to it go on in a new one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench.records.read import ROOT
from bench.records.write import Table
from model.errors import require

#: New processes for what is left of a share, at most.
RETRIES = 4
LOST = "bench.hardware.lost_device"
#: The files of hardware tests, in ``tests``.
HARDWARE = "gpu/test_*.py"


def collect() -> list[str]:
    """Returns the names of all hardware tests. Their files import no package beyond those that a campaign needs.

    Raises:
        InputError: there is no pytest.
        RuntimeError: pytest cannot collect them.
    """
    require("pytest", "test")
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob(HARDWARE))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line for line in done.stdout.splitlines() if "::" in line and line.startswith("tests/")]
    if done.returncode or not names:
        raise RuntimeError(f"pytest collected nothing:\n{done.stdout[-2000:]}{done.stderr[-500:]}")
    return names


def run_tests(names: Sequence[str], shares: int, folder: Path, table: Table) -> Iterator[str]:
    """Runs all tests in ``shares`` processes at once, adds a row for each and yields its name."""
    waiting = [(list(names[i::shares]), 0) for i in range(shares) if names[i::shares]]
    running: list[tuple[subprocess.Popen[bytes], Path, list[str], int]] = []
    number = 0
    while waiting or running:
        while waiting:
            share, tries = waiting.pop()
            number += 1
            path = folder / f"tests-{number}.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", LOST]
            with path.with_suffix(".txt").open("w") as log:
                process = subprocess.Popen(
                    [*command, f"--junitxml={path}", *share], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
                )
            running.append((process, path, share, tries))
        for entry in list(running):
            process, path, share, tries = entry
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
            running.remove(entry)
            rows = read_junit(path)
            for row in rows:
                table.add(row)
                yield str(row["test"])
            left = [name for name in share if name not in {row["test"] for row in rows}]
            if tries < RETRIES:
                # Any of them may have ended a process without a report: halves part it from the others.
                half = 0 if rows else len(left) // 2
                waiting += [(part, tries + 1) for part in (left[:half], left[half:]) if part]
            for name in left if tries >= RETRIES else ():
                table.add({"test": name, "status": "not reached", "reason": f"process ended {tries + 1} times"})
                yield name


def read_junit(path: Path) -> list[dict[str, object]]:
    """Returns a row for each test of pytest's report; none if the process ended before it was written."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return []
    rows = []
    for case in root.iter("testcase"):
        file = (case.get("classname") or "").replace(".", "/")
        row: dict[str, object] = {"test": f"{file}.py::{case.get('name')}", "seconds": float(case.get("time") or 0)}
        for tag, status in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            found = case.find(tag)
            if found is not None:
                message = re.sub(r"\s+", " ", found.get("message") or found.text or tag)
                row |= {"status": status, "reason": message[:300]}
        rows.append(row)
    return rows
