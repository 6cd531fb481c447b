"""Runs the parts one after another, each in a process of its own, and keeps what each has found as soon as it is done.

A part that takes too long is interrupted as by a user, then killed; one that crashes takes nothing with it. Parts that
are complete in the folder already are not run again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.campaign.parts import PARTS, Part
from bench.harness.session import RESULT
from bench.records.read import ROOT, read_json
from bench.records.write import Record, dumps, now
from model.errors import InputError
from model.io.durable import write_text

#: Seconds that an interrupted part has to write what it has.
GRACE = 8.0


def run_parts(
    parts: Sequence[Part], record: Record, folder: Path, *, dry: bool, deadline: float, say: Callable[[str], object]
) -> list[str]:
    """Runs the parts; returns the names of those that failed.

    Args:
        parts: what to run, in order.
        record: the campaign's file, a section a part.
        folder: each part's own results go to a folder in it.
        dry: whether the parts run at toy size, without time limits of their own.
        deadline: a monotonic time after which no part is begun and the running one is interrupted.
        say: prints a line.
    """
    failed = []
    for part in PARTS:
        _recover(folder / part.name)
    found = {part.name: _section(folder / part.name) for part in PARTS}
    for part in PARTS:
        # Parts that this call does not ask for are kept too: the file holds all that the folder does.
        known = found[part.name]
        if known is not None:
            _keep(record, part, known)
    for part in parts:
        known = found[part.name]
        if known is not None and known["status"] == "complete":
            say(f"{part.name}: there already")
            continue
        left = deadline - time.monotonic()
        if left < GRACE:
            say(f"{part.name}: not reached")
            if known is None:
                _keep(record, part, _missing(part, "not reached", "the time given was over"))
            continue
        say(f"{part.name}: {part.answers}")
        start, place = time.monotonic(), folder / part.name
        earlier = _set_aside(place) if known is not None else None
        outcome: str | None = "interrupted"
        try:
            outcome = _run(part, place, dry, left if dry else min(part.seconds, left))
        finally:
            section = _finished(part, place, outcome)
            if earlier is not None:
                section = _better(place, section, earlier, known)
            _keep(record, part, section)
        if section["status"] == "failed":
            failed.append(part.name)
        note = "" if section["status"] == "complete" else f", {section['status']}: {section['reason']}"
        say(f"  {time.monotonic() - start:.0f} s{note}")
    return failed


def _set_aside(place: Path) -> Path:
    """Copies what an earlier attempt has left, and takes its result away so that a new one can go on in its place."""
    earlier, half = _aside(place), place.with_name(f".{place.name}")
    for former in (earlier, half):
        shutil.rmtree(former, ignore_errors=True)
    shutil.copytree(place, half)
    half.rename(earlier)  # whole, or not there
    (place / RESULT).unlink()
    return earlier


def _aside(place: Path) -> Path:
    return place.with_name(f"{place.name}-earlier")


def _recover(place: Path) -> None:
    """Finds the earlier attempt that a killed campaign has set aside, and keeps the better of the two."""
    earlier = _aside(place)
    known = _section(earlier)
    if known is not None:
        _better(place, _section(place) or {"status": "failed", "tables": []}, earlier, known)


def _finished(part: Part, place: Path, outcome: str | None) -> dict[str, Any]:
    """Returns the section of a part that has ended, well or not."""
    section = _section(place)
    if section is None:
        return _missing(part, "failed", outcome or "it wrote nothing")
    if section["status"] != "complete":
        section["reason"] = outcome or section["reason"]
    return section


def _better(place: Path, section: dict[str, Any], earlier: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Returns the complete one of two attempts, or the one with more results; removes the other's files."""
    if section["status"] == "complete" or _results(section) > _results(known):
        shutil.rmtree(earlier)
        return section
    shutil.rmtree(place)
    earlier.rename(place)
    return known


def _run(part: Part, folder: Path, dry: bool, seconds: float) -> str | None:
    """Runs the part's process; returns why it did not end by itself or well, or None."""
    command = [sys.executable, "-m", "bench", *(part.toy if dry else part.arguments), "--out", str(folder.resolve())]
    command += ["--device", "cpu"] if dry else []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "5"}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            preexec_fn=_listen,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            return f"interrupted after {seconds:.0f} s"
        except BaseException:
            _stop(process)
            raise
    if code == 0:
        return None
    tail = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()][-1:]
    return f"exit code {code}{f': {tail[0][:300]}' if tail else ''}"


def _listen() -> None:
    """Lets a new process be interrupted, also where this one was started in the background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a process and all that it has started, and kills them where they have not ended seconds later."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _section(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULT
    if not path.exists():
        return None
    found = read_json(path)
    try:
        (section,) = found["sections"].values()
        status, _ = section["status"], section["tables"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected the result of one part; remove {folder} or name another --out") from error
    if status == "running":  # its process was killed
        section |= {"status": "interrupted", "reason": "it was cut short"}
    return section


def _results(section: dict[str, Any]) -> int:
    return sum(row["status"] == "ok" for table in section["tables"] for row in table["rows"])


def _missing(part: Part, status: str, reason: str) -> dict[str, Any]:
    return {
        "title": part.answers, "status": status, "reason": reason, "started": now(), "seconds": None, "settings": {},
        "ceilings": None, "machine": None, "tables": [], "timelines": [], "verdicts": [], "notes": [],
        "package_entries": {},
    }  # fmt: skip


def _keep(record: Record, part: Part, section: dict[str, Any]) -> None:
    record.data["sections"][part.name] = section
    record.save()


def save_result(record: Record, folder: Path) -> Path:
    """Copies the campaign's file to ``folder/<gpu>/<date>-<commit>.json``; returns that path."""
    from bench.records.read import folder_name

    environment = record.data["environment"]
    commit = (environment["git"] or {}).get("commit") or "unknown"
    path = folder / folder_name(environment["device"]) / f"{environment['date'][:10]}-{commit[:7]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dumps(record.data))
    return path
