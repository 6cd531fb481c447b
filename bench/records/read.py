"""Reading result files: whole, of this version, and of the form that ``results.schema.json`` describes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from bench.records.write import SCHEMA, VERSION
from model.errors import InputError, require

ROOT = Path(__file__).resolve().parent.parent.parent
DESCRIPTION = ROOT / "bench" / "results.schema.json"
SHIPPED = ROOT / "bench" / "results"


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads a result file and checks it.

    Raises:
        InputError: it is missing, cut off, of another version, or of another form; the message says which and where.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not a text file") from error
    if not text.strip():
        raise InputError(f"{path}: is empty")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg
        what = "is cut off" if cut else "is not JSON"
        raise InputError(f"{path}: {what} (line {error.lineno}, column {error.colno}: {error.msg})") from error
    _check_version(path, data)
    faults = sorted(_validator().iter_errors(data), key=lambda fault: len(fault.absolute_path), reverse=True)
    if faults:
        where = "/".join(map(str, faults[0].absolute_path)) or "the top"
        raise InputError(f"{path}: at {where}: {faults[0].message[:200]} ({len(faults)} fault(s) in all)")
    return data


def _check_version(path: Path, data: Any) -> None:
    given = data.get("schema") if isinstance(data, dict) else None
    if given is None:
        raise InputError(f"{path}: is not a result of python -m bench (no field 'schema')")
    if given != SCHEMA:
        raise InputError(
            f"{path}: schema {given!r} is of an earlier bench; this one reads {SCHEMA!r} version {VERSION}:"
            " run that benchmark again"
        )
    version = data.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        advice = "update this checkout" if newer else "run that benchmark again"
        raise InputError(f"{path}: version {version!r} of {SCHEMA}, but this bench reads version {VERSION}: {advice}")


@functools.cache
def _validator() -> Any:
    jsonschema = require("jsonschema", "bench")
    return jsonschema.Draft202012Validator(json.loads(DESCRIPTION.read_text()))


def label_of(path: str | Path, data: dict[str, Any]) -> str:
    """Returns a file's name in comparisons: card, commit and date."""
    environment = data["environment"]
    git = environment["git"] or {}
    commit = git["commit"][:7] if git.get("commit") else "no commit"
    commit += "+changes" if git.get("dirty") else ""
    return f"{environment['device']}, {commit}, {environment['date'][:10]}"


def shipped_results() -> list[Path]:
    """Returns the result files in the repository."""
    return sorted(SHIPPED.glob("*/*.json"))


def folder_name(device: str) -> str:
    """Returns the folder of a card's results: ``NVIDIA H200`` is ``nvidia-h200``."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
