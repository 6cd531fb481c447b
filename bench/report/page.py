"""The page: one HTML string that needs nothing else, built from result files and from nothing but them.

``page.html.j2`` has its form; here and in the files beside it is decided what stands where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.records.comparison import compare_documents, count_verdicts, labels_of, letter, unmatched_lines
from bench.records.markdown import WORDS, summary
from bench.report.answer import clips_of
from bench.report.charts import WIDTH
from bench.report.figures import bar_charts, roofline_chart, timeline_charts
from bench.report.grids import BASES, comparison_grid, data_grid
from bench.report.markup import TEMPLATES
from bench.report.overview import Document, card_line, files_of, verdicts_of
from model.errors import InputError

#: Sections before the figures to be reached: the clip and its memory, then kernels; and those that follow.
FIRST = ("csg", "memory", "operators", "attention", "vae", "dit", "hosts")
THEN = ("precision", "tune", "compile", "sanitize", "tests", "cost")
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

    Raises:
        InputError: there are none.
    """
    if not documents:
        raise InputError("files: expected at least one result file")
    labels, clips = labels_of(paths, documents), clips_of(documents)
    comparison = _comparison(documents, labels)
    titles = {n: section["title"] for document in reversed(documents) for n, section in document["sections"].items()}
    names = list(dict.fromkeys(name for document in documents for name in document["sections"]))
    known = [*FIRST, *THEN]
    # What the page does not know comes last, as it was found.
    ordered = sorted(names, key=lambda name: known.index(name) if name in known else len(known))
    sections = {n: _section(n, titles[n], documents, (comparison or {"tables": []})["tables"]) for n in ordered}
    parts = [
        Part("clip", "clip", "One clip", clips),
        *(part for name, part in sections.items() if name in FIRST),
        Part("figures", "figures", "Figures to be reached", verdicts_of(documents)),
        Part("comparison", "comparison", "Files against A", comparison and _compared(comparison)),
        *(part for name, part in sections.items() if name not in FIRST),
        Part("files", "files", "Files and machines", files_of(paths, documents, labels)),
    ]
    newest = {d["environment"]["device"]: d for d in sorted(documents, key=lambda d: d["environment"]["date"])}
    text = TEMPLATES.get_template("page.html.j2").render(
        parts=[part for part in parts if part.body is not None], bases=BASES, words=WORDS, width=WIDTH,
        cards=[] if clips else [card_line(document) for document in newest.values()],
        many_rows=MANY_ROWS, many_notes=MANY_NOTES,
    )  # fmt: skip
    return f"{text.strip()}\n"


def _section(name: str, title: str, documents: Sequence[Document], compared: Sequence[Mapping[str, Any]]) -> Part:
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
        same = [comparison_grid(c, len(documents)) for c in compared if (c["section"], c["table"]) == (name, table)]
        if found:
            tables.append({"title": next(iter(found.values()))["title"], "panels": panels, "compared": same})
    body = {
        "states": [_state(section, letters[i]) for i, section in having.items()],
        "roofs": [chart for chart in roofs if chart is not None], "tables": tables,
        "timelines": [chart for i, section in having.items() for chart in timeline_charts(section, ends[i])],
    }  # fmt: skip
    return Part("section", f"section-{name.replace(' ', '-')}", title, body, name)


def _state(section: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Returns how a section ended in one file, its notes and its settings."""
    settings = {n: "default" if v is None else v for n, v in (section.get("settings") or {}).items()}
    return {
        "letter": at, "status": section["status"], "complete": section["status"] == "complete",
        "seconds": "" if section.get("seconds") is None else f", {section['seconds']:,.1f} s",
        "reason": section.get("reason") or "the run did not say why; what follows is what it had found",
        "notes": [(note, "") for note in section["notes"]], "settings": settings,
    }  # fmt: skip


def _comparison(documents: Sequence[Document], labels: Sequence[str]) -> dict[str, Any] | None:
    if len(documents) < 2:
        return None
    try:
        return compare_documents(documents, labels)
    except InputError as error:
        # The files may well be of different subjects: then the page is simply all of them.
        first, *rest = str(error).removeprefix("files: ").splitlines()
        return {"tables": [], "warnings": [first], "unmatched": [], "labels": list(labels), "apart": rest}


def _compared(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what to know before the files are compared, and what was not compared."""
    common = [i for i in range(1, len(comparison["labels"])) if count_verdicts(comparison, i)]
    return {
        "summaries": [summary(comparison, i) for i in common], "warnings": comparison["warnings"],
        "rest": [*comparison.get("apart", ()), *unmatched_lines(comparison)],
    }  # fmt: skip
