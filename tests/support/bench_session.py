"""Helpers for tests of benchmarks: a session without a command, a timer that knows its answer, results."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.harness.environment import capture
from bench.harness.session import RESULT, Session
from bench.harness.timing import Timing
from bench.records.read import read_json, read_result
from bench.records.write import Record, Table
from tests.support.result_samples import environment

CPU = torch.device("cpu")


def timer(calls: dict[str, Any]) -> dict[str, Timing]:
    """Runs every call once and says half a second."""
    for call in calls.values():
        call()
    return dict.fromkeys(calls, Timing(0.5, 0.48, 0.52, 5, 1e-4))


@contextmanager
def session(folder: Path, name: str = "test", **options: Any) -> Iterator[Session]:
    """Returns a section of its own in a results folder."""
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder / RESULT, capture(CPU))
    args = argparse.Namespace(**{"json": False, "quick": False, "out": folder, **options})
    with record.section(name, name, {}) as section:
        yield Session(args, CPU, folder, section, record.data["environment"])


def new_table(folder: Path, identity: tuple[str, ...], metrics: tuple[str, ...]) -> Table:
    """Returns a table on disk."""
    with session(folder) as found:
        return found.section.table("rows", "rows", identity=identity, metrics=metrics)


def leave_result(folder: Path, status: str, rows: int) -> None:
    """Leaves the result of a run that ended like this, as on a card."""
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder / RESULT, environment())
    with record.section("any", "any", {}) as section:
        table = section.table("rows", "rows", identity=("room",), metrics=("seconds",))
        for number in range(rows):
            table.add({"room": number, "seconds": 1.0})
    section.set(status=status, reason=None if status == "complete" else f"of {rows}")
    record.save()


def read_section(folder: Path) -> dict[str, Any]:
    """Returns the only section of a results folder, its tables by name; the file must be of the documented form."""
    (section,) = read_result(folder / RESULT)["sections"].values()
    return section | {"tables": {table["name"]: table for table in section["tables"]}}


def rows_of(folder: Path, table: str) -> list[dict[str, Any]]:
    """Returns the rows of one table of a results folder; no schema is needed, which a rented machine lacks."""
    (section,) = read_json(folder / RESULT)["sections"].values()
    return next(found["rows"] for found in section["tables"] if found["name"] == table)
