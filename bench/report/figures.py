"""The choice of charts: rows of result files become bars, rooflines, courses of memory and clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.records.metrics import METRICS, column_scale, format_value, significant, time_scale
from bench.report import charts
from bench.report.charts import Bar, Clip, Point
from bench.report.markup import Markup

#: The field of a table's identity whose values are held against each other; the others make the groups.
COMPARED = ("provider", "method", "mode", "variant", "stage", "gpu")
#: The first of these that all rows of a table have is drawn: rates first, since they can stand on one axis whatever
#: the size of the work.
SPEED = ("fraction_of_copy", "tflops", "frames_per_second", "total_seconds", "stage_two_seconds", "seconds")
MEMORY = "peak_bytes"


def bar_charts(table: Mapping[str, Any], ceilings: Mapping[str, Any] | None) -> list[Markup]:
    """Draws speed and peak memory of what a table holds against each other; empty where it compares nothing."""
    field = next((name for name in reversed(table["identity"]) if name in COMPARED), None)
    if field is None:
        return []
    groups = [group_of(row, table["identity"], field) for row in table["rows"]]
    if len(set(groups)) == len(groups):
        return []
    found = [row for row in table["rows"] if row["status"] == "ok" and row["basis"] != "reported"]
    of_all = [name for name in SPEED if found and all(_is_number(row.get(name)) for row in found)]
    of_some = [name for name in SPEED if any(_is_number(row.get(name)) for row in found)]
    speed = next((name for name in (*of_all, *of_some) if name in table["metrics"]), None)
    memory = MEMORY if any(_is_number(row.get(MEMORY)) for row in found) and MEMORY in table["metrics"] else None
    drawn = [name for name in (speed, memory) if name is not None]
    return [_bars(table, field, name, ceilings, name == drawn[0]) for name in drawn]


def _bars(
    table: Mapping[str, Any], field: str, name: str, ceilings: Mapping[str, Any] | None, failures: bool
) -> Markup:
    """Draws one metric of a table; ``failures``: whether rows without a result have their place, once is enough."""
    groups: dict[str, list[Bar]] = {}
    metric = table["metrics"][name]
    # Times may be far apart, and each has its own unit; bytes have one in a chart, as they have in a column.
    unit = column_scale([row.get(name) for row in table["rows"]], "bytes") if metric["unit"] == "bytes" else (None, "")
    for row in table["rows"]:
        value, ok = row.get(name), row["status"] == "ok"
        if not (_is_number(value) if ok else failures):
            continue
        text = _value_text(value, name, metric["unit"], unit) if ok else f"{row['status']}: {row.get('reason', '')}"
        if ok and row["basis"] != "measured":
            text += f" {row['basis']}"
        label = str(row[field])
        groups.setdefault(group_of(row, table["identity"], field), []).append(
            Bar(label, value if ok else None, text, is_ours(row, label), row["basis"])
        )
    ceiling = None
    if name == "tflops" and ceilings and "matmul_tflops" in ceilings:
        matmul = ceilings["matmul_tflops"]
        dtype = ceilings.get("matmul_dtype", "a dtype that is not named")
        ceiling = matmul, f"matmul in {dtype}, {significant(matmul)} TFLOP/s"
    elif name == "fraction_of_copy":
        ceiling = 1.0, "a copy, in the same run"
    better = {"lower": "shorter is better", "higher": "longer is better"}.get(metric["better"], "")
    return charts.bars(f"{table['title']}: {metric['label']}", list(groups.items()), better, ceiling)


def group_of(row: Mapping[str, Any], identity: Sequence[str], field: str) -> str:
    """Returns the words that a row shares with those that it is held against."""
    values = [(name, row[name]) for name in identity if name != field]
    return ", ".join(f"{value} {name}" if _is_number(value) else str(value) for name, value in values)


def is_ours(row: Mapping[str, Any], label: str) -> bool:
    """Returns whether a row is this project's own way: it says so, or else it is all but end-to-end."""
    return bool(row["ours"]) if "ours" in row else "end-to-end" not in str(label).replace("_", "-")


