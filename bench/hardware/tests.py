"""Runs the tests marked ``gpu`` in several processes and makes a row of each.

A device that is lost ends its process, and the tests that were left to it go on in a new one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

from bench.records.read import ROOT
from bench.records.write import Table
from model.errors import require

#: New processes for what is left of a share, at most.
RETRIES = 4
#: Exit codes of pytest and of Python after Ctrl+C.
INTERRUPTED = (2, 130, -2)
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


def run_tests(names: Sequence[str], shares: int, folder: Path, table: Table) -> None:
    """Runs all tests in ``shares`` processes at once and adds a row for each."""
    with ThreadPoolExecutor(shares) as pool:
        jobs = [pool.submit(_run_share, names[i::shares], folder / f"tests-{i}") for i in range(shares)]
        added = set()
        try:
            for job in as_completed(jobs):
                added.add(job)
                for row in job.result():
                    table.add(row)
        except KeyboardInterrupt:
            # The processes were interrupted too, and end with what they have found.
            for job in set(jobs) - added:
                for row in job.result():
                    table.add(row)
            raise


def _run_share(names: Sequence[str], place: Path, tries: int = 0) -> list[dict[str, object]]:
    """Returns the rows of tests in a process of their own, and of what it left in new ones; ``place`` names files."""
    if not names:
        return []
    if tries > RETRIES:
        return [{"test": name, "status": "not reached", "reason": f"process ended {tries} times"} for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", LOST]
    with place.with_suffix(".txt").open("w") as log:
        report = place.with_suffix(".xml")
        command += [f"--junitxml={report}", *names]
        ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    rows = read_junit(report)
    left = [name for name in names if name not in {row["test"] for row in rows}]
    if ended.returncode in INTERRUPTED:  # begins nothing anew
        return rows + [{"test": name, "status": "not reached", "reason": "pytest was interrupted"} for name in left]
    # Any of them may have ended a process without a report: halves part it from the others.
    half = 0 if rows else len(left) // 2
    for part, letter in ((left[:half], "a"), (left[half:], "b")):
        rows += _run_share(part, place.with_name(f"{place.name}{letter}"), tries + 1)
    return rows


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
