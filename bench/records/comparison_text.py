"""Comparisons of result files in words and Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.records.comparison import count_verdicts, letter, only_changes
from bench.records.markdown import markdown_table, plain
from bench.records.metrics import column_scale, format_value

WORDS = {"better": "better", "worse": "WORSE", "same": "same", "": ""}


def format_comparison(comparison: Mapping[str, Any], *, changes: bool = False) -> str:
    """Returns a comparison in Markdown; with ``changes`` only the tables of what is better, worse or failed."""
    labels = comparison["labels"]
    pieces = ["\n".join(f"- {letter(i)}: {plain(label)}" for i, label in enumerate(labels))]
    pieces += [f"warning: {plain(warning)}" for warning in comparison["warnings"]]
    for table in (only_changes(comparison) if changes else comparison)["tables"]:
        text = _format_table(table, len(labels))
        pieces.append(f"**{plain(table['section'])}: {plain(table['title'])}**\n\n{text}")
    pieces.append("\n".join(summary(comparison, i) for i in range(1, len(labels))))
    if lines := unmatched_lines(comparison):
        shown = lines[:12] + ([f"and {len(lines) - 12} more"] if len(lines) > 12 else [])
        pieces.append("not compared:\n" + "\n".join(f"- {plain(line)}" for line in shown))
    return "\n\n".join(pieces)


def summary(comparison: Mapping[str, Any], index: int) -> str:
    """Returns one file against the first, in a sentence."""
    counts = count_verdicts(comparison, index)
    text = (
        f"{letter(index)} against A: {counts['better']} figures better, {counts['worse']} worse,"
        f" {counts['same']} the same within their spread"
    )
    pairs = [(row["statuses"][0], row["statuses"][index]) for table in comparison["tables"] for row in table["rows"]]
    lost = sum(first == "ok" and other not in (None, "ok") for first, other in pairs)
    gained = sum(other == "ok" and first not in (None, "ok") for first, other in pairs)
    text += f"; without a result here and not in A: {lost}" if lost else ""
    return text + (f"; without a result in A and not here: {gained}" if gained else "")


def unmatched_lines(comparison: Mapping[str, Any]) -> list[str]:
    """Returns what was not compared, tables first, and why."""
    tables = [u for u in comparison["unmatched"] if "row" not in u]
    rows = [u for u in comparison["unmatched"] if "row" in u]
    return [
        *(f"{u['section']}/{u['table']}: {u.get('why') or 'the whole table ' + _which(u['files'])}" for u in tables),
        *(f"{u['section']}/{u['table']}: {', '.join(map(str, u['row']))} ({_which(u['files'])})" for u in rows),
    ]


def _which(files: Sequence[bool]) -> str:
    return "only in " + ", ".join(letter(i) for i, there in enumerate(files) if there)


def comparison_note(row: Mapping[str, Any]) -> str:
    """Returns what must be said beside a compared row: failures with reasons, and bases other than measured."""
    failed = [
        f"{letter(i)}: {status}{f' ({reason})' if reason else ''}"
        for i, (status, reason) in enumerate(zip(row["statuses"], row["reasons"], strict=True))
        if status not in (None, "ok")
    ]
    bases = {letter(i): basis for i, basis in enumerate(row["bases"]) if basis is not None}
    if len(set(bases.values())) > 1:
        return "; ".join([*failed, *(f"{at}: {basis}" for at, basis in bases.items())])
    return "; ".join([*failed, *(basis for basis in set(bases.values()) if basis != "measured")])


def _format_table(table: Mapping[str, Any], count: int) -> str:
    letters, cells = [letter(i) for i in range(count)], []
    for row in table["rows"]:
        head, note = [str(row["key"][name]) for name in table["identity"]], comparison_note(row)
        if not row["values"]:
            cells.append([*head, "", *[""] * (2 * count - 1), note])
        for name, values in row["values"].items():
            metric = table["metrics"][name]
            scale, unit = column_scale(values, metric["unit"])
            label = f"{metric['label']}, {unit}" if unit else metric["label"]
            line = [*head, label, *(format_value(v, metric["unit"], scale) for v in values)]
            pairs = zip(row["ratios"][name][1:], row["verdicts"][name][1:], strict=True)
            line += [f"{'' if ratio is None else f'{ratio:.3f}'} {WORDS[verdict]}".strip() for ratio, verdict in pairs]
            cells.append([*line, note])
    headers = [*(n.replace("_", " ") for n in table["identity"]), "", *letters]
    headers += [f"{at} / A" for at in letters[1:]]
    return markdown_table([*headers, "note"], cells)
