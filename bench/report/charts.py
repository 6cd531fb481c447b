"""Charts as SVG, on the page and as files of their own; ``charts.css`` has their colours in light and in dark mode.

Ours is blue and others are grey; what is not measured is drawn hollow or dashed. Every mark says its numbers when the
pointer rests on it, and every chart has a title and a description.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from bench.records.metrics import column_scale, format_value, significant
from bench.records.write import thinned
from bench.report.markup import TEMPLATES, tag
from model.csg.sampler import SegmentPlan

WIDTH = 680
#: Pixels of a bar chart's labels on the left, and of its values on the right.
_LABELS, _VALUES = 226, 150
_LINE, _BAR = 20, 13
#: Pixels of a character at the charts' 12 pixels, on the safe side.
_CHARACTER = 6.6


class Chart(NamedTuple):
    """A chart: what it shows in words, and its marks, in a box of :data:`WIDTH` times ``height`` pixels."""

    kind: str
    title: str
    description: str
    height: float
    marks: Sequence[Markup]

    def svg(self) -> str:
        """Returns the chart as a file of its own."""
        return TEMPLATES.get_template("chart.svg.j2").render(chart=self, width=WIDTH)


class Bar(NamedTuple):
    """The bar of one implementation; ``value`` is None where there is none, and ``text`` then says why."""

    label: str
    value: float | None
    text: str
    ours: bool
    basis: str


class Point(NamedTuple):
    """One row in a roofline: operations per byte and TFLOP/s; ``tip`` is what the pointer reads."""

    intensity: float
    tflops: float
    label: str
    tip: str
    ours: bool
    basis: str


@dataclass(frozen=True)
class Axis:
    """An axis that turns values into pixels, evenly or by powers of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Returns the pixel of a value; what is outside lies on the edge."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    def ticks(self) -> list[float]:
        """Returns about five round values inside."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
            found = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in found if self.low <= value <= self.high * 1.0001]


def bars(
    title: str,
    groups: Sequence[tuple[str, Sequence[Bar]]],
    note: str = "",
    ceiling: tuple[float, str] | None = None,
) -> Chart:
    """Draws horizontal bars in groups, each bar's value beside it.

    Args:
        title: title of the chart.
        groups: pairs of label and bars.
        note: a few words on what the values are.
        ceiling: a value that all are held against, and its name.
    """
    highest = [max((bar.value or 0 for bar in found), default=0) for _, found in groups]
    positive = [value for value in highest if value > 0]
    # Bars of a short clip beside those of a long one would be invisible.
    own = bool(positive) and max(positive) > 20 * min(positive) and ceiling is None
    common = max([*positive, ceiling[0] if ceiling else 0]) or 1.0
    marks: list[Markup] = []
    y, end = 8 + (_LINE if ceiling else 0), WIDTH - _VALUES
    for (label, found), high in zip(groups, highest, strict=True):
        if label:
            marks.append(_text(label, 0, y + 13, "group", limit=WIDTH))
            y += _LINE
        axis = Axis(0, (high or 1.0) if own else common, _LABELS, end)
        for bar in found:
            marks += _bar(bar, axis, y)
            y += _LINE
        y += 8
    if ceiling:
        x = Axis(0, common, _LABELS, end).at(ceiling[0])
        # Beneath the bars' values.
        marks.insert(0, tag("line", x1=x, x2=x, y1=22, y2=y - 6, class_="ceiling"))
        marks.append(_text(ceiling[1], x, 16, "ceiling-label", anchor="end"))
    scale = "each group is drawn to its own scale" if own else "all bars are drawn to one scale"
    return Chart("bars", title, f"{note}; {scale}" if note else scale, y, marks)


def _bar(bar: Bar, axis: Axis, y: float) -> list[Markup]:
    parts = [_text(bar.label, _LABELS - 8, y + 11, "", anchor="end", limit=_LABELS - 8)]
    if bar.value is None:
        return [*parts, _text(bar.text, _LABELS + 2, y + 11, "failed", limit=WIDTH - _LABELS)]
    length = max(axis.at(bar.value) - axis.start, 1.0)
    tip, kind = tag("title", f"{bar.label}: {bar.text}"), _kind("bar", bar.ours, bar.basis)
    parts.append(tag("rect", tip, x=_LABELS, y=y, width=round(length, 1), height=_BAR, rx=2, class_=kind))
    at = axis.start + length + 6
    return [*parts, _text(bar.text, round(at, 1), y + 11, "value", limit=WIDTH - at)]


def _kind(mark: str, ours: bool, basis: str) -> str:
    return f"{mark} {'ours' if ours else 'other'}{'' if basis == 'measured' else ' unmeasured'}"


def roofline(title: str, points: Sequence[Point], copy_bytes_per_second: float, matmul_tflops: float) -> Chart:
    """Draws TFLOP/s over operations per byte, under the two ceilings that were measured in the same run."""
    ridge, height = matmul_tflops * 1e12 / copy_bytes_per_second, 400
    xs, ys = [p.intensity for p in points] + [ridge], [p.tflops for p in points] + [matmul_tflops]
    x = Axis(min(xs) / 2, max(xs) * 3, 58, WIDTH - 24, log=True)
    y = Axis(min(ys) / 2, max(ys) * 1.7, height - 44, 14, log=True)
    marks = _grid(x, y, "operations per byte", "TFLOP/s")
    bottom = max(x.low, y.low * 1e12 / copy_bytes_per_second)
    roof = [(bottom, bottom * copy_bytes_per_second / 1e12), (ridge, matmul_tflops), (x.high, matmul_tflops)]
    marks.append(tag("polyline", points=" ".join(f"{x.at(a)},{y.at(b)}" for a, b in roof), class_="ceiling"))
    label = f"matmul {significant(matmul_tflops)} TFLOP/s"
    marks.append(_text(label, x.end, y.at(matmul_tflops) - 6, "ceiling-label", anchor="end"))
    above = y.at(matmul_tflops)
    taken: list[tuple[float, float, float, float]] = [(x.end - 240, above - 20, x.end, above)]
    for point in sorted(points, key=lambda p: p.ours):
        at = x.at(point.intensity), y.at(point.tflops)
        kind = _kind("point", point.ours, point.basis)
        marks.append(tag("circle", tag("title", point.tip), cx=at[0], cy=at[1], r=4.5, class_=kind))
        taken.append((at[0] - 4, at[1] - 4, at[0] + 4, at[1] + 4))
    marks += _point_labels(points, x, y, taken)
    words = f"{len(points)} rows; dashed: a copy of {format_value(copy_bytes_per_second, 'B/s')} GB/s and the matmul,"
    words += f" in the same run; they meet at {ridge:,.0f} operations per byte"
    return Chart("roofline", title, words, height, marks)


def _point_labels(points: Sequence[Point], x: Axis, y: Axis, taken: list[Any]) -> list[Markup]:
    """Draws names for our points, each once, where there is room; all have their names under the pointer."""
    # The fastest of a name comes last and stays.
    best = {p.label: p for p in sorted(points, key=lambda p: p.tflops) if p.ours}
    marks = []
    for point in reversed(best.values()):
        px, py, width = x.at(point.intensity), y.at(point.tflops), len(point.label) * _CHARACTER * 0.92
        for left in (px + 8, px - 8 - width):
            box = left, py - 6, left + width, py + 6
            free = not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            if free and box[0] > x.start and box[2] < x.end and y.end < box[1] and box[3] < y.start:
                taken.append(box)
                marks.append(_text(point.label, left, py + 4, ""))
                break
    return marks


def timeline(
    title: str,
    points: Sequence[tuple[float, float]],
    marks: Sequence[tuple[float, str]],
    limit: float | None,
    basis: str,
) -> Chart:
    """Draws allocated bytes over seconds, with what began where and, if there was one, the limit.

    Counted courses have no time: they go over the tensors made and freed, in order.
    """
    height, top = 270, 50
    seconds, sizes = [p[0] for p in points], [p[1] for p in points]
    counted = basis == "counted"
    unit, unit_name = (1.0, "") if counted else column_scale([max(seconds) or 1.0], "s")
    over = "tensors made and freed, in order" if counted else f"time, {unit_name}"
    x = Axis(min(seconds), max(max(seconds), 1.001 * min(seconds) + 1e-9), 58, WIDTH - 24)
    y = Axis(0, 1.08 * max([*sizes, limit or 0, 1.0]), height - 40, top)
    size, size_name = column_scale([y.high], "bytes")
    shown = Axis(x.low / unit, x.high / unit, x.start, x.end), Axis(0, y.high / size, y.start, y.end)
    drawn = _grid(*shown, over, f"{size_name} allocated")
    line = [(x.at(s), y.at(b)) for s, b in thinned(points, 800)]
    path = f"M{line[0][0]},{line[0][1]}" + "".join(f"H{a}V{b}" for a, b in line[1:])
    dashed = "" if basis == "measured" else " unmeasured"
    drawn.append(tag("path", d=f"{path}V{y.start}H{line[0][0]}Z", class_="area"))
    drawn.append(tag("path", d=path, class_=f"line{dashed}"))
    if limit is not None:
        at = y.at(limit)
        drawn.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="ceiling"))
        text = f"limit {format_value(limit, 'bytes')}"
        drawn.append(_text(text, x.end, at - 5, "ceiling-label", anchor="end"))
    drawn += _timeline_marks(marks, x, y, counted)
    peak = format_value(max(sizes), "bytes")
    length = f"{seconds[-1]:,.0f} steps" if counted else f"{significant(seconds[-1])} s"
    return Chart("timeline", title, f"peak {peak} over {length}, {basis}", height, drawn)


def _timeline_marks(marks: Sequence[tuple[float, str]], x: Axis, y: Axis, counted: bool) -> list[Markup]:
    """Draws vertical lines, with names in three rows above where there is room; all have theirs under the pointer."""
    drawn, ends = [], [0.0] * 3
    for at, label in sorted(marks, key=lambda mark: mark[0]):
        tip = f"{label}: {at:,.0f}" if counted else f"{label}: {significant(at)} s"
        drawn.append(tag("line", tag("title", tip), x1=x.at(at), x2=x.at(at), y1=y.end - 8, y2=y.start, class_="mark"))
        # Toward the end there is no room to the right of its line.
        width = len(label) * _CHARACTER
        left = x.at(at) + 3 if x.at(at) + 3 + width < WIDTH else x.at(at) - 3 - width
        row = next((i for i, end in enumerate(ends) if end < left), None)
        if row is not None:
            ends[row] = left + width + 4
            drawn.append(_text(label, left, y.end - 11 - 13 * row, "mark-label"))
    return drawn


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> list[Markup]:
    """Draws lines at round values of both axes, and the axes' names."""
    marks = []
    for value in x.ticks():
        marks.append(tag("line", x1=x.at(value), x2=x.at(value), y1=y.start, y2=y.end, class_="grid"))
        marks.append(_text(_tick(value), x.at(value), y.start + 16, "tick", anchor="middle"))
    for value in y.ticks():
        marks.append(tag("line", x1=x.start, x2=x.end, y1=y.at(value), y2=y.at(value), class_="grid"))
        marks.append(_text(_tick(value), x.start - 7, y.at(value) + 4, "tick", anchor="end"))
    marks.append(_text(x_label, (x.start + x.end) / 2, y.start + 34, "tick", anchor="middle"))
    middle = round((y.start + y.end) / 2, 1)
    turned = f"rotate(-90 12 {middle})"
    return [*marks, _text(y_label, 12, middle, "tick", anchor="middle", transform=turned)]


