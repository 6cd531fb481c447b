"""Reading result files: whole, of this version, and of the form that ``results.schema.json`` describes."""

from __future__ import annotations

import functools
import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.records.metrics import is_number
from bench.records.write import SCHEMA, VERSION
from model.errors import InputError, one_line, require
from model.machine.measure import format_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
DESCRIPTION = ROOT / "bench" / "results.schema.json"
SHIPPED = ROOT / "bench" / "results"
#: Bounds of a result file: its size, its levels, and the magnitude of a number that is not 0.
MOST_BYTES, DEPTH, LEAST, MOST = 50 * 10**6, 20, 1e-100, 1e30
NEVER_NEGATIVE = ("s", "1/s", "bytes", "B/s", "FLOP", "TFLOP/s", "J", "count")


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads a result file and checks it.

    Raises:
        InputError: it is missing, cut off, of another version, or of another form; the message says which and where.
    """
    data = read_json(path)
    if not isinstance(data, dict) or (data.get("schema"), data.get("version")) != (SCHEMA, VERSION):
        raise InputError(
            f"{path}: expected {SCHEMA} of version {VERSION}, as python -m bench writes it; run that benchmark again"
        )
    fault = max(_validator().iter_errors(data), key=lambda fault: len(fault.absolute_path), default=None)
    if fault is not None:
        given = repr(fault.instance)
        message = fault.message.replace(given, given if len(given) <= 60 else f"{given[:57]}...")
        raise _fault(path, fault.absolute_path, message[:400])
    for name, section in data["sections"].items():
        _check_tables(path, ("sections", name, "tables"), section["tables"])
    return data


def read_json(path: str | Path) -> Any:
    """Reads a file of strict JSON: no NaN, and no number beyond what readers reckon with.

    Raises:
        InputError: it cannot be read or is something else; the message says where.
    """
    text = read_text(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg
        what = "is cut off" if cut else "is not JSON"
        raise InputError(f"{path}: {what} (line {error.lineno}, column {error.colno}: {error.msg})") from error
    except (RecursionError, ValueError) as error:  # too deep, or an integer of thousands of digits
        raise InputError(f"{path}: is no result: {error}") from error
    _check_values(path, data)
    return data


def read_text(path: str | Path) -> str:
    """Reads a text file in UTF-8 that is not empty.

    Raises:
        InputError: it is something else; a pipe would never end, and a very large file is no result.
    """
    path = Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "Is a directory" if stat.S_ISDIR(found.st_mode) else "expected a file, not a pipe or a device"
            raise InputError(f"{path}: cannot be read: {what}")
        if found.st_size > MOST_BYTES:
            raise InputError(f"{path}: expected at most {format_bytes(MOST_BYTES)}, got {format_bytes(found.st_size)}")
        text = path.read_bytes().decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not a text file") from error
    if not text.strip():
        raise InputError(f"{path}: is empty")
    return text


def _check_values(path: str | Path, data: Any) -> None:
    """Checks what a schema cannot: the range of numbers, and how deep all this is."""
    left: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    while left:
        where, value = left.pop()
        if len(where) > DEPTH:
            raise _fault(path, where[:4], f"expected at most {DEPTH} levels of objects and lists")
        if isinstance(value, dict):
            left += [((*where, name), item) for name, item in value.items()]
        elif isinstance(value, list):
            left += [((*where, i), item) for i, item in enumerate(value)]
        elif isinstance(value, float | int) and value and not LEAST <= abs(value) <= MOST:
            given = repr(value)[:40]
            raise _fault(path, where, f"expected 0 or a number from {LEAST:g} to {MOST:g} in magnitude, got {given}")


def _check_tables(path: str | Path, where: tuple[str | int, ...], tables: list[Any]) -> None:
    """Checks that a section's tables have names of their own, and what their rows say of their own fields."""
    names = [table["name"] for table in tables]
    for i, table in enumerate(tables):
        if table["name"] in names[:i]:
            raise _fault(path, (*where, i, "name"), f"expected a name for each table, got {table['name']!r} twice")
        keys = set()
        for k, row in enumerate(table["rows"]):
            at = (*where, i, "rows", k)
            for name in table["identity"]:
                value = row.get(name)
                if not (isinstance(value, str) or is_number(value)):
                    raise _fault(path, (*at, name), f"expected text or a number, as identity names it, got {value!r}")
            key = tuple(row[name] for name in table["identity"])
            if key in keys:
                raise _fault(path, at, f"expected each row once, got {', '.join(map(str, key))} twice")
            keys.add(key)
            for name, metric in table["metrics"].items():
                least = " of at least 0" if metric["unit"] in NEVER_NEGATIVE else ""
                for field in {name, f"{name}_low", f"{name}_high"} - {*table["identity"]}:
                    value = row.get(field)
                    if value is not None and (not is_number(value) or (least and value < 0)):
                        raise _fault(path, (*at, field), f"expected a number{least} or null, got {value!r}")


def _fault(path: str | Path, where: Iterable[str | int], message: str) -> InputError:
    return InputError(f"{path}: at {'/'.join(one_line(str(part)) for part in where) or 'the top'}: {message}")


@functools.cache
def _validator() -> Any:
    jsonschema = require("jsonschema", "bench")
    return jsonschema.Draft202012Validator(json.loads(DESCRIPTION.read_text()))


def label_of(path: str | Path, data: dict[str, Any]) -> str:
    """Returns a file's name in comparisons: card, commit and date, and the last two parts of its path."""
    environment = data["environment"]
    git = environment["git"] or {}
    commit = git["commit"][:7] if git.get("commit") else "no commit"
    commit += "+changes" if git.get("dirty") else ""
    return f"{environment['device']}, {commit}, {environment['date'][:10]} ({'/'.join(Path(path).parts[-2:])})"


def shipped_results() -> list[Path]:
    """Returns the result files in the repository."""
    return sorted(SHIPPED.glob("*/*.json"))


def folder_name(device: str) -> str:
    """Returns the folder of a card's results: ``NVIDIA H200`` is ``nvidia-h200``."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
