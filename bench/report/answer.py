"""The answer that a page opens with: the seconds of a clip on each card, how many times faster it is, and its chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.records.comparison import letter
from bench.records.metrics import format_value, significant
from bench.report import charts
from bench.report.figures import clip_rows, is_ours, speedup_of, whole_clips, whole_rows
from bench.report.markup import Markup, tag
from bench.report.tables import Cell, badge, sortable

Document = Mapping[str, Any]


class Answer(NamedTuple):
    """The clip of one card: its row, and what it is faster than as (ratio, words)."""

    at: int
    section: str
    label: str
    row: Mapping[str, Any]
    ratios: Sequence[tuple[float, str]]


def answers(documents: Sequence[Document]) -> list[Answer]:
    """Returns the clip of every card, from its newest file that has one; GPUs come first."""
    in_time = sorted(enumerate(documents), key=lambda pair: pair[1]["environment"]["date"], reverse=True)
    found: dict[str, Answer] = {}
    for at, document in in_time:
        answer = _two_stages(at, document) or _whole_pass(at, document)
        if answer is not None:
            found.setdefault(document["environment"]["device"], answer)
    return sorted(found.values(), key=lambda a: documents[a.at]["environment"]["device_type"] == "cpu")


def _two_stages(at: int, document: Document) -> Answer | None:
    """Returns the first clip of two stages, over the slowest end-to-end clip and over that of the same model."""
    for section, rows in clip_rows(document).items():
        own = [row for row in rows if row["basis"] != "reported"]
        ours = next((row for row in own if is_ours(row, row["method"])), None)
        if ours is None:
            continue
        # Times faster are over end-to-end as the paper samples: what is faster than that is no baseline.
        others = [row for row in own if not is_ours(row, row["method"]) and row["size"] == ours["size"]]
        others = [row for row in others if (speedup_of(row) or 0) <= 1]
        slowest = max(others, key=lambda row: row["total_seconds"], default=None)
        same = [r for r in others if speedup_of(r) == 1 and r["model"] in (ours["model"], (slowest or {}).get("model"))]
        baselines = [] if slowest is None else [slowest, *(row for row in same if row is not slowest)]
        ratios = [
            (r["total_seconds"] / ours["total_seconds"],
             f"faster than {r['model']}, {r['method']}: {significant(r['total_seconds'])} s")
            for r in baselines
        ]  # fmt: skip
        frames = document["sections"][section]["settings"].get("frames")
        clip = f"one clip of {frames} frames" if isinstance(frames, int) else "one clip"
        return Answer(at, section, f"{clip}: {ours['model']}, {ours['size']}, {ours['method']}", ours, ratios)
    return None


def _whole_pass(at: int, document: Document) -> Answer | None:
    """Returns the longest clip that was measured whole, over the same clip end-to-end."""
    for section, rows in whole_rows(document).items():
        ours = next((row for row in rows if is_ours(row, row["mode"])), None)
        if ours is None:
            continue
        ratios = []
        for row in rows:
            if not is_ours(row, row["mode"]):
                ratio = row["total_seconds"] / ours["total_seconds"]
                ratios.append((ratio, f"faster than {row['mode']}: {significant(row['total_seconds'])} s"))
        if speedup_of(ours):
            ratios.append((speedup_of(ours), "faster than end-to-end in Stage II alone"))
        settings = document["sections"][section]["settings"]
        of = f"{settings.get('model', section)}, {settings.get('width')}x{settings.get('height')}"
        return Answer(at, section, f"one clip of {ours['frames']} frames: {of}, {ours['mode']}", ours, ratios)
    return None


def answer_block(documents: Sequence[Document]) -> Markup | None:
    """Returns the clips of all cards with their chart, and the paper beside them; None where no file has a clip."""
    found = answers(documents)
    letters = [letter(i) for i in range(len(documents))]
    drawn = whole_clips(documents, letters)
    if not found and not drawn:
        return None
    chart = charts.clips("Seconds of one clip", drawn) if drawn else None
    told = [_answer(answer, documents) for answer in found]
    return tag("section", tag("h2", "One clip"), told[:1], chart, told[1:], _paper(documents, letters), id="clip")


def _answer(answer: Answer, documents: Sequence[Document]) -> Markup:
    """Returns the seconds, the ratios, what they were extrapolated from, and the card."""
    row, section = answer.row, documents[answer.at]["sections"][answer.section]
    mark = badge(row["basis"]) if row["basis"] != "measured" else None
    tiles = [_tile(f"{significant(row['total_seconds'])} s", answer.label, mark)]
    tiles += [_tile(f"{_ratio(ratio)}x", words, mark) for ratio, words in answer.ratios]
    notes = []
    if row["basis"] != "measured" and row.get("basis_note"):
        notes.append(tag("p", f"{row['basis'].capitalize()} {row['basis_note']}.", class_="note"))
    if section["status"] != "complete":
        notes.append(
            tag("p", f"The run is incomplete: {section.get('reason') or section['status']}.", class_="note bad")
        )
    several = len(documents) > 1
    line = card_line(documents[answer.at], answer.at if several else None)
    return tag("div", tag("div", tiles, class_="tiles"), line, notes, class_="answer")


def _ratio(ratio: float) -> str:
    """Returns a ratio as text with three digits."""
    return f"{ratio:,.{max(0, min(2, 2 - math.floor(math.log10(ratio))))}f}"


def _tile(value: str, words: str, mark: Markup | None) -> Markup:
    return tag("div", tag("b", value), tag("span", words, " ", mark), class_="tile")


def card_line(document: Document, at: int | None = None) -> Markup:
    """Returns the card and the versions that a file's figures depend on, in one line; ``at``: the file's number."""
    environment, git = document["environment"], document["environment"]["git"] or {}
    gpu, packages = environment.get("gpu", {}), environment["packages"]
    versions = [
        ("driver", gpu.get("driver")), ("CUDA", gpu.get("cuda")), ("cuDNN", cudnn_version(gpu.get("cudnn"))),
        ("torch", packages.get("torch")), ("Triton", packages.get("triton")), ("Python", environment.get("python")),
        ("commit", git["commit"][:9] if git.get("commit") else None), ("", environment["date"][:10]),
    ]  # fmt: skip
    words = [f"{name} {value}".strip() for name, value in versions if value]
    file = None if at is None else tag("span", letter(at), class_="file", title="file, listed at the end")
    return tag("p", tag("b", environment["device"]), f", {', '.join(words)} ", file, class_="card")


def cudnn_version(number: Any) -> str | None:
    """Returns ``9.12.0`` for cuDNN's number 91200; None where there is none."""
    if not isinstance(number, int):
        return None if number is None else str(number)
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def _paper(documents: Sequence[Document], letters: Sequence[str]) -> list[Markup] | None:
    """Returns what the paper reports beside our own, where a file has both."""
    rows = [
        (at, row)
        for document, at in zip(documents, letters, strict=True)
        for found in clip_rows(document).values()
        for row in found
    ]
    if not any(row["basis"] == "reported" for _, row in rows) or all(row["basis"] == "reported" for _, row in rows):
        return None
    theirs = {is_ours(row, row["method"]): row for _, row in rows if row["basis"] == "reported"}
    lines, said = [], set()
    for at, row in sorted(rows, key=lambda pair: pair[1]["basis"] != "reported"):
        reported, ours = row["basis"] == "reported", is_ours(row, row["method"])
        if reported and row["method"] in said:
            continue
        said |= {row["method"]} if reported else set()
        same = theirs.get(ours)
        over = same["total_seconds"] / row["total_seconds"] if same and same["size"] == row["size"] else None
        cells = [
            Cell(badge(row["basis"]), row["basis"]), Cell(row["model"], row["model"]), Cell(row["size"], row["size"]),
            Cell(row["method"], row["method"]),
            Cell(tag("span", significant(row["total_seconds"]), class_="figure-value"), row["total_seconds"]),
            Cell(format_value(speedup_of(row), "ratio"), speedup_of(row)),
            Cell("" if over is None or reported else format_value(over, "ratio"), over),
            Cell("" if reported else at, at), Cell(row.get("basis_note", ""), row.get("basis_note"), "notes"),
        ]  # fmt: skip
        kind = f"{'ours ' if ours and not reported else ''}unmeasured {row['basis']}"
        lines.append((kind if row["basis"] != "measured" else "ours" if ours else "", cells))
    headers = ["basis", "model", "size", "method", "whole clip, s", "times faster", "the paper's time over this"]
    note = "Times faster: than end-to-end with 50 steps and guidance, of the same model and size. The paper's card is"
    note += " another, and so are its models' weights and its baseline's code."
    return [
        tag("h3", "The paper beside ours", id="paper"),
        sortable("the paper beside ours", [*headers, "file", "note"], lines), tag("p", note, class_="note"),
    ]  # fmt: skip