def _tick(value: float) -> str:
    return f"{value:,g}" if value >= 1e-4 or value == 0 else f"{value:.0e}"


def _text(
    text: str, x: float, y: float, kind: str, *, anchor: str | None = None, limit: float | None = None, **more: Any
) -> Markup:
    """Draws text, cut to the pixels that there are; then the pointer reads it whole."""
    room = len(text) if limit is None else max(int(limit / _CHARACTER), 4)
    shown = text if len(text) <= room else f"{text[: room - 1]}\N{HORIZONTAL ELLIPSIS}"
    whole = tag("title", text) if shown != text else None
    return tag("text", whole, shown, x=round(x, 1), y=round(y, 1), class_=kind or None, text_anchor=anchor, **more)


def windows(plan: SegmentPlan) -> Chart:
    """Draws which blocks every window of a plan holds: one line a segment."""
    pitch, left = (WIDTH - 40) / plan.num_blocks, 40
    marks = [_text("segment", 0, 16, "tick"), _text("block (latent frame) of the clip", WIDTH / 2, 16, "tick")]
    for line, window in enumerate(plan):
        y = 26 + 24 * line
        marks.append(_text(str(line + 1), left - 10, y + 14, "tick", anchor="end"))
        kinds = dict.fromkeys(window.conditioning, "neighbour") | dict.fromkeys(window.noisy, "noisy")
        for block in range(plan.num_blocks):
            kind = kinds.get(block, "absent")
            kind = "anchor" if (block, kind) == (0, "neighbour") else kind
            tip = tag("title", f"segment {line + 1}, block {block}: {kind}")
            at = round(left + pitch * block, 1)
            marks.append(tag("rect", tip, x=at, y=y, width=round(pitch - 3, 1), height=20, class_=f"block {kind}"))
    y = 40 + 24 * len(plan)
    for block in range(plan.num_blocks):
        marks.append(_text(str(block), left + pitch * (block + 0.5) - 1.5, y, "tick", anchor="middle"))
    words = "yellow: the anchor (input image); light blue: neighbours; blue: noisy, made in this segment"
    return Chart("windows", f"The windows of CSG, {plan.num_blocks} blocks", words, y + 8, marks)
