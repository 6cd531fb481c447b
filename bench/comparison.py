"""Comparison of result files: rows that are the same in all of them, their ratios, and whether these mean anything.

A difference counts as significant where it is larger than what the spreads of both rows explain: with ``s`` half the
distance between the 20th and the 80th percentile over the median, ``|ln(b / a)| > 2 * sqrt(s_a ** 2 + s_b ** 2)``, and
never below 1 %. Where a row has no spread, 5 % are required.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.markdown import markdown_table
from bench.metrics import format_value, time_scale
from model.errors import InputError

LEAST, WITHOUT_SPREAD = 0.01, 0.05
WORDS = {"better": "better", "worse": "WORSE", "same": "same", "": ""}


def compare_documents(documents: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """The comparison as data.

    Args:
        documents: result files; the first is what the others are compared with.
        labels: what each is called.

    Returns:
        ``labels``, ``warnings``, and ``tables``: per section and table the rows that at least two files have, with
        ``values`` and ``ratios`` (over the first file's) by metric; ``unmatched`` are the rows that one file alone has.

    Raises:
        InputError: fewer than two documents, or nothing in common.
    """
    if len(documents) < 2:
        raise InputError(f"files: expected at least two, got {len(documents)}")
    tables, unmatched = [], []
    for section, name in _tables_of(documents):
        found = [_table(document, section, name) for document in documents]
        present = [table for table in found if table is not None]
        if len(present) < 2:
            unmatched.append({"section": section, "table": name, "files": [t is not None for t in found]})
            continue
        table = _compare_tables(section, found)
        unmatched += table.pop("unmatched")
        if table["rows"]:
            tables.append(table)
    if not tables:
        raise InputError(f"files: nothing to compare: no row is in two of them\n{_contents(documents, labels)}")
    return {"labels": list(labels), "warnings": _warnings(documents, labels), "tables": tables, "unmatched": unmatched}


def _tables_of(documents: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    names = [(s, t["name"]) for d in documents for s, section in d["sections"].items() for t in section["tables"]]
    return list(dict.fromkeys(names))


def _table(document: Mapping[str, Any], section: str, name: str) -> Mapping[str, Any] | None:
    tables = document["sections"].get(section, {}).get("tables", [])
    return next((table for table in tables if table["name"] == name), None)


def _compare_tables(section: str, found: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    first = next(table for table in found if table is not None)
    identity, name = first["identity"], first["name"]
    metrics = {key: metric for key, metric in first["metrics"].items() if metric["better"]}
    rows = [{_key(row, identity): row for row in ([] if table is None else table["rows"])} for table in found]
    compared, unmatched = [], []
    for key in dict.fromkeys(key for table in rows for key in table):
        mine = [table.get(key) for table in rows]
        if sum(row is not None for row in mine) < 2:
            files = [row is not None for row in mine]
            unmatched.append({"section": section, "table": name, "row": list(key), "files": files})
            continue
        compared.append(_compare_rows(dict(zip(identity, key, strict=True)), mine, metrics))
    return {
        "section": section, "table": name, "title": first["title"], "identity": list(identity), "metrics": metrics,
        "rows": compared, "unmatched": unmatched,
    }  # fmt: skip


def _key(row: Mapping[str, Any], identity: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in identity)


def _compare_rows(
    key: dict[str, Any], rows: Sequence[Mapping[str, Any] | None], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    statuses = [None if row is None else row["status"] for row in rows]
    bases = [None if row is None else row["basis"] for row in rows]
    row: dict[str, Any] = {"key": key, "statuses": statuses, "bases": bases, "values": {}, "ratios": {}, "verdicts": {}}
    for name, metric in metrics.items():
        values = [None if r is None or r["status"] != "ok" else r.get(name) for r in rows]
        if sum(isinstance(value, (int, float)) for value in values) < 2:
            continue
        row["values"][name] = values
        row["ratios"][name] = [_ratio(values[0], value) for value in values]
        row["verdicts"][name] = [
            _verdict(rows[0], other, name, metric["better"]) if ratio is not None else ""
            for other, ratio in zip(rows, row["ratios"][name], strict=True)
        ]
    return row


def _ratio(first: Any, value: Any) -> float | None:
    numbers = isinstance(first, (int, float)) and isinstance(value, (int, float))
    return value / first if numbers and first else None


def _verdict(first: Any, other: Any, name: str, better: str) -> str:
    """Whether ``other`` is better or worse than ``first``, or the same within the spreads."""
    a, b = first[name], other[name]
    if not a or not b:
        return "same" if a == b else "better" if (b < a) == (better == "lower") else "worse"
    change = math.log(b / a)
    if abs(change) <= threshold(first, other, name):
        return "same"
    return "better" if (change < 0) == (better == "lower") else "worse"


def threshold(first: Mapping[str, Any], other: Mapping[str, Any], name: str) -> float:
    """The change, as a logarithm of the ratio, that the spreads of both rows explain."""
    spreads = [_half_spread(row, name) for row in (first, other)]
    if None in spreads:
        return WITHOUT_SPREAD
    return max(2 * math.hypot(*spreads), LEAST)


def _half_spread(row: Mapping[str, Any], name: str) -> float | None:
    # A rate's spread is that of its time.
    source = name if f"{name}_low" in row else "seconds"
    low, high, middle = row.get(f"{source}_low"), row.get(f"{source}_high"), row.get(source)
    timed = name in ("tflops", "bytes_per_second", "frames_per_second", "fraction_of_copy", "fraction_of_matmul")
    if not middle or low is None or high is None or not (source == name or timed):
        return None
    return (high - low) / 2 / middle


def _warnings(documents: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[str]:
    """What makes the files hard to compare."""
    warnings = []
    environments = [document["environment"] for document in documents]
    for label, environment in zip(labels, environments, strict=True):
        if (environment["git"] or {}).get("dirty"):
            warnings.append(f"{label}: made with uncommitted changes")
        git = environment["git"]
        if git is None:
            warnings.append(f"{label}: made outside a git checkout, so the code is not known")
    devices = {environment["device"] for environment in environments}
    for name, read in (
        ("torch", lambda e: e["packages"].get("torch")),
        ("triton", lambda e: e["packages"].get("triton")),
        ("driver", lambda e: e.get("gpu", {}).get("driver")),
        ("power limit", lambda e: e.get("gpu", {}).get("power_limit_watts")),
    ):
        values = [read(environment) for environment in environments]
        if len(devices) == 1 and len(set(values)) > 1:
            warnings.append(f"{name} differs: {', '.join(map(str, values))}")
    for label, document in zip(labels, documents, strict=True):
        for name, section in document["sections"].items():
            if section["status"] != "complete":
                warnings.append(f"{label}: section {name} is {section['status']}: {section['reason']}")
    return warnings


def _contents(documents: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """What each file holds, for the message that nothing fits."""
    lines = []
    for label, document in zip(labels, documents, strict=True):
        parts = []
        for name, section in document["sections"].items():
            for table in section["tables"]:
                field = table["identity"][0]
                values = list(dict.fromkeys(str(row.get(field)) for row in table["rows"]))
                shown = ", ".join(values[:4]) + (", ..." if len(values) > 4 else "")
                parts.append(f"{name}/{table['name']} ({field}: {shown})")
        lines.append(f"  {label}: {'; '.join(parts) or 'no tables'}")
    return "\n".join(lines)


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The comparison for people, in Markdown."""
    labels = comparison["labels"]
    pieces = ["\n".join(f"- {letter(i)}: {label}" for i, label in enumerate(labels))]
    pieces += [f"warning: {warning}" for warning in comparison["warnings"]]
    for table in comparison["tables"]:
        text = _format_table(table, len(labels))
        if text:
            pieces.append(f"**{table['section']}: {table['title']}**\n\n{text}")
    if comparison["unmatched"]:
        rows = [u for u in comparison["unmatched"] if "row" in u]
        whole = [u for u in comparison["unmatched"] if "row" not in u]
        lines = [f"{u['section']}/{u['table']}: {', '.join(map(str, u['row']))} ({_which(u['files'])})" for u in rows]
        lines += [f"{u['section']}/{u['table']}: the whole table ({_which(u['files'])})" for u in whole]
        shown = lines[:12] + ([f"and {len(lines) - 12} more"] if len(lines) > 12 else [])
        pieces.append(
            "in one file only (another size, model or implementation):\n" + "\n".join(f"- {x}" for x in shown)
        )
    return "\n\n".join(pieces)


def _which(files: Sequence[bool]) -> str:
    return "only in " + ", ".join(letter(i) for i, there in enumerate(files) if there)


def letter(i: int) -> str:
    """How the file number ``i`` is called in tables: A, B, ..."""
    return chr(ord("A") + i) if i < 26 else f"#{i + 1}"


def _format_table(table: Mapping[str, Any], count: int) -> str:
    letters = [letter(i) for i in range(count)]
    cells = []
    for row in table["rows"]:
        head = [str(row["key"][name]) for name in table["identity"]]
        failed = [f"{letters[i]}: {s}" for i, s in enumerate(row["statuses"]) if s not in (None, "ok")]
        marked = [f"{letters[i]}: {b}" for i, b in enumerate(row["bases"]) if b not in (None, "measured")]
        note = "; ".join([*failed, *marked])
        if not row["values"] and failed:
            cells.append([*head, "", *[""] * (2 * count - 1), note])
        for name, values in row["values"].items():
            metric = table["metrics"][name]
            scale, unit = time_scale(values) if metric["unit"] == "s" else (1.0, "")
            label = f"{metric['label']}, {unit}" if unit else metric["label"]
            line = [*head, label, *(format_value(v, metric["unit"], scale) for v in values)]
            pairs = zip(row["ratios"][name][1:], row["verdicts"][name][1:], strict=True)
            line += ["" if ratio is None else f"{ratio:.3f} {WORDS[verdict]}" for ratio, verdict in pairs]
            cells.append([*line, note])
    headers = [*(n.replace("_", " ") for n in table["identity"]), "", *letters]
    headers += [f"{letter} / A" for letter in letters[1:]]
    return markdown_table([*headers, "note"], cells)
