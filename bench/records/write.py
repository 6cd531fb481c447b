"""Result files as they are written: one document of sections, on disk again after every row.

The form is described, and on reading checked, by ``bench/results.schema.json`` (:mod:`bench.records.read`).
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.records.metrics import METRICS
from bench.records.outcome import BASES, STATUSES
from model.errors import InputError
from model.io.durable import write_text

SCHEMA, VERSION = "swifti2v-results", 1
#: Spread (20th to 80th percentile over the median) beyond which a row carries a warning.
WIDE_SPREAD = 0.10


class Table:
    """A table of a result file: rows of one kind, added one by one."""

    def __init__(self, data: dict[str, Any], save: Callable[[], None]):
        #: Called after rows that have been added were changed, ``save`` writes them.
        self.data, self.save = data, save

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows that have been added."""
        return self.data["rows"]

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a row; ``basis`` is ``measured`` unless it says otherwise.

        Raises:
            ValueError: it lacks a field of the table's identity, repeats a row, or has an unknown status or basis.
        """
        row = {"status": "ok", "basis": "measured", **row}
        low, high, middle = row.get("seconds_low"), row.get("seconds_high"), row.get("seconds")
        if low and high and middle and (high - low) / middle > WIDE_SPREAD:
            row.setdefault("warning", f"spread {100 * (high - low) / middle:.0f} %: not a basis for comparisons")
        missing = [name for name in self.data["identity"] if name not in row]
        if missing:
            raise ValueError(f"row: lacks {', '.join(missing)} of table {self.data['name']}")
        key = [row[name] for name in self.data["identity"]]
        if any(key == [other[name] for name in self.data["identity"]] for other in self.rows):
            raise ValueError(f"row: {key} is in table {self.data['name']} already")
        if row["status"] not in STATUSES or row["basis"] not in BASES:
            raise ValueError(f"row: unknown status {row['status']!r} or basis {row['basis']!r}")
        self.rows.append(row)
        self.save()
        return row


class Section:
    """One benchmark's part of a document."""

    def __init__(self, data: dict[str, Any], save: Callable[[], None]):
        self.data, self._save = data, save

    def table(
        self,
        name: str,
        title: str,
        *,
        identity: Sequence[str],
        metrics: Sequence[str],
        columns: Sequence[str] = (),
        note: str = "",
    ) -> Table:
        """Adds a table and returns it.

        Args:
            name: the name by which comparisons match tables.
            title: the title for people.
            identity: the fields that tell a row from all others.
            metrics: the fields that are quantities, of ``bench.records.metrics.METRICS``.
            columns: the fields that are shown, in order; default identity and metrics.
            note: a sentence that belongs beside the table.
        """
        described = {metric: asdict(METRICS[metric]) for metric in metrics}
        data = {"name": name, "title": title, "identity": list(identity), "metrics": described}
        data |= {"columns": list(columns), "note": note, "rows": []}
        self.data["tables"].append(data)
        return Table(data, self._save)

    def set(self, **fields: Any) -> None:
        """Sets fields of the section: ceilings, settings and the like; the next row writes them."""
        self.data.update(fields)

    def timeline(
        self, name: str, points: Sequence[tuple[float, float]], marks: Sequence[tuple[float, str]], **details: Any
    ) -> None:
        """Adds a course of allocated bytes over seconds, with what began where.

        Args:
            name: the title for people.
            points: pairs of seconds and bytes, of which about 1500 are kept.
            marks: pairs of seconds and label.
            details: ``basis``, ``limit`` and what else belongs to it.
        """
        data = {"name": name, "points": [list(p) for p in thinned(points, 1500)], "marks": [list(m) for m in marks]}
        self.data["timelines"].append({"basis": "measured", **data, **details})
        self._save()

    def verdicts(self, verdicts: Sequence[Mapping[str, Any]]) -> None:
        """Replaces the figures to be reached; each has what, shape, value, unit, wanted, met."""
        self.data["verdicts"] = [{"basis": "measured", **verdict} for verdict in verdicts]
        self._save()

    def note(self, text: str) -> None:
        """Adds a sentence for people; the next row, or the end, writes it."""
        self.data["notes"].append(text)

    def package_entries(self, table: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keeps choices for ``swifti2v_kernels/configs/<table>.json``; ``bench tune --from`` writes them there."""
        self.data["package_entries"][table] = list(entries)
        self._save()


class Record:
    """A result file and its sections, on the disk after every row.

    Args:
        path: where the file is; it is written whole whenever something is added.
        environment: the result of :func:`bench.harness.environment.capture`.

    Raises:
        InputError: the file cannot be written; that is better known before anything is measured.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any]):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"out: cannot write {path}")
        self.path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, "version": VERSION, "environment": dict(environment)}
        self.data["sections"] = {}

    def save(self) -> None:
        """Writes all that was recorded so far to the file."""
        write_text(self.path, dumps(self.data))

    @contextmanager
    def section(self, name: str, title: str, settings: Mapping[str, Any]) -> Iterator[Section]:
        """Adds a section that is complete when the block is; if that is cut short, what there is stays and says so.

        Bad input that is found before anything is measured leaves an earlier file as it was.
        """
        data = self.data["sections"][name] = new_section(title, "running", settings=dict(settings))
        start, refused = time.monotonic(), False
        try:
            yield Section(data, self.save)
            data["status"] = "complete"
        except BaseException as error:
            by_hand = isinstance(error, KeyboardInterrupt)
            reason = "interrupted" if by_hand else str(error)[:500] or type(error).__name__
            data |= {"status": "interrupted" if by_hand else "failed", "reason": reason}
            refused = isinstance(error, InputError) and not data["tables"]
            raise
        finally:
            data["seconds"] = time.monotonic() - start
            if not refused:
                self.save()


def thinned(points: Sequence[Any], most: int) -> list[Any]:
    """Returns about ``most`` points of a course or fewer, with the highest and the lowest of every stretch."""
    if len(points) <= most:
        return list(points)
    step, kept = len(points) * 2 // most + 1, [points[0]]
    for start in range(0, len(points), step):
        part = points[start : start + step]
        low, high = (extreme(part, key=lambda point: point[1]) for extreme in (min, max))
        kept += [low] if low == high else sorted((low, high))
    return [*kept, points[-1]]


def new_section(title: str, status: str, **fields: Any) -> dict[str, Any]:
    """Returns the data of a section without results; ``fields`` replace its own."""
    return {
        "title": title, "status": status, "reason": None, "started": now(), "seconds": None, "settings": {},
        "ceilings": None, "machine": None, "tables": [], "timelines": [], "verdicts": [], "notes": [],
        "package_entries": {}, **fields,
    }  # fmt: skip


def now() -> str:
    """Returns the time of day and the date, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def dumps(data: Mapping[str, Any]) -> str:
    """Returns JSON that every reader takes: NaN and infinities, which JSON has not, become null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def make_folder(folder: Path) -> None:
    """Makes the results folder.

    Raises:
        InputError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot make the directory {folder}: {error.strerror}") from error
