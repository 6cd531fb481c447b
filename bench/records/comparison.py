"""Comparison of result files: rows that are the same in all of them, their ratios, and whether these mean anything.

A difference counts as significant where it is larger than what the spreads of both rows explain: with ``s`` half the
distance between the 20th and the 80th percentile over the median, ``|ln(b / a)| > 2 * sqrt(s_a ** 2 + s_b ** 2)``, and
never below 1 %. That is the spread of single runs and not of their median, since two files also differ by clocks,
temperature and neighbours, which no spread within one of them shows. Fewer than three runs have no spread: then 10 %
are required, since single figures of the same code were seen to differ by 8 %. What is counted (bytes, registers) does
not vary: 1 %.

Figures of another basis (a prediction beside a measurement) get a ratio and no verdict. What others reported is no
result of a file and is left out. Tables that were made with other settings, such as another size, are not compared, and
the comparison says why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records.metrics import is_number
from bench.records.read import label_of
from model.errors import InputError

LEAST, WITHOUT_SPREAD, LEAST_RUNS = 0.01, 0.10, 3
#: Units and bases of figures that come out the same every time.
COUNTED_UNITS, COUNTED_BASES = ("bytes", "count"), ("counted", "compiled", "predicted")
#: Rates: their spread is that of their row's ``seconds``.
RATES = ("tflops", "bytes_per_second", "frames_per_second", "fraction_of_copy", "fraction_of_matmul")
#: Settings that change the work that a row stands for, unless the row names them itself.
DECISIVE = (
    "model", "preset", "width", "height", "size", "frames", "tokens_per_block", "steps", "stage_one_steps",
    "stage1_steps", "blocks_per_segment", "blocks", "neighbours_left", "left", "neighbours_right", "right", "anchor",
    "dtype", "limit",
)  # fmt: skip
#: Settings that are worth a word.
MENTIONED = (*DECISIVE, "quick", "weights", "cuda_graph", "vae_memory")

Document = Mapping[str, Any]


def labels_of(paths: Sequence[str | Path], documents: Sequence[Document]) -> list[str]:
    """Returns a name for each file: card, commit and date; where these are the same, with what differs of its path."""
    plain = [label_of(path, document) for path, document in zip(paths, documents, strict=True)]
    labels, parts = plain, [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        counts = Counter(labels)
        if max(counts.values()) == 1:
            break
        labels = [
            f"{short} ({'/'.join(names[-length:])})" if counts[label] > 1 else label
            for label, short, names in zip(labels, plain, parts, strict=True)
        ]
    return labels


def compare_documents(documents: Sequence[Document], labels: Sequence[str]) -> dict[str, Any]:
    """Compares result files and returns the comparison as data.

    Args:
        documents: result files; the first is what the others are compared with.
        labels: the name of each file.

    Returns:
        ``labels``, ``warnings``, and ``tables``: per section and table the rows that at least two files have, with
        ``statuses``, ``reasons``, ``bases`` and, by metric, ``values``, ``ratios`` and ``verdicts`` (over the first
        file's). ``unmatched`` are the rows and tables that are in one file alone, or that ``why`` keeps apart.

    Raises:
        InputError: fewer than two documents, or nothing in common; the message says what each has.
    """
    if len(documents) < 2:
        raise InputError(f"files: expected at least two, got {len(documents)}")
    tables, unmatched = [], []
    for section, name in _tables_of(documents):
        found, why = _comparable(documents, section, name)
        fit = sum(table is not None for table in found) >= 2
        if why or not fit:
            files = [_table(document, section, name) is not None for document in documents]
            unmatched.append({"section": section, "table": name, "files": files} | ({"why": why} if why else {}))
        if fit:
            table = _compare_tables(section, found)
            unmatched += table.pop("unmatched")
            tables += [table] if table["rows"] else []
    found = {"labels": list(labels), "warnings": _warnings(documents), "tables": tables, "unmatched": unmatched}
    if not tables:
        lines = [f"{letter(i)}: {label}" for i, label in enumerate(labels)]
        none = "no figure that is better lower or higher" if _tables_of(documents) else "no table"
        lines += unmatched_lines(found, most=24) or [f"{none} is in two of them"]
        raise InputError("\n  ".join(["files: nothing to compare: no row is in two of them", *lines]))
    return found


def count_verdicts(comparison: Mapping[str, Any], index: int) -> Counter[str]:
    """Counts how many figures of one file are ``better``, ``worse`` or the ``same`` as the first file's."""
    verdicts = [
        row["verdicts"][name][index] for t in comparison["tables"] for row in t["rows"] for name in row["values"]
    ]
    return Counter(verdict for verdict in verdicts if verdict)


def _tables_of(documents: Sequence[Document]) -> list[tuple[str, str]]:
    names = [(s, t["name"]) for d in documents for s, section in d["sections"].items() for t in section["tables"]]
    return list(dict.fromkeys(names))


def _table(document: Document, section: str, name: str) -> Mapping[str, Any] | None:
    tables = document["sections"].get(section, {}).get("tables", [])
    return next((table for table in tables if table["name"] == name), None)


def _comparable(
    documents: Sequence[Document], section: str, name: str
) -> tuple[list[Mapping[str, Any] | None], str | None]:
    """Returns the table in each file, less those that cannot be held against the first that has it; and why not."""
    found = [_table(document, section, name) for document in documents]
    first = next(i for i, table in enumerate(found) if table is not None)
    identity, a, reasons = found[first]["identity"], letter(first), []
    settings = [document["sections"].get(section, {}).get("settings", {}) for document in documents]
    for i, table in enumerate(found):
        if table is None or i == first:
            continue
        different, b, given = [], letter(i), (settings[first], settings[i])
        if table["identity"] != identity:
            theirs = ", ".join(table["identity"])
            different = [f"rows are told apart by {', '.join(identity)} in {a} and by {theirs} in {b}"]
        else:
            for field in DECISIVE:
                one, other = (s.get(field) for s in given)
                if field not in identity and None not in (one, other) and one != other:
                    different.append(f"{field} is {one} in {a} and {other} in {b}")
        found[i] = None if different else table
        reasons += different
    return found, "; ".join(reasons) or None


def _compare_tables(section: str, found: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    present = [table for table in found if table is not None]
    identity, name = present[0]["identity"], present[0]["name"]
    metrics = {
        key: metric
        for key, metric in present[0]["metrics"].items()
        if metric["better"] and all(t["metrics"].get(key, metric)["unit"] == metric["unit"] for t in present)
    }
    rows = [{_key(row, identity): row for row in ([] if table is None else _own_rows(table))} for table in found]
    compared, unmatched = [], []
    for key in dict.fromkeys(key for table in rows for key in table):
        mine = [table.get(key) for table in rows]
        if sum(row is not None for row in mine) < 2:
            files = [row is not None for row in mine]
            unmatched.append({"section": section, "table": name, "row": list(key), "files": files})
            continue
        row = _compare_rows(dict(zip(identity, key, strict=True)), mine, metrics)
        # A row that has figures in none of the files, and failed in none, says nothing.
        if row["values"] or any(status not in (None, "ok") for status in row["statuses"]):
            compared.append(row)
    return {
        "section": section, "table": name, "title": present[0]["title"], "identity": list(identity),
        "metrics": metrics, "rows": compared, "unmatched": unmatched,
    }  # fmt: skip


def _own_rows(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in table["rows"] if row["basis"] != "reported"]


def _key(row: Mapping[str, Any], identity: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[name] for name in identity)


def _compare_rows(
    key: dict[str, Any], rows: Sequence[Mapping[str, Any] | None], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    row: dict[str, Any] = {"key": key, "values": {}, "ratios": {}, "verdicts": {}}
    for field, name in (("statuses", "status"), ("reasons", "reason"), ("bases", "basis")):
        row[field] = [None if r is None else r.get(name) for r in rows]
    for name, metric in metrics.items():
        values = [r[name] if r is not None and r["status"] == "ok" and is_number(r.get(name)) else None for r in rows]
        if sum(value is not None for value in values) < 2:
            continue
        row["values"][name] = values
        first = values[0]
        row["ratios"][name] = [value / first if first and value is not None else None for value in values]
        row["verdicts"][name] = [
            "" if first is None or value is None else _verdict(rows[0], other, name, metric)
            for other, value in zip(rows, values, strict=True)
        ]
    return row


def _verdict(first: Any, other: Any, name: str, metric: Mapping[str, Any]) -> str:
    """Returns ``better``, ``worse`` or, within the spreads, ``same``; empty where that cannot be said."""
    if first["basis"] != other["basis"]:
        return ""
    a, b = first[name], other[name]
    if a == b:
        return "same"
    # From or to nothing at all (spills, say) there is no ratio, and it is no matter of spread.
    if a > 0 and b > 0 and abs(math.log(b / a)) <= threshold(first, other, name, metric["unit"]):
        return "same"
    return "better" if (b < a) == (metric["better"] == "lower") else "worse"


def threshold(first: Mapping[str, Any], other: Mapping[str, Any], name: str, unit: str = "") -> float:
    """Returns the change, as a logarithm of the ratio, that the spreads of both rows explain."""
    if unit in COUNTED_UNITS or first["basis"] in COUNTED_BASES:
        return LEAST
    spreads = [_half_spread(row, name) for row in (first, other)]
    if None in spreads:
        return WITHOUT_SPREAD
    return max(2 * math.hypot(*spreads), LEAST)


def _half_spread(row: Mapping[str, Any], name: str) -> float | None:
    source = "seconds" if name in RATES and f"{name}_low" not in row else name
    low, high, middle = (row.get(field) for field in (f"{source}_low", f"{source}_high", source))
    if not middle or low is None or high is None or (row.get("runs") or LEAST_RUNS) < LEAST_RUNS:
        return None
    return (high - low) / 2 / middle


def _warnings(documents: Sequence[Document]) -> list[str]:
    """Returns what makes the files hard to compare, a line each."""
    warnings = []
    environments = [document["environment"] for document in documents]
    for i, environment in enumerate(environments):
        git = environment["git"]
        if git is None:
            warnings.append(f"{letter(i)}: made outside a git checkout, so the code is not known")
        elif git.get("dirty"):
            warnings.append(f"{letter(i)}: made with uncommitted changes")
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
    for i, document in enumerate(documents):
        for name, section in document["sections"].items():
            if section["status"] != "complete":
                reason = f": {section['reason']}" if section.get("reason") else ""
                warnings.append(f"{letter(i)}: section {name} is incomplete, {section['status']}{reason}")
            after = (section.get("machine") or {}).get("after") or {}
            if after.get("throttling"):
                warnings.append(f"{letter(i)}: section {name} ended throttled by {', '.join(after['throttling'])}")
    return warnings + _different_settings(documents)


def _different_settings(documents: Sequence[Document]) -> list[str]:
    warnings = []
    for name in dict.fromkeys(name for document in documents for name in document["sections"]):
        having = {letter(i): d["sections"][name].get("settings", {}) for i, d in enumerate(documents)
                  if name in d["sections"]}  # fmt: skip
        for field in MENTIONED:
            values = {at: settings[field] for at, settings in having.items() if field in settings}
            # Given and different is a reason to compare nothing, and is said there.
            said = field in DECISIVE and None not in values.values()
            if not said and len(set(map(str, values.values()))) > 1:
                shown = ", ".join(f"{'default' if v is None else v} in {at}" for at, v in values.items())
                warnings.append(f"section {name} was run with another {field}: {shown}")
    return warnings


def unmatched_lines(comparison: Mapping[str, Any], most: int | None = None) -> list[str]:
    """Returns what was not compared, tables first, and why; the first ``most`` lines and how many more there are."""
    tables, rows = [], []
    for found in comparison["unmatched"]:
        only = f"only in {', '.join(letter(i) for i, there in enumerate(found['files']) if there)}"
        if "row" in found:
            rows.append(f"{found['section']}/{found['table']}: {', '.join(map(str, found['row']))} ({only})")
        else:
            tables.append(f"{found['section']}/{found['table']}: {found.get('why') or f'the whole table {only}'}")
    lines = [*tables, *rows]
    return lines if most is None or len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


def only_changes(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a comparison of only the figures that are better or worse and the rows that failed somewhere."""
    tables = []
    for table in comparison["tables"]:
        rows = []
        for row in table["rows"]:
            names = [name for name, verdicts in row["verdicts"].items() if {"better", "worse"} & set(verdicts)]
            failed = any(status not in (None, "ok") for status in row["statuses"])
            if names or failed:
                kept = {field: {n: row[field][n] for n in names} for field in ("values", "ratios", "verdicts")}
                rows.append({**row, **kept})
        if rows:
            tables.append({**table, "rows": rows})
    return {**comparison, "tables": tables}


def letter(i: int) -> str:
    """Returns the letter of file number ``i`` in tables: A, B, ..."""
    return chr(ord("A") + i) if i < 26 else f"#{i + 1}"
