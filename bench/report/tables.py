"""Tables of the page: sortable, filterable, and with what must be said of a row at its front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.records.comparison import letter
from bench.records.comparison_text import WORDS, comparison_note
from bench.records.markdown import columns_of
from bench.records.metrics import column_label, column_scale, format_value
from bench.report.markup import Markup, tag

#: The meanings of a row's badges, in the order of the legend.
BASES = {
    "measured": "run on the card named, in the run named",
    "extrapolated": "measured on less (layers, steps, latent frames) and scaled; the note says from what",
    "predicted": "computed by a model of the card; nothing was run",
    "counted": "operations or bytes, counted on tensors without memory",
    "compiled": "read from the compiled binary; nothing was run",
    "reported": "by others, from their publication",
}


class Cell(NamedTuple):
    """A cell: what is shown, and the number or text that it sorts by; None sorts last."""

    content: Any
    value: Any = None
    kind: str = ""


def badge(word: str, kind: str = "", title: str | None = None) -> Markup:
    """Returns a word in a coloured box."""
    return tag("span", word, class_=f"badge {kind or word.replace(' ', '-')}", title=title or BASES.get(word))


def sortable(
    name: str, headers: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], *, tools: bool = True
) -> Any:
    """Returns a table of a page as HTML.

    Args:
        name: what the table is called, for who cannot see it.
        headers: the heads of the columns.
        rows: each row with its class and cells.
        tools: whether columns sort and rows can be filtered.
    """
    numeric = [any(isinstance(cells[i].value, (int, float)) for _, cells in rows) for i in range(len(headers))]
    heads = [
        tag("th", tag("button", text or Markup("&nbsp;"), type="button") if tools else text, scope="col",
            aria_sort="none" if tools else None, class_="number" if number else None)
        for text, number in zip(headers, numeric, strict=True)
    ]  # fmt: skip
    body = [tag("tr", [_cell(cell) for cell in cells], class_=kind or None) for kind, cells in rows]
    table = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body))
    box = tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=name)
    if not tools:
        return tag("div", box, class_="table")
    search = tag("input", type="search", placeholder="filter rows", aria_label=f"filter: {name}", hidden=True)
    count = tag("output", f"{len(rows)} row{'' if len(rows) == 1 else 's'}", class_="muted")
    return tag("div", tag("div", search, count, class_="tools"), box, class_="table sortable")


def _cell(cell: Cell) -> Markup:
    number = isinstance(cell.value, (int, float))
    kind = "number" if number and not cell.kind else cell.kind
    value = None if cell.value is None else repr(cell.value) if number else str(cell.value)
    return tag("td", cell.content, class_=kind or None, data_value=value)


def data_table(table: Mapping[str, Any]) -> Markup:
    """Returns a table of a result file, every row with its badge and its notes."""
    columns, rows = columns_of(table), table["rows"]
    scales = {
        name: column_scale((row.get(name) for row in rows), table["metrics"][name]["unit"])
        for name in columns
        if name in table["metrics"]
    }
    marked = any(row["basis"] != "measured" or row["status"] != "ok" for row in rows)
    notes = [_notes(row) for row in rows]
    headers = [
        column_label(name, table["metrics"][name], scales[name][1])
        if name in table["metrics"]
        else name.replace("_", " ")
        for name in columns
    ]
    lines = []
    for row, note in zip(rows, notes, strict=True):
        cells = [_data_cell(row, name, table, scales.get(name, (None, ""))[0]) for name in columns]
        if marked:
            badges = [badge(row["status"], "bad", row.get("reason"))] if row["status"] != "ok" else []
            badges += [badge(row["basis"])] if row["basis"] != "measured" or not badges else []
            cells.insert(0, Cell(badges, f"{row['status']} {row['basis']}"))
        if any(notes):
            cells.append(Cell(note, " ".join(note) if note else None, "notes"))
        lines.append((_kind(row), cells))
    headers = [*(["basis"] if marked else []), *headers, *(["note"] if any(notes) else [])]
    below = tag("p", table["note"], class_="note") if table.get("note") else None
    return tag("div", sortable(table["title"], headers, lines), below)


def _kind(row: Mapping[str, Any]) -> str:
    """Returns the classes of a row: whose it is, whether it failed, and its basis."""
    parts = ["ours"] if row.get("ours") else []
    parts += ["failed"] if row["status"] != "ok" else []
    return " ".join([*parts, *([f"unmeasured {row['basis']}"] if row["basis"] != "measured" else [])])


def _notes(row: Mapping[str, Any]) -> list[Markup]:
    found = [tag("span", row["reason"], class_="bad")] if row["status"] != "ok" and row.get("reason") else []
    for name, kind in (("basis_note", ""), ("note", ""), ("warning", "warn")):
        if row.get(name):
            found.append(tag("span", row[name], class_=kind or None))
    return found


def _data_cell(row: Mapping[str, Any], name: str, table: Mapping[str, Any], scale: float | None) -> Cell:
    value, metric = row.get(name), table["metrics"].get(name)
    if value is None:
        return Cell("")
    if metric is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        plain = isinstance(value, int) and not isinstance(value, bool)
        return Cell(f"{value:,}" if plain else str(value), value if plain or isinstance(value, float) else str(value))
    text = format_value(value, metric["unit"], scale)
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None or high is None:
        return Cell(tag("span", text, class_="figure-value"), value)
    spread = f"{format_value(low, metric['unit'], scale)} - {format_value(high, metric['unit'], scale)}"
    return Cell([tag("span", text, class_="figure-value"), " ", tag("span", spread, class_="spread")], value)


def verdict_table(found: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Markup:
    """Returns the table of figures to be reached, from triples of file, section and verdict."""
    words = {True: badge("met", "good"), False: badge("MISSED", "bad"), None: tag("span", "no target", class_="muted")}
    lines = []
    for label, section, v in found:
        cells = [
            Cell(words[v["met"]], {False: "0", True: "1", None: "2"}[v["met"]]), Cell(v["what"], v["what"], "words"),
            Cell(v["shape"], v["shape"], "words"),
            Cell(f"{format_value(v['value'], 'number')} {v['unit']}".strip(), v["value"]),
            Cell(format_value(v["wanted"], "number"), v["wanted"]), Cell(badge(v["basis"]), v["basis"]),
            Cell(section, section), Cell(label, label),
        ]  # fmt: skip
        lines.append(("" if v["basis"] == "measured" else f"unmeasured {v['basis']}", cells))
    headers = ["", "figure", "of", "found", "wanted", "basis", "section", "file"]
    return sortable("figures to be reached", headers, lines)


def comparison_table(table: Mapping[str, Any], count: int) -> Markup:
    """Returns rows of several files, side by side, with ratios over the first."""
    letters, lines = [letter(i) for i in range(count)], []
    for row in table["rows"]:
        bases = list(dict.fromkeys(basis for basis in row["bases"] if basis is not None))
        kind = "" if bases == ["measured"] else f"unmeasured {bases[0] if len(bases) == 1 else ''}".strip()
        note = comparison_note(row)
        head = [Cell([badge(basis) for basis in bases], " ".join(bases))]
        head += [Cell(row["key"][name], row["key"][name]) for name in table["identity"]]
        if not row["values"]:
            head[0] = Cell("")
            lines.append(("failed", [*head, *[Cell("")] * (2 * count), Cell(note, note, "notes")]))
        for name, values in row["values"].items():
            metric = table["metrics"][name]
            scale, unit = column_scale(values, metric["unit"])
            label = f"{metric['label']}, {unit}" if unit else metric["label"]
            texts = [tag("span", format_value(v, metric["unit"], scale), class_="figure-value") for v in values]
            cells = [*head, Cell(label, label), *(Cell(t, v, "number") for t, v in zip(texts, values, strict=True))]
            for ratio, verdict in zip(row["ratios"][name][1:], row["verdicts"][name][1:], strict=True):
                word = tag("span", WORDS[verdict], class_=f"verdict {verdict}")
                cells.append(Cell(["" if ratio is None else f"{ratio:.3f} ", word], ratio, "number"))
            lines.append((kind, [*cells, Cell(note, note or None, "notes")]))
    headers = ["basis", *(name.replace("_", " ") for name in table["identity"]), "figure", *letters]
    return sortable(f"comparison: {table['title']}", [*headers, *(f"{at} / A" for at in letters[1:]), "note"], lines)


def plain_table(name: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """Returns a small table that is only read."""
    return sortable(name, headers, [("", [Cell(text) for text in row]) for row in rows], tools=False)
