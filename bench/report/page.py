"""The page: one HTML string that needs nothing else, built from result files and from nothing but them.

``page.html.j2`` has its form; here and in the files beside it is decided what stands where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.records.comparison import letter
from bench.records.markdown import Cell
from bench.records.read import ROOT
from bench.report.answer import card_line, clips_of
from bench.report.charts import WIDTH
from bench.report.figures import bar_charts, roofline_chart, timeline_charts
from bench.report.grids import BASES, Grid, Line, data_grid, verdict_grid
from bench.report.markup import TEMPLATES

Document = Mapping[str, Any]

#: Sections before the figures to be reached: the clip and its memory, then kernels; the others follow.
FIRST = ("csg", "memory", "operators", "attention", "vae", "dit")
#: Bars beyond which a chart is folded away, and notes beyond which those of a section are.
MANY_ROWS, MANY_NOTES = 40, 6


class Part(NamedTuple):
    """A part of the page: the macro that shows it, its anchor, its title, what it shows, and the command it is of."""

    kind: str
    at: str
    title: str
    body: Any
    command: str = ""


def build_page(paths: Sequence[Path], documents: Sequence[Document]) -> str:
    """Returns the page of some result files.

    Args:
        paths: paths of the files, for their names.
        documents: what is in the files, as :func:`bench.records.read.read_result` returns it.
    """
    clips = clips_of(documents)
    titles = {n: section["title"] for document in reversed(documents) for n, section in document["sections"].items()}
    names = dict.fromkeys(name for document in documents for name in document["sections"])
    first = [name for name in FIRST if name in names]
    parts = [
        Part("clip", "clip", "One clip", clips),
        *(_section(name, titles[name], documents) for name in first),
        Part("figures", "figures", "Figures to be reached", _figures(documents)),
        *(_section(name, titles[name], documents) for name in names if name not in first),
        Part("files", "files", "Files and machines", _files(paths, documents)),
    ]
    newest = {d["environment"]["device"]: d for d in sorted(documents, key=lambda d: d["environment"]["date"])}
    text = TEMPLATES.get_template("page.html.j2").render(
        parts=[part for part in parts if part.body], bases=BASES, width=WIDTH,
        cards=[] if clips else [card_line(document) for document in newest.values()],
        many_rows=MANY_ROWS, many_notes=MANY_NOTES,
    )  # fmt: skip
    return f"{text.strip()}\n"


def _section(name: str, title: str, documents: Sequence[Document]) -> Part:
    # What ran on a GPU comes first; files keep their letters.
    order = sorted(range(len(documents)), key=lambda i: documents[i]["environment"]["device_type"] == "cpu")
    having = {i: documents[i]["sections"][name] for i in order if name in documents[i]["sections"]}
    letters = {i: letter(i) if len(documents) > 1 else "" for i in having}
    ends = {i: f", {at}" if at else "" for i, at in letters.items()}
    roofs = [roofline_chart(section, f"Roofline{ends[i]}") for i, section in having.items()]
    tables = []
    for table in dict.fromkeys(table["name"] for section in having.values() for table in section["tables"]):
        found = {i: t for i, s in having.items() for t in s["tables"] if t["name"] == table and t["rows"]}
        panels = [
            {"letter": letters[i], "charts": [*bar_charts(t, having[i].get("ceilings")).values()],
             "grid": data_grid(t), "note": t.get("note")}
            for i, t in found.items()
        ]  # fmt: skip
        if found:
            tables.append({"title": next(iter(found.values()))["title"], "panels": panels})
    body = {
        "states": [_state(section, letters[i]) for i, section in having.items()],
        "roofs": [chart for chart in roofs if chart is not None], "tables": tables,
        "timelines": [chart for i, section in having.items() for chart in timeline_charts(section, ends[i])],
    }  # fmt: skip
    return Part("section", f"section-{name.replace(' ', '-')}", title, body, name)


def _state(section: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Returns how a section ended in one file, its notes, its settings, and how the card was before and after."""
    facts = _flat({**section["settings"], "": section.get("machine") or {}, "ceiling": section.get("ceilings") or {}})
    notes = [(note, "") for note in section["notes"]]
    throttled = ((section.get("machine") or {}).get("after") or {}).get("throttling")
    notes += [(f"throttled: {', '.join(throttled)}", "bad")] if throttled else []
    return {
        "letter": at, "status": section["status"], "complete": section["status"] == "complete",
        "seconds": "" if section.get("seconds") is None else f", {section['seconds']:,.1f} s",
        "reason": section.get("reason") or "the run did not say why; what follows is what it had found",
        "notes": notes, "facts": facts,
    }  # fmt: skip


def _figures(documents: Sequence[Document]) -> dict[str, Any] | None:
    """Returns the figures to be reached, of all files, the missed ones first; None where there are none."""
    found = [
        (letter(i), name, verdict)
        for i, document in enumerate(documents)
        for name, section in document["sections"].items()
        for verdict in section["verdicts"]
    ]
    found.sort(key=lambda entry: {False: 0, True: 1, None: 2}[entry[2]["met"]])
    counts = {word: sum(v["met"] is met for _, _, v in found) for word, met in (("missed", False), ("met", True))}
    return {**counts, "grid": verdict_grid(found)} if found else None


def _files(paths: Sequence[Path], documents: Sequence[Document]) -> dict[str, Any]:
    """Returns the files and the machines that they come from."""
    lines, machines = [], []
    for i, (path, document) in enumerate(zip(paths, documents, strict=True)):
        environment, git = document["environment"], document["environment"]["git"] or {}
        # Elsewhere the name alone, since folders are nobody's business.
        file = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path.name
        cells = [
            letter(i), environment["device"], (git.get("commit") or "not known")[:9],
            environment["date"].replace("T", " "), ", ".join(document["sections"]), str(file),
        ]  # fmt: skip
        notes = [("uncommitted changes", "warn")] if git.get("dirty") else []
        lines.append(Line([Cell(text) for text in cells], notes=notes))
        machines.append({"letter": letter(i), "label": environment["device"], "facts": _flat(environment)})
    heads = ["", "machine", "commit", "date, UTC", "sections", "file"]
    return {"grid": Grid("result files", heads, lines), "machines": machines}


def _flat(data: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """Returns the values of nested objects by their names; what is not known is left out."""
    found = {}
    for key, value in data.items():
        name = f"{of} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            found |= _flat(value, name)
        elif value not in (None, []):
            found[name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return found
