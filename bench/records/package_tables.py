"""Measured choices on their way into the package: ``swifti2v_kernels/configs/*.json``.

Entries come from result files, so that they can be measured on one machine and written on another
(``python -m bench tune --from RESULT.json``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.io.durable import write_text

CONFIGS = Path(__file__).resolve().parent.parent.parent / "swifti2v_kernels" / "configs"
#: The fields of what was found; all others say what it was found for.
_FINDINGS = ("card", "seconds", "config", "gain", "provenance")


def provenance(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an entry's numbers depend on: date, versions, driver and commit."""
    git, packages = environment["git"] or {}, environment["packages"]
    return {
        "date": environment["date"][:10], "torch": packages["torch"], "triton": packages["triton"],
        "driver": environment.get("gpu", {}).get("driver"), "commit": git.get("commit"),
    }  # fmt: skip


def merge(table: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the table with the entries in place of those for the same."""
    merged = {_key(entry): dict(entry) for entry in (*table["entries"], *entries)}
    return {**table, "entries": [entry for _, entry in sorted(merged.items())]}


def write_entries(entries: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """Merges entries into the package's tables, by table; returns how many went into each."""
    written = {}
    for name, found in entries.items():
        path = CONFIGS / f"{name}.json"
        write_text(path, dumps_table(merge(json.loads(path.read_text()), found)))
        written[name] = len(found)
    return written


def dumps_table(table: Mapping[str, Any]) -> str:
    """Returns the table as JSON with a line for each entry, so that changes can be read."""
    lines = [json.dumps(entry) for entry in table["entries"]]
    rest = {name: value for name, value in table.items() if name != "entries"}
    body = "[\n  " + ",\n  ".join(lines) + "\n ]" if lines else "[]"
    return "{" + "".join(f'"{n}": {json.dumps(v)}, ' for n, v in rest.items()) + f'"entries": {body}}}\n'


def _key(entry: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in entry.items() if name not in _FINDINGS}, sort_keys=True)
