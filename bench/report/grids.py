"""Tables of the page: sortable, filterable, and with what must be said of a row at its front and its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.records.markdown import Cell, cells_of, verdict_cells
from bench.records.metrics import is_number

#: The meanings of a row's badges, in the order of the legend.
BASES = {
    "measured": "run on the card named, in the run named",
    "extrapolated": "measured on less (layers, steps, latent frames) and scaled; the note says from what",
    "predicted": "computed by a model of the card; nothing was run",
    "counted": "operations or bytes, counted on tensors without memory",
    "compiled": "read from the compiled binary; nothing was run",
    "reported": "by others, from their publication",
}


class Line(NamedTuple):
    """A row: its cells, badges as (word, class, title), notes as (text, class), and its own classes."""

    cells: Sequence[Cell]
    badges: Sequence[tuple[str, ...]] = ()
    notes: Sequence[tuple[str, str]] = ()
    kind: str = ""


class Grid(NamedTuple):
    """A table of the page, by what it is called for who cannot see it."""

    name: str
    heads: Sequence[str]
    lines: Sequence[Line]

    @property
    def marked(self) -> bool:
        """True where rows have badges."""
        return any(line.badges for line in self.lines)

    @property
    def noted(self) -> bool:
        """True where rows have notes."""
        return any(line.notes for line in self.lines)

    def all_heads(self) -> Iterator[tuple[str, bool]]:
        """Yields the head of every column, and whether numbers stand below it."""
        yield from [("basis", False)] * self.marked
        for i, head in enumerate(self.heads):
            yield head, any(is_number(line.cells[i].value) for line in self.lines)
        yield from [("note", False)] * self.noted


def data_grid(table: Mapping[str, Any]) -> Grid:
    """Returns a table of a result file, every row with its badge and its notes."""
    heads, cells = cells_of(table)
    marked = any(row["basis"] != "measured" or row["status"] != "ok" for row in table["rows"])
    lines = [
        Line(found, _badges(row) if marked else (), _notes(row), _kind(row))
        for row, found in zip(table["rows"], cells, strict=True)
    ]
    return Grid(table["title"], heads, lines)


def _badges(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    failed = [(row["status"], "bad", row.get("reason") or "")] if row["status"] != "ok" else []
    return [*failed, *([(row["basis"],)] if row["basis"] != "measured" or not failed else [])]


def _kind(row: Mapping[str, Any]) -> str:
    """Returns the classes of a row: whose it is, whether it failed, and its basis."""
    words = ["ours"] * bool(row.get("ours")) + ["failed"] * (row["status"] != "ok")
    return " ".join(words + (["unmeasured", row["basis"]] if row["basis"] != "measured" else []))


def _notes(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    fields = {"basis_note": "", "note": "", "warning": "warn"}
    fields = fields if row["status"] == "ok" else {"reason": "bad", **fields}
    return [(row[name], kind) for name, kind in fields.items() if row.get(name)]


def verdict_grid(found: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Grid:
    """Returns the table of figures to be reached, from triples of file, section and verdict."""
    words = {True: ("met", "good"), False: ("MISSED", "bad"), None: ("no target",)}
    lines = []
    for label, section, verdict in found:
        measured = verdict["basis"] == "measured"
        cells = [*verdict_cells(verdict), Cell(section, section), Cell(label, label)]
        badges = [words[verdict["met"]], (verdict["basis"],)]
        lines.append(Line(cells, badges, kind="" if measured else f"unmeasured {verdict['basis']}"))
    return Grid("figures to be reached", ["figure", "of", "found", "wanted", "section", "file"], lines)
