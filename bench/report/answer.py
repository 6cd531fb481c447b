"""The answer that a page opens with: the seconds of a clip on each card and how many times faster it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.records.metrics import is_number, significant
from bench.report.figures import is_ours
from bench.report.overview import Document, Tile, card_line


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
    for section, rows in _timed_rows(document, "model", "size", "method"):
        own = [row for row in rows if row["basis"] != "reported"]
        ours = next((row for row in own if is_ours(row, row["method"])), None)
        if ours is None:
            continue
        # Times faster are over end-to-end as the paper samples: what is faster than that is no baseline.
        others = [row for row in own if not is_ours(row, row["method"]) and row["size"] == ours["size"]]
        others = [row for row in others if (_speedup(row) or 0) <= 1]
        slowest = max(others, key=lambda row: row["total_seconds"], default=None)
        same = [r for r in others if _speedup(r) == 1 and r["model"] in (ours["model"], (slowest or {}).get("model"))]
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
    for section, found in _timed_rows(document, "frames", "mode"):
        rows = [row for row in found if row["frames"] == max(other["frames"] for other in found)]
        ours = next((row for row in rows if is_ours(row, row["mode"])), None)
        if ours is None:
            continue
        ratios = []
        for row in rows:
            if not is_ours(row, row["mode"]):
                ratio = row["total_seconds"] / ours["total_seconds"]
                ratios.append((ratio, f"faster than {row['mode']}: {significant(row['total_seconds'])} s"))
        if _speedup(ours):
            ratios.append((_speedup(ours), "faster than end-to-end in Stage II alone"))
        settings = document["sections"][section]["settings"]
        of = f"{settings.get('model', section)}, {settings.get('width')}x{settings.get('height')}"
        return Answer(at, section, f"one clip of {ours['frames']} frames: {of}, {ours['mode']}", ours, ratios)
    return None


def _speedup(row: Mapping[str, Any]) -> float | None:
    """Returns how many times faster a row's clip is; None where that is not known."""
    value = row.get("speedup")
    return value if is_number(value) and value > 0 else None


def _timed_rows(document: Document, *identity: str) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yields each section that has rows of whole clips, told apart by these fields, that were made and have a time."""
    for name, section in document["sections"].items():
        tables = [t for t in section["tables"] if t["identity"] == [*identity] and "total_seconds" in t["metrics"]]
        rows = [row for table in tables for row in table["rows"]]
        if timed := [row for row in rows if row["status"] == "ok" and (row.get("total_seconds") or 0) > 0]:
            yield name, timed


def clips_of(documents: Sequence[Document]) -> list[dict[str, Any]] | None:
    """Returns the answers of all cards as they are shown; None where no file has a clip."""
    return [_told(answer, documents) for answer in answers(documents)] or None


def _told(answer: Answer, documents: Sequence[Document]) -> dict[str, Any]:
    """Returns the seconds, the ratios, what they were extrapolated from, and the card."""
    row, section = answer.row, documents[answer.at]["sections"][answer.section]
    mark = row["basis"] if row["basis"] != "measured" else ""
    tiles = [Tile(f"{significant(row['total_seconds'])} s", answer.label, mark)]
    tiles += [Tile(f"{_ratio(ratio)}x", words, mark) for ratio, words in answer.ratios]
    notes = [(f"{mark.capitalize()} {row['basis_note']}.", "")] if mark and row.get("basis_note") else []
    if section["status"] != "complete":
        notes.append((f"The run is incomplete: {section.get('reason') or section['status']}.", "bad"))
    card = card_line(documents[answer.at], answer.at if len(documents) > 1 else None)
    return {"tiles": tiles, "card": card, "notes": notes}


def _ratio(ratio: float) -> str:
    """Returns a ratio as text with three digits."""
    return f"{ratio:,.{max(0, min(2, 2 - math.floor(math.log10(ratio))))}f}"
