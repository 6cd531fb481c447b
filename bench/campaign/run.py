"""Runs the parts one after another, each in a process of its own, and keeps what each has found as soon as it is done.

A part that takes too long is interrupted as by a user, then killed; one that crashes takes nothing with it. Parts that
are complete in the folder already are not run again; of two attempts at a part the better section is kept.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.campaign.parts import PARTS, Part
from bench.harness.session import RESULT
from bench.records.read import ROOT, folder_name, read_json
from bench.records.write import Record, dumps, new_section
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
        record: the campaign's file, a section a part; what an earlier campaign has left in the folder is kept.
        folder: each part's own results go to a folder in it.
        dry: whether the parts run at toy size, without time limits of their own.
        deadline: a monotonic time after which no part is begun and the running one is interrupted.
        say: prints a line.
    """
    failed, kept = [], record.data["sections"]
    earlier = _sections(record.path)
    for part in PARTS:
        # A campaign that was killed has left the running part's own file.
        for section in (earlier.get(part.name), _section_of(folder / part.name)):
            if section is not None:
                kept[part.name] = _better(section, kept.get(part.name))
    if kept:
        record.save()
    for part in parts:
        if part.name in kept and kept[part.name]["status"] == "complete":
            say(f"{part.name}: there already")
            continue
        left, reason = deadline - time.monotonic(), "the time given was over"
        if left < GRACE:
            say(f"{part.name}: not reached")
            kept.setdefault(part.name, new_section(part.answers, "not reached", reason=reason))
            record.save()
            continue
        say(f"{part.name}: {part.answers}")
        start, place = time.monotonic(), folder / part.name
        (place / RESULT).unlink(missing_ok=True)
        outcome: str | None = "interrupted"
        try:
            outcome = _run(part, place, dry, left if dry else min(part.seconds, left))
        finally:
            section = _section_of(place) or new_section(part.answers, "failed", reason="it wrote nothing")
            if section["status"] != "complete":
                section["reason"] = outcome or section["reason"]
            kept[part.name] = section = _better(section, kept.get(part.name))
            record.save()
        if section["status"] == "failed":
            failed.append(part.name)
        note = "" if section["status"] == "complete" else f", {section['status']}: {section['reason']}"
        say(f"  {time.monotonic() - start:.0f} s{note}")
    return failed


def _better(section: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the complete one of two attempts, or the one with more results."""
    if earlier is None or section["status"] == "complete" or not _results(earlier):
        return section
    return section if _results(section) > _results(earlier) else earlier


def _results(section: dict[str, Any]) -> int:
    return sum(row["status"] == "ok" for table in section["tables"] for row in table["rows"])


def _run(part: Part, folder: Path, dry: bool, seconds: float) -> str | None:
    """Runs the part's process; returns why it did not end by itself or well, or None."""
    given = shlex.split(part.toy if dry else part.command)
    command = [sys.executable, "-m", "bench", *given, "--out", str(folder.resolve())]
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


def _section_of(folder: Path) -> dict[str, Any] | None:
    """Returns the only section of a part's own file, or None where there is no file."""
    return next(iter(_sections(folder / RESULT).values()), None)


def _sections(path: Path) -> dict[str, Any]:
    """Returns the sections of a file by name; none where there is no file."""
    if not path.exists():
        return {}
    try:
        sections = dict(read_json(path)["sections"])
        for section in sections.values():
            running = section["status"] == "running"  # its process was killed
            section |= {"status": "interrupted", "reason": "it was cut short"} if running else {}
            _results(section)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected a result; remove {path.parent} or name another --out") from error
    return sections


def save_result(record: Record, folder: Path) -> Path:
    """Copies the campaign's file to ``folder/<gpu>/<date>-<commit>.json``; returns that path."""
    environment = record.data["environment"]
    commit = (environment["git"] or {}).get("commit") or "unknown"
    path = folder / folder_name(environment["device"]) / f"{environment['date'][:10]}-{commit[:7]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dumps(record.data))
    return path