def roofline_chart(section: Mapping[str, Any], title: str) -> Markup | None:
    """Draws all rows of a section that have operations, bytes and seconds; None where it lacks a ceiling."""
    ceilings = section.get("ceilings") or {}
    if not {"copy_bytes_per_second", "matmul_tflops"} <= ceilings.keys():
        return None
    points = []
    for table in section["tables"]:
        for row in table["rows"]:
            flops, moved, seconds = (row.get(name) for name in ("flops", "bytes", "seconds"))
            if row["status"] == "ok" and all(_is_number(n) and n > 0 for n in (flops, moved, seconds)):
                names = [str(row[name]) for name in table["identity"]]
                label = str(row.get("op") or row.get("layer") or names[0])
                rate = flops / seconds / 1e12
                tip = f"{', '.join(names)}: {significant(rate)} TFLOP/s at {significant(flops / moved)} FLOP/byte"
                tip += f", {format_value(moved / seconds, 'B/s')} GB/s, {row['basis']}"
                points.append(Point(flops / moved, rate, label, tip, is_ours(row, label), row["basis"]))
    if not points:
        return None
    return charts.roofline(title, points, ceilings["copy_bytes_per_second"], ceilings["matmul_tflops"])


def timeline_charts(section: Mapping[str, Any], label: str) -> list[Markup]:
    """Draws the section's courses of memory."""
    return [
        charts.timeline(f"{line['name']}{label}", line["points"], line["marks"], line.get("limit"), line["basis"])
        for line in section["timelines"]
        if line["points"]
    ]


def whole_clips(documents: Sequence[Mapping[str, Any]], letters: Sequence[str]) -> list[Clip]:
    """Returns every configuration whose whole clips have a time, those of the paper first, clips of one pass last."""
    found: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for document, letter in zip(documents, letters, strict=True):
        of_file = "" if len(documents) == 1 else f" ({letter})"
        for row in (row for rows in clip_rows(document).values() for row in rows):
            reported = row["basis"] == "reported"
            rows = found.setdefault(
                (0 if reported else 1, f"{row['model']}, {row['size']}{'' if reported else of_file}"), []
            )
            if not any(reported and row["method"] == other["method"] for other in rows):
                rows.append(row)
        for section, rows in whole_rows(document).items():
            settings = document["sections"][section]["settings"]
            model = str(settings.get("model", section)).split(",")[0]
            name = f"{model}, {settings.get('width')}x{settings.get('height')}{of_file}"
            found[2, name] = [{**row, "method": row["mode"]} for row in rows]
    return [
        Clip(
            name,
            [(r["method"], r["total_seconds"], is_ours(r, r["method"]), r["basis"]) for r in rows],
            _times_faster(rows)
            if last == 2
            else max((n for r in rows if is_ours(r, r["method"]) and (n := speedup_of(r))), default=None),
        )
        for (last, name), rows in sorted(found.items(), key=lambda item: item[0][0])
    ]


def speedup_of(row: Mapping[str, Any]) -> float | None:
    """Returns how many times faster a row's clip is; None where that is not known."""
    value = row.get("speedup")
    return value if _is_number(value) and value > 0 else None


def _times_faster(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the end-to-end clip's time over that of our first mode, the default one; None where one is missing."""
    ours = [row["total_seconds"] for row in rows if is_ours(row, row["method"])]
    others = [row["total_seconds"] for row in rows if not is_ours(row, row["method"])]
    return min(others) / ours[0] if ours and others else None


def clip_rows(document: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns, by section, the rows of clips by model, size and method that have a time."""
    return _timed_rows(document, ["model", "size", "method"])


def whole_rows(document: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns, by section, the rows of the longest clip by frames and mode that was run whole and has a time."""
    found = _timed_rows(document, ["frames", "mode"])
    return {
        name: [r for r in rows if r["frames"] == max(row["frames"] for row in rows)] for name, rows in found.items()
    }


def _timed_rows(document: Mapping[str, Any], identity: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, section in document["sections"].items():
        for table in section["tables"]:
            if table["identity"] == identity and "total_seconds" in table["metrics"]:
                rows = [r for r in table["rows"] if r["status"] == "ok" and (r.get("total_seconds") or 0) > 0]
                if rows:
                    found.setdefault(name, []).extend(rows)
    return found


def _value_text(value: float, name: str, unit: str, scaled: tuple[float | None, str]) -> str:
    """Returns a bar's value with its unit; ``scaled``: the unit that all bars have, of :func:`column_scale`."""
    if unit == "s":
        scale, word = time_scale([value])
        return f"{significant(value / scale)} {word}"
    words = {"TFLOP/s": " TFLOP/s", "1/s": f" {METRICS[name].label}" if name in METRICS else " /s"}
    return f"{format_value(value, unit, scaled[0])}{words.get(unit, '')} {scaled[1]}".rstrip()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
