"""The answer that a page opens with: the seconds of a clip on each card and how many times faster it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.records.comparison import letter
from bench.records.metrics import is_number, significant
from bench.report.figures import COMPARED, group_of, is_ours

Document = Mapping[str, Any]


def clips_of(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Returns the clip of every card, from its newest file that has one: tiles, notes and card; GPUs come first."""
    found: dict[str, dict[str, Any]] = {}
    in_time = sorted(enumerate(documents), key=lambda pair: pair[1]["environment"]["date"], reverse=True)
    for i, document in sorted(in_time, key=lambda pair: pair[1]["environment"]["device_type"] == "cpu"):
        device = document["environment"]["device"]
        clip = _clip(document) if device not in found else None
        if clip is not None:
            found[device] = clip | {"card": card_line(document, letter(i) if len(documents) > 1 else "")}
    return list(found.values())


def card_line(document: Document, at: str = "") -> dict[str, str]:
    """Returns the card and the versions that a file's figures depend on; ``at``: the file's letter."""
    environment, git = document["environment"], document["environment"]["git"] or {}
    versions = {
        "driver": environment.get("gpu", {}).get("driver"), "CUDA": environment.get("gpu", {}).get("cuda"),
        "torch": environment["packages"].get("torch"), "Triton": environment["packages"].get("triton"),
        "Python": environment.get("python"), "commit": (git.get("commit") or "")[:9], "": environment["date"][:10],
    }  # fmt: skip
    words = ", ".join(f"{name} {value}".strip() for name, value in versions.items() if value)
    return {"device": environment["device"], "versions": words, "letter": at}


def _clip(document: Document) -> dict[str, Any] | None:
    """Returns our longest clip that is there in another way too, over the first of these ways: the baseline."""
    for section in document["sections"].values():
        for table in section["tables"]:
            *work, way = table["identity"]
            rows = [row for row in table["rows"] if row["status"] == "ok" and row["basis"] != "reported"]
            timed = [row for row in rows if is_number(row.get("total_seconds")) and row["total_seconds"] > 0]
            pairs = [
                (ours, other)
                for ours in timed
                for other in timed
                if is_ours(ours, ours[way]) and not is_ours(other, other[way])
                if all(ours[name] == other[name] for name in work)
            ]
            if pairs and way in COMPARED:
                return _told(section, table, *max(pairs, key=lambda pair: pair[0]["total_seconds"]))
    return None


def _told(section: Mapping[str, Any], table: Mapping[str, Any], ours: Any, other: Any) -> dict[str, Any]:
    """Returns the seconds, the ratio and what they were extrapolated from."""
    seconds, theirs, known = ours["total_seconds"], other["total_seconds"], section["settings"]
    # What rows do not say of the clip, settings do.
    clip = [f"{known['frames']} frames"] if is_number(known.get("frames")) else []
    clip += [f"{known.get('model', '')}, {known['width']}x{known.get('height')}"] if "width" in known else []
    clip += [group_of(ours, table["identity"])]
    mark = ours["basis"] if ours["basis"] != "measured" else ""
    faster = f"faster than {other[table['identity'][-1]]}: {significant(theirs)} s"
    tiles = [
        {
            "value": f"{significant(seconds)} s",
            "words": f"one clip: {', '.join(clip)}",
            "badge": mark,
        },
        {"value": f"{significant(theirs / seconds)}x", "words": faster, "badge": mark},
    ]
    notes = [(f"{mark.capitalize()} {ours['basis_note']}.", "")] if mark and ours.get("basis_note") else []
    if section["status"] != "complete":
        notes.append((f"The run is incomplete: {section.get('reason') or section['status']}.", "bad"))
    return {"tiles": tiles, "notes": notes}
