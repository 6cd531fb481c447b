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
from collections.abc import Mapping, Sequence
from typing import Any

from bench.records.metrics import is_number
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


def compare_documents(documents: Sequence[Document], labels: Sequence[str]) -> dict[str, Any]:
    """Compares result files and returns the comparison as data.

    Args:
        documents: result files; the first is what the others are compared with.
        labels: the name of each file.

    Returns:
        ``labels``, ``warnings``, and ``tables``: per section and table the rows that at least two files have, with
        ``statuses``, ``reasons``, ``bases`` and, by metric, ``values``, ``ratios`` and ``verdicts`` (over the first
        file's). ``unmatched`` is a line for each table, then each row, that is in one file alone or is kept apart.

    Raises:
        InputError: fewer than two documents, or nothing in common; the message says what each has.
    """
    if len(documents) < 2:
        raise InputError(f"files: expected at least two, got {len(documents)}")
    tables, apart, rows_apart = [], [], []
    names = [(s, t["name"]) for d in documents for s, section in d["sections"].items() for t in section["tables"]]
    for section, name in dict.fromkeys(names):
        found, why = _comparable(documents, section, name)
        fit = sum(table is not None for table in found) >= 2
        if why or not fit:
            files = [_table(document, section, name) is not None for document in documents]
            apart.append(f"{section}/{name}: {why or f'the whole table {_only_in(files)}'}")
        if fit:
            compared, unmatched = _compare_tables(section, found)
            rows_apart += unmatched
            tables += [compared] if compared["rows"] else []
    if not tables:
        lines = [*(f"{letter(i)}: {label}" for i, label in enumerate(labels)), *first_of([*apart, *rows_apart], 24)]
        if not (apart or rows_apart):
            lines.append(f"no {'figure that is better lower or higher' if names else 'table'} is in two of them")
        raise InputError("\n  ".join(["files: nothing to compare: no row is in two of them", *lines]))
    return {
        "labels": list(labels), "warnings": _warnings(documents), "tables": tables, "unmatched": [*apart, *rows_apart],
    }  # fmt: skip


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
        different, b = [], letter(i)
        if table["identity"] != identity:
            theirs = ", ".join(table["identity"])
            different = [f"rows are told apart by {', '.join(identity)} in {a} and by {theirs} in {b}"]
        else:
            for field in DECISIVE:
                one, other = settings[first].get(field), settings[i].get(field)
                if field not in identity and None not in (one, other) and one != other:
                    different.append(f"{field} is {one} in {a} and {other} in {b}")
        found[i] = None if different else table
        reasons += different
    return found, "; ".join(reasons) or None


def _compare_tables(section: str, found: Sequence[Mapping[str, Any] | None]) -> tuple[dict[str, Any], list[str]]:
    """Returns the table of what is in two files at least, and lines for the rows that are in one alone."""
    present = [table for table in found if table is not None]
    identity, name = present[0]["identity"], present[0]["name"]
    metrics = {
        key: metric
        for key, metric in present[0]["metrics"].items()
        if metric["better"] and all(t["metrics"].get(key, metric)["unit"] == metric["unit"] for t in present)
    }
    rows = []
    for table in found:
        own = [row for row in table["rows"] if row["basis"] != "reported"] if table is not None else []
        rows.append({tuple(row[field] for field in identity): row for row in own})
    compared, unmatched = [], []
    for key in dict.fromkeys(key for table in rows for key in table):
        mine = [table.get(key) for table in rows]
        there = [row is not None for row in mine]
        if sum(there) < 2:
            unmatched.append(f"{section}/{name}: {', '.join(map(str, key))} ({_only_in(there)})")
            continue
        row = _compare_rows(dict(zip(identity, key, strict=True)), mine, metrics)
        # A row that has figures in none of the files, and failed in none, says nothing.
        if row["values"] or any(status not in (None, "ok") for status in row["statuses"]):
            compared.append(row)
    table = {"section": section, "table": name, "title": present[0]["title"], "identity": list(identity)}
    return {**table, "metrics": metrics, "rows": compared}, unmatched


def _only_in(files: Sequence[bool]) -> str:
    return f"only in {', '.join(letter(i) for i, there in enumerate(files) if there)}"


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
        first = values[0]
        row["values"][name] = values
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
    a, b, spreads = first[name], other[name], [_half_spread(row, name) for row in (first, other)]
    if metric["unit"] in COUNTED_UNITS or first["basis"] in COUNTED_BASES:
        explained = LEAST
    else:
        explained = WITHOUT_SPREAD if None in spreads else max(2 * math.hypot(*spreads), LEAST)
    # From or to nothing at all (spills, say) there is no ratio, and it is no matter of spread.
    if a == b or (a > 0 and b > 0 and abs(math.log(b / a)) <= explained):
        return "same"
    return "better" if (b < a) == (metric["better"] == "lower") else "worse"


def _half_spread(row: Mapping[str, Any], name: str) -> float | None:
    """Returns half the distance between the percentiles over the median; None where it is not known."""
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
        if environment["git"] is None:
            warnings.append(f"{letter(i)}: made outside a git checkout, so the code is not known")
        elif environment["git"].get("dirty"):
            warnings.append(f"{letter(i)}: made with uncommitted changes")
    if len({environment["device"] for environment in environments}) == 1:
        for group, name in (
            ("packages", "torch"),
            ("packages", "triton"),
            ("gpu", "driver"),
            ("gpu", "power_limit_watts"),
        ):
            values = [environment.get(group, {}).get(name) for environment in environments]
            if len(set(values)) > 1:
                warnings.append(f"{name.replace('_', ' ')} differs: {', '.join(map(str, values))}")
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
    """Returns what sections were run with and differs; where all have given a decisive one, their tables are apart."""
    warnings = []
    for name in dict.fromkeys(name for document in documents for name in document["sections"]):
        having = {letter(i): d["sections"][name]["settings"] for i, d in enumerate(documents) if name in d["sections"]}
        for field in MENTIONED:
            values = {at: settings[field] for at, settings in having.items() if field in settings}
            said = field in DECISIVE and None not in values.values()
            if not said and len(set(map(str, values.values()))) > 1:
                shown = ", ".join(f"{'default' if v is None else v} in {at}" for at, v in values.items())
                warnings.append(f"section {name} was run with another {field}: {shown}")
    return warnings


def first_of(lines: Sequence[str], most: int) -> list[str]:
    """Returns the first ``most`` lines, and one that says how many more there are."""
    return [*lines] if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


def letter(i: int) -> str:
    """Returns the letter of file number ``i`` in tables: A, B, ..."""
    return chr(ord("A") + i) if i < 26 else f"#{i + 1}"
