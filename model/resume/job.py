"""The job of a run: what is made, of which inputs, by which software on which device; its file, and what differs in it.

A job is a dictionary of sections, which are dictionaries too, as JSON has them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import swifti2v_kernels
from model.errors import InputError, one_line
from model.io.durable import open_plain, write_text

#: Version of the layout of a run's folder and its files.
SCHEMA = 3
#: How the file of a job begins, by which it is told from a user's file of its name.
BEGINS = b'{\n  "schema": '
#: Sections in which a difference means that the rest of the run has other bits, not that it is another run.
INEXACT = ("software", "machine")
#: Sections that are kept for the reader and not compared, such as the command as it was given.
UNCOMPARED = ("arguments",)


def complete_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a job as it comes back from its file, where tuples are lists, with the section ``software``."""
    return json.loads(json.dumps({**job, "software": software()}, allow_nan=False))


def job_digest(job: dict[str, Any]) -> str:
    """Returns the sha256 of a job, which binds the files of a run to it."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def write_job(path: Path, job: dict[str, Any]) -> None:
    """Writes the file of a job, which is there as a whole or not at all."""
    text = json.dumps({"schema": SCHEMA, "sha256": job_digest(job), "job": job}, indent=2)
    write_text(path, text + "\n")


def read_job(path: Path) -> dict[str, Any]:
    """Returns the job in a file that anybody may have written.

    Raises:
        InputError: it cannot be read, is of another schema, was changed, or is no job.
    """
    try:
        with os.fdopen(open_plain(path), encoding="utf-8") as file:
            stored = json.load(file)
        schema, digest, job = stored["schema"], stored["sha256"], stored["job"]
        found = job_digest(job)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"run: {path} is not readable as the job of a run: {error}") from error
    if schema != SCHEMA:
        raise InputError(
            f"run: {path} has schema version {schema!r}, this program reads {SCHEMA}: go on with the program that began"
            " the run, or begin anew"
        )
    if digest != found:
        raise InputError(f"run: {path} is damaged or was edited (sha256 differs)")
    if not isinstance(job, dict) or not all(isinstance(section, dict) for section in job.values()):
        raise InputError(f"run: {path} is not readable as the job of a run: expected sections, each an object")
    return job


def software() -> dict[str, str | None]:
    """Returns the versions of the software that computes and encodes; None for what is not installed."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "swifti2v_kernels": swifti2v_kernels.__version__,
    }
    for package in ("torch", "triton", "av"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def device_name(device: torch.device) -> str:
    """Returns the name of a device: the card's name, or the kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


class Changes(NamedTuple):
    """The differences between a stored job and another, a line each: ``request.seed: 7 in the stored run, now 8``.

    A run cannot go on as this job if there are any in ``forbidding``. With those in ``inexact`` it can, but what is
    still to come is not the same bit for bit as it would have been.
    """

    forbidding: list[str]
    inexact: list[str]


def changes_between(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Returns the differences between two jobs."""
    changes = Changes([], [])
    for section in sorted(stored.keys() | now.keys()):
        if section not in UNCOMPARED:
            found = _differences(one_line(section), stored.get(section, {}), now.get(section, {}))
            changes[section in INEXACT].extend(found)
    return changes


def _differences(where: str, stored: Any, now: Any) -> list[str]:
    if isinstance(stored, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(stored.keys() | now.keys()):
            name = f"{where}.{one_line(key)}"
            if key not in now:
                lines.append(f"{name}: {_shown(stored[key])} in the stored run, not given now")
            elif key not in stored:
                lines.append(f"{name}: not in the stored run, now {_shown(now[key])}")
            else:
                lines += _differences(name, stored[key], now[key])
        return lines
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        pairs = enumerate(zip(stored, now, strict=True))
        return [line for index, pair in pairs for line in _differences(f"{where}[{index}]", *pair)]
    # JSON tells 1 from 1.0 and from true, Python's == does not.
    if json.dumps(stored) == json.dumps(now):
        return []
    return [f"{where}: {_shown(stored)} in the stored run, now {_shown(now)}"]


def _shown(value: Any) -> str:
    text = one_line(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
