"""The choice of charts: rows of result files become bars, rooflines and courses of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.records.metrics import column_scale, format_value, is_number, significant
from bench.report import charts
from bench.report.charts import Bar, Chart, Point

#: The field of a table's identity whose values are held against each other; the others make the groups.
COMPARED = ("provider", "method", "mode", "variant", "stage", "gpu")
#: The first of these that all rows of a table have is drawn: rates first, since they can stand on one axis whatever
#: the size of the work.
SPEED = ("fraction_of_copy", "tflops", "frames_per_second", "total_seconds", "stage_two_seconds", "seconds")
MEMORY = "peak_bytes"


def section_charts(section: Mapping[str, Any]) -> dict[str, Chart]:
    """Returns all charts of a section by names for their files."""
    found = {"roofline": roofline_chart(section, "Roofline")}
    for table in section["tables"]:
        drawn = bar_charts(table, section.get("ceilings"))
        found |= {f"{table['name']}-{metric}".replace(" ", "-"): chart for metric, chart in drawn.items()}
    found |= {f"timeline-{i}": chart for i, chart in enumerate(timeline_charts(section, ""), 1)}
    return {name: chart for name, chart in found.items() if chart is not None}


def bar_charts(table: Mapping[str, Any], ceilings: Mapping[str, Any] | None) -> dict[str, Chart]:
    """Draws speed and peak memory, by metric, of what a table holds against each other; empty where it does not."""
    field = next((name for name in reversed(table["identity"]) if name in COMPARED), None)
    if field is None:
        return {}
    groups = [group_of(row, table["identity"], field) for row in table["rows"]]
    if len(set(groups)) == len(groups):
        return {}
    found = [row for row in table["rows"] if row["status"] == "ok" and row["basis"] != "reported"]
    of_all = [name for name in SPEED if found and all(is_number(row.get(name)) for row in found)]
    of_some = [name for name in SPEED if any(is_number(row.get(name)) for row in found)]
    speed = next((name for name in (*of_all, *of_some) if name in table["metrics"]), None)
    memory = MEMORY if any(is_number(row.get(MEMORY)) for row in found) and MEMORY in table["metrics"] else None
    drawn = [name for name in (speed, memory) if name is not None]
    return {name: _bars(table, field, name, ceilings, name == drawn[0]) for name in drawn}


def _bars(table: Mapping[str, Any], field: str, name: str, ceilings: Mapping[str, Any] | None, failures: bool) -> Chart:
    """Draws one metric of a table; ``failures``: whether rows without a result have their place, once is enough."""
    groups: dict[str, list[Bar]] = {}
    metric = table["metrics"][name]
    # Times may be far apart, and each has its own unit; bytes have one in a chart, as they have in a column.
    unit = column_scale([row.get(name) for row in table["rows"]], "bytes") if metric["unit"] == "bytes" else (None, "")
    for row in table["rows"]:
        value, ok = row.get(name), row["status"] == "ok"
        if not (is_number(value) if ok else failures):
            continue
        text = _value_text(value, metric, unit) if ok else f"{row['status']}: {row.get('reason', '')}"
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


def group_of(row: Mapping[str, Any], identity: Sequence[str], field: str = "") -> str:
    """Returns the words that tell a row apart, but those of ``field``: what it shares with others in its chart."""
    values = [(name, row[name]) for name in identity if name != field]
    return ", ".join(f"{value} {name}" if is_number(value) else str(value) for name, value in values)


def is_ours(row: Mapping[str, Any], label: str) -> bool:
    """Returns whether a row is this project's own way: it says so, or else it is all but end-to-end."""
    return bool(row["ours"]) if "ours" in row else "end-to-end" not in str(label).replace("_", "-")


def roofline_chart(section: Mapping[str, Any], title: str) -> Chart | None:
    """Draws all rows of a section that have operations, bytes and seconds; None where it lacks a ceiling."""
    ceilings = section.get("ceilings") or {}
    if not {"copy_bytes_per_second", "matmul_tflops"} <= ceilings.keys():
        return None
    points = []
    for table in section["tables"]:
        for row in table["rows"]:
            flops, moved, seconds = (row.get(name) for name in ("flops", "bytes", "seconds"))
            if row["status"] == "ok" and all(is_number(n) and n > 0 for n in (flops, moved, seconds)):
                names = [str(row[name]) for name in table["identity"]]
                label = str(row.get("op") or row.get("layer") or names[0])
                rate = flops / seconds / 1e12
                tip = f"{', '.join(names)}: {significant(rate)} TFLOP/s at {significant(flops / moved)} FLOP/byte"
                tip += f", {format_value(moved / seconds, 'B/s')} GB/s, {row['basis']}"
                points.append(Point(flops / moved, rate, label, tip, is_ours(row, label), row["basis"]))
    if not points:
        return None
    return charts.roofline(title, points, ceilings["copy_bytes_per_second"], ceilings["matmul_tflops"])


def timeline_charts(section: Mapping[str, Any], label: str) -> list[Chart]:
    """Draws the section's courses of memory."""
    return [
        charts.timeline(f"{line['name']}{label}", line["points"], line["marks"], line.get("limit"), line["basis"])
        for line in section["timelines"]
        if line["points"]
    ]


def _value_text(value: float, metric: Mapping[str, Any], scaled: tuple[float | None, str]) -> str:
    """Returns a bar's value with its unit; ``scaled``: the one of all bars, for bytes (:func:`column_scale`)."""
    unit = metric["unit"]
    scale, word = column_scale([value], unit) if unit == "s" else scaled
    words = {"TFLOP/s": " TFLOP/s", "1/s": f" {metric['label']}"}.get(unit, "")
    return f"{format_value(value, unit, scale)}{words} {word}".rstrip()
