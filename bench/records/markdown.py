"""Result files as people read them: the cells of their tables, and all of it in Markdown, for terminals and pages.

The page of results shows the same cells (:mod:`bench.report.grids`). Nothing is typed: all is written from the rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.records.comparison import first_of, letter
from bench.records.metrics import column_label, column_scale, format_value, is_number
from model.errors import printable

WORDS = {"worse": "WORSE"}


class Cell(NamedTuple):
    """A cell: its text, the number or text that it sorts by (None sorts last), and what stands beside the text.

    ``spread`` is from where to where a figure lies; ``kind`` is ``figure``, where the text is a quantity, ``words``,
    where it may be long, or empty.
    """

    text: str
    value: Any = None
    spread: str = ""
    kind: str = ""

    def plain(self) -> str:
        """Returns all of it as one text."""
        return f"{self.text} ({self.spread})" if self.spread else self.text


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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def cells_of(table: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Returns the heads of a table's columns, its own choice less those that no row has, and the cells of its rows."""
    rows, metrics = table["rows"], table["metrics"]
    wanted = table.get("columns") or [*table["identity"], *metrics]
    columns = [name for name in wanted if any(row.get(name) is not None for row in rows)]
    scales = {n: column_scale((row.get(n) for row in rows), metrics[n]["unit"]) for n in columns if n in metrics}
    heads = [column_label(n, metrics[n], scales[n][1]) if n in metrics else n.replace("_", " ") for n in columns]
    return heads, [[_cell(row, n, metrics.get(n), scales.get(n, (None, ""))[0]) for n in columns] for row in rows]


def _cell(row: Mapping[str, Any], name: str, metric: Mapping[str, Any] | None, scale: float | None) -> Cell:
    value = row.get(name)
    if value is None:
        return Cell("")
    if metric is None or not is_number(value):
        sorts = value if is_number(value) else str(value)
        return Cell(f"{value:,}" if is_number(value) and isinstance(value, int) else str(value), sorts)
    ends = [row.get(f"{name}_{end}") for end in ("low", "high")]
    spread = "" if None in ends else " - ".join(format_value(end, metric["unit"], scale) for end in ends)
    return Cell(format_value(value, metric["unit"], scale), value, spread, kind="figure")


def note_of(row: Mapping[str, Any]) -> str:
    """Returns what must be said beside a row's numbers."""
    parts = []
    if row["status"] != "ok":
        parts.append(f"{row['status']}: {row.get('reason', '')}")
    if row["basis"] != "measured":
        parts.append(f"{row['basis']} {row.get('basis_note') or ''}".strip())
    return "; ".join([*parts, *(row[name] for name in ("note", "warning") if row.get(name))])


def format_table(table: Mapping[str, Any]) -> str:
    """Returns a table of a result file, and the note that belongs to it."""
    heads, lines = cells_of(table)
    cells, notes = [[cell.plain() for cell in line] for line in lines], [note_of(row) for row in table["rows"]]
    if any(notes):
        heads, cells = [*heads, "note"], [[*line, note] for line, note in zip(cells, notes, strict=True)]
    text = markdown_table(heads, cells)
    return f"{text}\n\n{plain(table['note'])}" if table.get("note") and text else text


def verdict_cells(verdict: Mapping[str, Any]) -> list[Cell]:
    """Returns what a figure to be reached is, of what, what was found, and what is wanted."""
    found, wanted = (format_value(verdict[name], "number") for name in ("value", "wanted"))
    what, shape = (Cell(verdict[name], verdict[name], kind="words") for name in ("what", "shape"))
    return [what, shape, Cell(f"{found} {verdict['unit']}".strip(), verdict["value"]), Cell(wanted, verdict["wanted"])]


def format_verdicts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Returns the figures to be reached, and whether they are."""
    words = {True: "met", False: "MISSED", None: ""}
    cells = [
        [*(c.text for c in verdict_cells(v)), words[v["met"]], "" if v["basis"] == "measured" else v["basis"]]
        for v in verdicts
    ]
    return markdown_table(["figure", "of", "found", "wanted", "", ""], cells)


def format_section(section: Mapping[str, Any]) -> str:
    """Returns a section's tables, verdicts and notes."""
    texts = [(plain(table["title"]), format_table(table)) for table in section["tables"]]
    pieces = [f"**{title}**\n\n{text}" for title, text in texts if text]
    pieces += [format_verdicts(section["verdicts"])] if section["verdicts"] else []
    return "\n\n".join([*pieces, *map(plain, section["notes"])])


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Returns a comparison: its files, warnings, tables, a sentence on each file, and what was not compared."""
    letters = [letter(i) for i in range(len(comparison["labels"]))]
    pieces = ["\n".join(f"- {at}: {plain(label)}" for at, label in zip(letters, comparison["labels"], strict=True))]
    pieces += [f"warning: {plain(warning)}" for warning in comparison["warnings"]]
    for table in comparison["tables"]:
        names = [name.replace("_", " ") for name in table["identity"]]
        heads = [*names, "", *letters, *(f"{at} / A" for at in letters[1:]), "note"]
        cells = [line for row in table["rows"] for line in _compared_lines(table, row)]
        title = plain(f"{table['section']}: {table['title']}")
        pieces.append(f"**{title}**\n\n{markdown_table(heads, cells)}")
    pieces.append("\n".join(_summary(comparison, i) for i in range(1, len(letters))))
    if lines := first_of(comparison["unmatched"], 12):
        pieces.append("not compared:\n" + "\n".join(f"- {plain(line)}" for line in lines))
    return "\n\n".join(pieces)


def _compared_lines(table: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yields a line for each figure of a compared row; a row without figures is there once."""
    head, note = list(map(str, row["key"].values())), _comparison_note(row)
    if not row["values"]:
        yield [*head, *[""] * 2 * len(row["statuses"]), note]
    for name, values in row["values"].items():
        metric = table["metrics"][name]
        scale, unit = column_scale(values, metric["unit"])
        figures = [format_value(value, metric["unit"], scale) for value in values]
        pairs = zip(row["ratios"][name][1:], row["verdicts"][name][1:], strict=True)
        words = [f"{'' if ratio is None else f'{ratio:.3f}'} {WORDS.get(v, v)}".strip() for ratio, v in pairs]
        yield [*head, column_label(name, metric, unit), *figures, *words, note]


def _summary(comparison: Mapping[str, Any], index: int) -> str:
    """Returns one file against the first, in a sentence."""
    rows = [row for table in comparison["tables"] for row in table["rows"]]
    counts = Counter(verdicts[index] for row in rows for verdicts in row["verdicts"].values())
    pairs = [(row["statuses"][0], row["statuses"][index]) for row in rows]
    lost = sum(first == "ok" and other not in (None, "ok") for first, other in pairs)
    gained = sum(other == "ok" and first not in (None, "ok") for first, other in pairs)
    text = (
        f"{letter(index)} against A: {counts['better']} figures better, {counts['worse']} worse,"
        f" {counts['same']} the same within their spread"
    )
    text += f"; without a result here and not in A: {lost}" if lost else ""
    return text + (f"; without a result in A and not here: {gained}" if gained else "")


def _comparison_note(row: Mapping[str, Any]) -> str:
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
