"""Reading result files: whole, of this version, and of the form that ``results.schema.json`` describes."""

from __future__ import annotations

import functools
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.records.write import SCHEMA, VERSION
from model.errors import InputError, one_line, require
from model.machine.measure import format_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
DESCRIPTION = ROOT / "bench" / "results.schema.json"
SHIPPED = ROOT / "bench" / "results"
#: Bounds of a result file: its size, its levels, and the magnitude of a number that is not 0.
MOST_BYTES, DEPTH, LEAST, MOST = 50 * 10**6, 20, 1e-100, 1e30
#: Half of a character, which JSON can escape and no terminal or file can take.
HALF = re.compile("[\ud800-\udfff]")
NEVER_NEGATIVE = ("s", "1/s", "bytes", "B/s", "FLOP", "TFLOP/s", "J", "count")


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads a result file and checks it.

    Raises:
        InputError: it is missing, cut off, of another version, or of another form; the message says which and where.
    """
    data = read_json(path)
    _check_version(Path(path), data)
    fault = max(_validator().iter_errors(data), key=lambda fault: len(fault.absolute_path), default=None)
    if fault is not None:
        given = repr(fault.instance)
        message = fault.message.replace(given, given if len(given) <= 60 else f"{given[:57]}...")
        raise _fault(path, fault.absolute_path, message[:400])
    for name, section in data["sections"].items():
        _check_tables(path, ("sections", name, "tables"), section["tables"])
    return data


def read_json(path: str | Path) -> Any:
    """Reads a file of strict JSON: no NaN, no number beyond what readers reckon with, no key twice in one object.

    Raises:
        InputError: it cannot be read or is something else; the message says where.
    """
    text = read_text(path)
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg
        what = "is cut off" if cut else "is not JSON"
        raise InputError(f"{path}: {what} (line {error.lineno}, column {error.colno}: {error.msg})") from error
    except RecursionError as error:
        raise InputError(f"{path}: expected at most {DEPTH} levels of objects and lists") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise InputError(f"expected every field once, got {twice!r} twice in one object")
    return found


def _integer(digits: str) -> int | float:
    # Python reads no integer of thousands of digits; one that is too large is refused with its place.
    return int(digits) if len(digits) < 40 else math.inf


def _check_values(path: str | Path, data: Any) -> None:
    """Checks what a schema cannot: the range of numbers, that text can be written, and how deep all this is."""
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
            raise _fault(path, where, f"expected 0 or a number from {LEAST:g} to {MOST:g} in magnitude, got {value:g}")
        for text in (value, *where[-1:]):
            if isinstance(text, str) and HALF.search(text):
                raise _fault(path, where, f"expected text, got half of a character: {text[:60]!r}")


def _check_tables(path: str | Path, where: tuple[str | int, ...], tables: list[Any]) -> None:
    """Checks that a section's tables have names of their own, and what their rows say of their own fields."""
    names = [table["name"] for table in tables]
    for i, table in enumerate(tables):
        if table["name"] in names[:i]:
            raise _fault(path, (*where, i, "name"), f"expected a name for each table, got {table['name']!r} twice")
        kinds: dict[str, type] = {}
        seen = set()
        for k, row in enumerate(table["rows"]):
            at = (*where, i, "rows", k)
            for name in table["identity"]:
                value = row.get(name)
                kind = str if isinstance(value, str) else float
                if not isinstance(value, str | float | int) or isinstance(value, bool):
                    raise _fault(path, (*at, name), f"expected text or a number, as identity names it, got {value!r}")
                if kinds.setdefault(name, kind) is not kind:
                    raise _fault(path, (*at, name), f"expected all text or all numbers in {name!r}, got {value!r}")
            key = tuple(row[name] for name in table["identity"])
            if key in seen:
                raise _fault(path, at, f"expected each row once, got {', '.join(map(str, key))} twice")
            seen.add(key)
            for name, metric in table["metrics"].items():
                for field in (name, f"{name}_low", f"{name}_high"):
                    value = row.get(field)
                    if field in table["identity"] or value is None:
                        continue
                    number = isinstance(value, float | int) and not isinstance(value, bool)
                    if not number or (value < 0 and metric["unit"] in NEVER_NEGATIVE):
                        least = " of at least 0" if metric["unit"] in NEVER_NEGATIVE else ""
                        raise _fault(path, (*at, field), f"expected a number{least} or null, got {value!r}")


def _fault(path: str | Path, where: Iterable[str | int], message: str) -> InputError:
    return InputError(f"{path}: at {'/'.join(one_line(str(part)) for part in where) or 'the top'}: {message}")


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
