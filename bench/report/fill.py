"""Tables in Markdown files, generated from result files and never typed.

    <!-- results: cpu csg/whole columns=frames,mode,speedup frames=41|81 -->
    ... what is here is replaced ...
    <!-- end of results -->

The first word names a folder of ``bench/results`` by its beginning (``cpu``, ``nvidia-h200``), or by a pattern with
``*``; the newest file there that has the section and table is taken. ``SECTION/verdicts`` are a section's figures to be
reached. ``columns`` are the fields that are shown, default the table's own choice; ``FIELD=VALUE|VALUE`` keeps the rows
whose field is one of the values. What has spaces stands in quotes: ``"dit/counted operators"``. Marks in fenced code
are an example and stay as they are.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.session import measured_on
from bench.records.markdown import format_table, format_verdicts, plain
from model.errors import InputError

START, END = "<!-- results:", "<!-- end of results -->"
VERDICTS = "verdicts"
FORM = "FOLDER SECTION/TABLE [columns=FIELD,FIELD] [FIELD=VALUE|VALUE]"
_MARK = re.compile(r"^<!-- (?:results: *(?P<what>.*?) *|end of results) -->[ \t]*$", re.MULTILINE)
_FENCED = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)

Documents = Mapping[Path, Mapping[str, Any]]


class Selection(NamedTuple):
    """The table, columns and rows that a mark asks for."""

    folder: str
    section: str
    table: str
    columns: Sequence[str]
    wanted: Mapping[str, Sequence[str]]


def parse_selection(text: str) -> Selection:
    """Reads what a mark says after ``results:``.

    Raises:
        InputError: it has another form.
    """
    try:
        folder, name, *options = shlex.split(text)
        section, table = name.split("/")
        pairs = [option.split("=", 1) for option in options]
        wanted = {name: values.split("|") for name, values in pairs}
    except ValueError as error:
        raise InputError(f"results: expected {FORM}, got {text!r}") from error
    columns = wanted.pop("columns", [""])[0]
    return Selection(folder, section, table, columns.split(",") if columns else [], wanted)


def marks_of(text: str) -> list[re.Match[str]]:
    """Returns the beginnings and ends of a text's tables, in order, those in fenced code left out."""
    fenced = [match.span() for match in _FENCED.finditer(text)]
    return [mark for mark in _MARK.finditer(text) if not any(a <= mark.start() < b for a, b in fenced)]


def filled(text: str, documents: Documents, page: Path) -> str:
    """Returns a Markdown file's text with every table made anew; a text without marks is returned as it is.

    Args:
        text: of the Markdown file.
        documents: result files to choose from, by their paths, each in the folder of its card.
        page: where the text lies; links are relative to its folder.

    Raises:
        InputError: a table has no end, or a mark asks for what is not there; the message says what is.
    """
    pieces, end = [], 0
    marks = marks_of(text)
    for i, mark in enumerate(marks):
        line = text.count("\n", 0, mark.start()) + 1
        closing = marks[i + 1] if i + 1 < len(marks) else None
        if mark["what"] is None:
            if not i or marks[i - 1]["what"] is None:
                raise InputError(f"{page}, line {line}: {END} without a beginning")
            continue
        if closing is None or closing["what"] is not None:
            raise InputError(f"{page}, line {line}: expected {END} before the next table and the end of the file")
        try:
            body = made_table(parse_selection(mark["what"]), documents, page)
        except InputError as error:
            raise InputError(f"{page}, line {line}: {error}") from error
        pieces += [text[end : mark.end()], f"\n{body}\n"]
        end = closing.start()
    return "".join([*pieces, text[end:]])


def made_table(selection: Selection, documents: Documents, page: Path) -> str:
    """Returns one table, and a line that says from which file it is.

    Raises:
        InputError: the selection asks for what is not there.
    """
    path, section = _newest(selection, documents)
    environment, git = documents[path]["environment"], documents[path]["environment"]["git"] or {}
    table = next((table for table in section["tables"] if table["name"] == selection.table), None)
    if table is None:
        rows, text = section["verdicts"], format_verdicts(section["verdicts"])
    else:
        table = _selected(selection, table)
        rows, text = table["rows"], format_table(table)
    link = Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()
    commit = f"commit {plain(git['commit'][:9])}" if git.get("commit") else "no commit"
    changed = ", with uncommitted changes" if git.get("dirty") else ""
    cut = "" if section["status"] == "complete" else f" The run is incomplete ({section['status']})."
    source = f"From [{path.name}]({link}), {environment['date'][:10]}, {commit}{changed}."
    # What is counted, predicted or compiled needs no machine.
    ran = any(row["basis"] in ("measured", "extrapolated") for row in rows)
    return f"\n{text}\n\n{f'{measured_on(environment)} ' if ran else ''}{source}{cut}\n"


def _newest(selection: Selection, documents: Documents) -> tuple[Path, Mapping[str, Any]]:
    fitting = {path: d for path, d in documents.items() if fnmatch(path.parent.name, f"{selection.folder}*")}
    if not fitting:
        there = ", ".join(sorted({path.parent.name for path in documents})) or "none"
        raise InputError(f"folder: no results in one named {selection.folder}*; the folders are {there}")
    name, found = f"{selection.section}/{selection.table}", set()
    for path, document in sorted(fitting.items(), key=lambda item: item[1]["environment"]["date"], reverse=True):
        for section, data in document["sections"].items():
            tables = [table["name"] for table in data["tables"]] + [VERDICTS] * bool(data["verdicts"])
            found |= {f"{section}/{table}" for table in tables}
        if name in found:
            return path, document["sections"][selection.section]
    there = ", ".join(sorted(found)) or "none"
    raise InputError(f"table: {name} is in no file of {selection.folder}*; there are {there}")


def _selected(selection: Selection, table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the table with the columns and rows that are asked for."""
    rows, name = table["rows"], f"{selection.section}/{selection.table}"
    fields = list(dict.fromkeys(field for row in rows for field in row))
    for field in (*selection.columns, *selection.wanted):
        if field not in fields:
            raise InputError(f"field: {name} has no {field!r}; it has {', '.join(fields)}")
    for field, values in selection.wanted.items():
        there = ", ".join(dict.fromkeys(str(row.get(field)) for row in rows))
        rows = [row for row in rows if str(row.get(field)) in values]
        if not rows:
            raise InputError(f"rows: none has {field}={'|'.join(values)}; there are {there}")
    return {**table, "rows": rows, "columns": list(selection.columns) or table.get("columns", [])}
