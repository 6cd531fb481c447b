"""Tables in Markdown files, generated from result files and never typed.

A mark names a folder of ``bench/results`` by its beginning or by a pattern with ``*``; the newest file there that has
the section and table is taken (docs/results/format.md). ``SECTION/verdicts`` are a section's figures to be reached.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bench.harness.session import measured_on
from bench.records.markdown import format_table, format_verdicts, plain
from model.errors import InputError

START, END = "<!-- results:", "<!-- end of results -->"
VERDICTS = "verdicts"
FORM = "FOLDER SECTION/TABLE [columns=FIELD,FIELD] [FIELD=VALUE|VALUE]"
#: Fenced code, in which marks are an example; a table with its marks; a mark alone.
_PIECE = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$"
    r"|^(?P<start><!-- results: *(?P<what>[^\n]*?) *-->[ \t]*)\n(?P<body>.*?)^(?P<end><!-- end of results -->[ \t]*)$"
    r"|^<!-- (?:results:|end of results -->)",
    re.MULTILINE | re.DOTALL,
)

Documents = Mapping[Path, Mapping[str, Any]]


def tables_in(text: str) -> int:
    """Returns how many tables a text has marks for."""
    return sum(found["what"] is not None for found in _PIECE.finditer(text))


def filled(text: str, documents: Documents, page: Path) -> str:
    """Returns a Markdown file's text with every table made anew; a text without marks is returned as it is.

    Args:
        text: of the Markdown file.
        documents: result files to choose from, by their paths, each in the folder of its card.
        page: where the text lies; links are relative to its folder.

    Raises:
        InputError: a table has no end, or a mark asks for what is not there; the message says what is.
    """

    def made(found: re.Match[str]) -> str:
        if found["fence"]:
            return found[0]
        line = f"{page}, line {text.count(chr(10), 0, found.start()) + 1}"
        if found["what"] is None or START in found["body"]:
            raise InputError(f"{line}: expected {END} after each table, before the next one")
        try:
            return f"{found['start']}\n{made_table(found['what'], documents, page)}\n{found['end']}"
        except InputError as error:
            raise InputError(f"{line}: {error}") from error

    return _PIECE.sub(made, text)


def made_table(what: str, documents: Documents, page: Path) -> str:
    """Returns one table, and a line that says from which file it is; ``what``: what a mark says after ``results:``.

    Raises:
        InputError: it has another form, or asks for what is not there.
    """
    try:
        folder, name, *options = shlex.split(what)
        section_name, table_name = name.split("/")
        wanted = dict(option.split("=", 1) for option in options)
    except ValueError as error:
        raise InputError(f"results: expected {FORM}, got {what!r}") from error
    path = _newest(folder, name, documents)
    section, environment = documents[path]["sections"][section_name], documents[path]["environment"]
    table, git = next((t for t in section["tables"] if t["name"] == table_name), None), environment["git"] or {}
    if table is None:
        rows, text = section["verdicts"], format_verdicts(section["verdicts"])
    else:
        table = _selected(name, table, wanted)
        rows, text = table["rows"], format_table(table)
    link = Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()
    commit = f"commit {plain(git['commit'][:9])}" if git.get("commit") else "no commit"
    changed = ", with uncommitted changes" if git.get("dirty") else ""
    cut = "" if section["status"] == "complete" else f" The run is incomplete ({section['status']})."
    source = f"From [{path.name}]({link}), {environment['date'][:10]}, {commit}{changed}."
    # What is counted, predicted or compiled needs no machine.
    ran = any(row["basis"] in ("measured", "extrapolated") for row in rows)
    return f"\n{text}\n\n{f'{measured_on(environment)} ' if ran else ''}{source}{cut}\n"


def _newest(folder: str, name: str, documents: Documents) -> Path:
    """Returns the newest file of a folder that has this table."""
    fitting = [path for path in documents if fnmatch(path.parent.name, f"{folder}*")]
    if not fitting:
        there = ", ".join(sorted({path.parent.name for path in documents})) or "none"
        raise InputError(f"folder: no results in one named {folder}*; the folders are {there}")
    found: set[str] = set()
    for path in sorted(fitting, key=lambda path: documents[path]["environment"]["date"], reverse=True):
        for section, data in documents[path]["sections"].items():
            tables = [table["name"] for table in data["tables"]] + [VERDICTS] * bool(data["verdicts"])
            found |= {f"{section}/{table}" for table in tables}
        if name in found:
            return path
    raise InputError(f"table: {name} is in no file of {folder}*; there are {', '.join(sorted(found)) or 'none'}")


def _selected(name: str, table: Mapping[str, Any], wanted: Mapping[str, str]) -> dict[str, Any]:
    """Returns the table with the columns and rows that are asked for."""
    rows, columns = table["rows"], wanted["columns"].split(",") if "columns" in wanted else []
    values = {field: texts.split("|") for field, texts in wanted.items() if field != "columns"}
    fields = list(dict.fromkeys(field for row in rows for field in row))
    for field in (*columns, *values):
        if field not in fields:
            raise InputError(f"field: {name} has no {field!r}; it has {', '.join(fields)}")
    for field, texts in values.items():
        there = ", ".join(dict.fromkeys(str(row.get(field)) for row in rows))
        rows = [row for row in rows if str(row.get(field)) in texts]
        if not rows:
            raise InputError(f"rows: none has {field}={'|'.join(texts)}; there are {there}")
    return {**table, "rows": rows, "columns": columns or table.get("columns", [])}
