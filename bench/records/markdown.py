"""Tables of result files as Markdown, for terminals and pages: written from the rows, never typed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.records.metrics import column_label, column_scale, format_value
from model.errors import printable


def plain(text: str) -> str:
    """Returns text of a result file as both Markdown and a terminal show it: no HTML and no control characters.

    A result may come from anywhere, and its device's name from a driver; line ends stay.
    """
    return re.sub(r"<|&(?=#?\w+;)", lambda found: {"<": "&lt;", "&": "&amp;"}[found[0]], printable(text))


def markdown_table(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Returns a GitHub table, padded so that it is one in a terminal too; empty without rows."""
    if not cells:
        return ""
    lines = [
        [re.sub(r"[|\\]", r"\\\g<0>", plain(str(cell))).replace("\n", " ") for cell in line]
        for line in (headers, *cells)
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines]  # fmt: skip
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def columns_of(table: Mapping[str, Any]) -> list[str]:
    """Returns the fields of a table that are shown: its own choice, less those that no row has."""
    wanted = table.get("columns") or [*table["identity"], *table["metrics"]]
    return [name for name in wanted if any(row.get(name) is not None for row in table["rows"])]


def note_of(row: Mapping[str, Any]) -> str:
    """Returns what must be said beside a row's numbers."""
    parts = []
    if row["status"] != "ok":
        parts.append(f"{row['status']}: {row.get('reason', '')}")
    if row["basis"] != "measured":
        detail = row.get("basis_note")
        parts.append(f"{row['basis']}{f' {detail}' if detail else ''}")
    parts += [row[name] for name in ("note", "warning") if row.get(name)]
    return "; ".join(parts)


def format_table(table: Mapping[str, Any]) -> str:
    """Returns a table of a result file, and the note that belongs to it."""
    columns = columns_of(table)
    scales = {
        name: column_scale((row.get(name) for row in table["rows"]), table["metrics"][name]["unit"])
        for name in columns
        if name in table["metrics"]
    }
    notes = [note_of(row) for row in table["rows"]]
    headers = [
        column_label(name, table["metrics"][name], scales[name][1])
        if name in table["metrics"]
        else name.replace("_", " ")
        for name in columns
    ]
    cells = [[cell(row, name, table, scales.get(name, (None, ""))[0]) for name in columns] for row in table["rows"]]
    if any(notes):
        headers.append("note")
        cells = [[*line, note] for line, note in zip(cells, notes, strict=True)]
    text = markdown_table(headers, cells)
    return f"{text}\n\n{plain(table['note'])}" if table.get("note") and text else text


def cell(row: Mapping[str, Any], name: str, table: Mapping[str, Any], scale: float | None = None) -> str:
    """Returns one value, with its spread where the row has one."""
    value, metric = row.get(name), table["metrics"].get(name)
    if metric is None:
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    text = format_value(value, metric["unit"], scale)
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if text and low is not None and high is not None:
        text += f" ({format_value(low, metric['unit'], scale)} - {format_value(high, metric['unit'], scale)})"
    return text


def format_verdicts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Returns the figures to be reached, and whether they are."""
    words = {True: "met", False: "MISSED", None: ""}
    cells = [
        [
            v["what"], v["shape"], f"{format_value(v['value'], 'number')} {v['unit']}".strip(),
            format_value(v["wanted"], "number"), words[v["met"]], "" if v["basis"] == "measured" else v["basis"],
        ]
        for v in verdicts
    ]  # fmt: skip
    return markdown_table(["figure", "of", "found", "wanted", "", ""], cells)


def format_section(section: Mapping[str, Any]) -> str:
    """Returns a section's tables, verdicts and notes."""
    pieces = []
    for table in section["tables"]:
        text = format_table(table)
        if text:
            pieces.append(f"**{plain(table['title'])}**\n\n{text}")
    if section["verdicts"]:
        pieces.append(format_verdicts(section["verdicts"]))
    pieces += map(plain, section["notes"])
    return "\n\n".join(pieces)
