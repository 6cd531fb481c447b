"""The page: one HTML string that needs nothing else, built from result files and from nothing but them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records.comparison import compare_documents, count_verdicts, labels_of, letter
from bench.records.comparison_text import summary, unmatched_lines
from bench.report.answer import answer_block
from bench.report.figures import bar_charts, roofline_chart, timeline_charts
from bench.report.markup import Markup, tag
from bench.report.overview import TITLE, Document, files_block, legend, page_header, verdicts_block
from bench.report.tables import badge, comparison_table, data_table
from model.errors import InputError

#: Nothing may be loaded from anywhere: the browser itself holds the page to it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
#: Sections before the figures to be reached: the clip and its memory, then kernels; and those that follow.
FIRST = ("csg", "memory", "operators", "attention", "vae", "dit", "hosts")
THEN = ("precision", "tune", "compile", "sanitize", "tests", "cost")
#: Bars beyond which a chart is folded away.
MANY_ROWS = 40
#: Notes beyond which the notes of a section are folded away.
MANY_NOTES = 6


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
    labels = labels_of(paths, documents)
    names = list(dict.fromkeys(name for document in documents for name in document["sections"]))
    titles = {n: next(d["sections"][n]["title"] for d in documents if n in d["sections"]) for n in names}
    comparison = _comparison(documents, labels)
    here = Path(__file__)
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("title", TITLE),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"), tag("link", rel="icon", href="data:,"),
        tag("style", Markup(here.with_name("page.css").read_text())),
    )  # fmt: skip
    answer, verdicts = answer_block(documents), verdicts_block(documents)
    parts: list[tuple[str, str, Markup | None]] = [("clip", "One clip", answer)]
    parts += [_part(name, titles[name], documents, comparison) for name in FIRST if name in names]
    parts.append(("figures", "Figures to be reached", verdicts))
    parts.append(("comparison", "Files against A", _compared(comparison) if comparison else None))
    parts += [_part(name, titles[name], documents, comparison) for name in _in_order(names) if name not in FIRST]
    parts.append(("files", "Files and machines", files_block(paths, documents, labels)))
    shown = [(at, text, part) for at, text, part in parts if part is not None]
    navigation = tag("nav", [tag("a", text, href=f"#{at}") for at, text, _ in shown], aria_label="sections")
    first, *rest = [part for _, _, part in shown]
    main = tag("main", first, legend(), rest)
    script = tag("script", Markup(here.with_name("page.js").read_text()))
    body = tag("body", page_header(documents, answer is not None), navigation, main, script)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _in_order(names: Sequence[str]) -> list[str]:
    """Returns the sections in the order of a page; those that it does not know come last, as they were found."""
    known = [*FIRST, *THEN]
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def _part(
    name: str, title: str, documents: Sequence[Document], comparison: Mapping[str, Any] | None
) -> tuple[str, str, Markup]:
    at = f"section-{name.replace(' ', '-')}"
    return at, title, _section(name, title, documents, comparison)


def _section(name: str, title: str, documents: Sequence[Document], comparison: Mapping[str, Any] | None) -> Markup:
    # What ran on a GPU comes first; files keep their letters.
    order = sorted(range(len(documents)), key=lambda i: documents[i]["environment"]["device_type"] == "cpu")
    having = {i: documents[i]["sections"][name] for i in order if name in documents[i]["sections"]}
    several = len(documents) > 1
    pieces: list[Any] = [tag("h2", title, " ", tag("small", f"python -m bench {name}"))]
    pieces.append(tag("div", [_status(i, section, several) for i, section in having.items()], class_="states"))
    roofs = [roofline_chart(section, f"Roofline{_of(i, several)}") for i, section in having.items()]
    if drawn := [chart for chart in roofs if chart is not None]:
        pieces.append(tag("div", drawn, class_="panels"))
    for table in dict.fromkeys(table["name"] for section in having.values() for table in section["tables"]):
        found = {i: t for i, s in having.items() for t in s["tables"] if t["name"] == table and t["rows"]}
        if found:
            pieces.append(tag("h3", next(iter(found.values()))["title"]))
            pieces.append(tag("div", [_panel(i, found[i], having[i], several) for i in found], class_="panels"))
        for compared in (comparison or {"tables": []})["tables"]:
            if (compared["section"], compared["table"]) == (name, table):
                pieces.append(tag("h4", "Side by side, as ratios over A"))
                pieces.append(comparison_table(compared, len(documents)))
    if lines := [chart for i, s in having.items() for chart in timeline_charts(s, _of(i, several))]:
        pieces += [tag("h3", "Memory over time"), tag("div", lines, class_="panels")]
    return tag("section", pieces, id=f"section-{name.replace(' ', '-')}")


def _of(i: int, several: bool) -> str:
    return f", {letter(i)}" if several else ""


def _status(i: int, section: Mapping[str, Any], several: bool) -> Markup:
    complete = section["status"] == "complete"
    seconds = "" if section.get("seconds") is None else f", {section['seconds']:,.1f} s"
    words = [tag("span", letter(i), class_="file") if several else None, " ",
             badge(section["status"], "good" if complete else "bad"), seconds]  # fmt: skip
    if not complete:
        reason = section.get("reason") or "the run did not say why; what follows is what it had found"
        words.append(tag("span", f" incomplete: {reason}", class_="bad"))
    notes = [tag("p", note, class_="note") for note in section["notes"]]
    if len(notes) > MANY_NOTES:
        notes = [tag("details", tag("summary", f"{len(notes)} notes"), notes)]
    settings = section.get("settings") or {}
    listed = [tag("div", tag("dt", n), tag("dd", "default" if v is None else v)) for n, v in settings.items()]
    folded = tag("details", tag("summary", "settings"), tag("dl", listed, class_="facts")) if listed else None
    return tag("div", tag("p", words), notes, folded, class_="state" if complete else "state incomplete")


def _panel(i: int, table: Mapping[str, Any], section: Mapping[str, Any], several: bool) -> Markup:
    """Returns a table of one file and its charts."""
    drawn = bar_charts(table, section.get("ceilings"))
    if drawn and len(table["rows"]) > MANY_ROWS:
        charted: Any = tag("details", tag("summary", f"charts of {len(table['rows'])} rows"), drawn)
    else:
        charted = tag("div", drawn, class_="pair") if drawn else None
    title = tag("h4", tag("span", letter(i), class_="file")) if several else None
    return tag("div", title, charted, data_table(table), class_="panel")


def _comparison(documents: Sequence[Document], labels: Sequence[str]) -> dict[str, Any] | None:
    if len(documents) < 2:
        return None
    try:
        return compare_documents(documents, labels)
    except InputError as error:
        # The files may well be of different subjects: then the page is simply all of them.
        first, *rest = str(error).removeprefix("files: ").splitlines()
        return {"tables": [], "warnings": [first], "unmatched": [], "labels": list(labels), "apart": rest}


def _compared(comparison: Mapping[str, Any]) -> Markup:
    """Returns what to know before the files are compared, and what was not compared."""
    lines = [*comparison.get("apart", ()), *unmatched_lines(comparison)]
    heading = tag("h2", "Files against A")
    common = [i for i in range(1, len(comparison["labels"])) if count_verdicts(comparison, i)]
    counts = [tag("li", summary(comparison, i)) for i in common]
    warned = tag("ul", counts, [tag("li", warning, class_="warn") for warning in comparison["warnings"]])
    rest = tag("details", tag("summary", f"not compared: {len(lines)}"), tag("ul", [tag("li", x) for x in lines]))
    return tag("section", heading, warned, rest if lines else None, id="comparison")
