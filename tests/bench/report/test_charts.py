"""The charts of the page of results: scales, ceilings, marks, and words for who cannot see them."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from bench.records.read import ROOT
from bench.report import charts
from bench.report.charts import Axis, Bar, Point
from model.csg.sampler import SegmentPlan
from tests.support.page_reader import Reader

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title><script>alert('x')</script> & \"\x1b[2J"


def test_axes_have_round_ticks_inside():
    even = Axis(0, 130, 0, 100)
    assert even.ticks() == [0, 50, 100]
    assert (even.at(0), even.at(65), even.at(999)) == (0, 50, 100)
    log = Axis(3, 2000, 0, 100, log=True)
    assert log.ticks() == [10, 100, 1000]
    assert log.at(math.sqrt(3 * 2000)) == 50
    assert Axis(3, 40, 0, 1, log=True).ticks() == [5, 10, 20]
    for low, high in ((1e-9, 3e-9), (0.5, 0.50001), (1e12, 9e15)):
        found = Axis(low, high, 0, 1).ticks()
        assert 2 <= len(found) <= 7, (low, high, found)
        assert all(low <= value <= high * 1.001 for value in found)


def numbers(markup: str, name: str, attribute: str) -> list[float]:
    return [float(found[attribute]) for element, found in Reader(markup).elements if element == name]


def test_bars_are_to_scale_in_a_group_and_say_what_is_missing():
    def drawn(*groups: list[float | None]) -> list[float]:
        found = [(str(i), [Bar("x", v, f"{v}", False, "measured") for v in g]) for i, g in enumerate(groups)]
        return numbers(charts.bars("title", found).svg(), "rect", "width")[1:]  # the paper is the first

    one, two, small = drawn([1.0, 2.0], [0.5])
    assert (one / two, small / two) == (pytest.approx(0.5, abs=0.01), pytest.approx(0.25, abs=0.01))
    # Of groups that are far apart each has its own scale.
    one, two, small = drawn([100.0, 200.0], [0.5])
    assert small == two == pytest.approx(2 * one, abs=0.5)
    assert len(drawn([1.0, None])) == 1
    assert "none here" in charts.bars("t", [("", [Bar("x", None, "none here", True, "measured")])]).svg()
    assert charts.bars("t", [("", [Bar("x", 0.0, "0", True, "measured")])])


def test_a_roofline_has_its_ceilings_and_every_row_under_its_pointer():
    points = [
        Point(2.0, 5.0, "norm", "norm: tip", True, "measured"),
        Point(900.0, 700.0, "gemm", "g", False, "predicted"),
    ]
    markup = charts.roofline("Roofline", points, 4e12, 760.0).svg()
    reader = Reader(markup)
    assert reader.count("circle") == 2
    assert reader.count("circle", class_="ours") == reader.count("circle", class_="unmeasured") == 1
    assert "norm: tip" in reader.all_text()
    assert "matmul 760.0 TFLOP/s" in reader.all_text()
    assert "a copy of 4,000 GB/s" in reader.all_text()
    (roof,) = [found["points"] for name, found in reader.elements if name == "polyline"]
    (_, y0), (ridge, y1), (_, y2) = (map(float, pair.split(",")) for pair in roof.split())
    assert y0 > y1 == y2
    assert ridge > numbers(markup, "circle", "cx")[1]  # 190 operations a byte lie right of 2


def test_a_timeline_keeps_its_peak_its_marks_and_its_limit():
    points = [(i / 1000, {777: 2.0, 12_345: 1e9}.get(i, 100.0 + i)) for i in range(20_000)]
    thinned = charts.thinned(points, 800)
    assert len(thinned) <= 802
    assert thinned == sorted(thinned)
    assert set(thinned) <= set(points)
    assert {points[0], points[777], points[12_345], points[-1]} <= set(thinned)
    marks = [(i / 10, f"segment {i}") for i in range(40)]
    reader = Reader(charts.timeline("memory", points, marks, 2e9, "predicted").svg())
    assert reader.count("line", class_="mark") == 40
    assert reader.count("line", class_="ceiling") == 1
    assert "limit 2.00 GB" in reader.all_text()
    assert "peak 1.00 GB" in reader.all_text()
    assert reader.count("path", class_="unmeasured") == 1
    assert all(f"segment {i}: " in reader.all_text() for i in range(40))  # names that have no room are tips
    assert Reader(charts.timeline("one", [(0.0, 0.0)], [], None, "measured").svg()).count("svg") == 1
    chart = charts.timeline("counted", [(0.0, 0), (9.0, 5)], [(4.0, "decode")], None, "counted")
    counted = Reader(chart.svg()).all_text()
    assert "tensors made and freed" in counted
    assert "decode: 4 " in counted  # no seconds


def test_every_chart_is_a_file_with_a_title_words_and_marks_of_its_own_colours():
    """A chart is XML that loads nothing, whatever stands in its names, and says in words what it shows."""
    drawn = {
        "bars": (charts.bars(HOSTILE, [(HOSTILE, [Bar(HOSTILE, 1.0, HOSTILE, True, "measured")])]), "rect", 1),
        "roofline": (charts.roofline(HOSTILE, [Point(2, 5, HOSTILE, HOSTILE, True, "x")], 4e12, 760.0), "circle", 1),
        "timeline": (charts.timeline(HOSTILE, [(0, 1), (1, 2)], [(0.5, HOSTILE)], 3, "measured"), "path", 2),
        "windows": (charts.windows(SegmentPlan(6)), "rect", 2 * 6),
    }
    for name, (chart, element, count) in drawn.items():
        root = ElementTree.fromstring(chart.svg())
        assert [child.tag.partition("}")[2] for child in root][:3] == ["title", "desc", "style"], name
        assert all(len(root.find(f"{SVG}{child}").text) > 5 for child in ("title", "desc")), name
        marks = [found for found in root.iter(f"{SVG}{element}") if found.get("class") != "paper"]
        assert len(marks) == count, name
        assert root.find(f".//{SVG}script") is None, name
        assert "\x1b" not in chart.svg(), name
        assert "href" not in chart.svg(), name


def test_the_picture_of_the_docs_is_what_is_drawn():
    """README and docs show the windows of the default plan for 81 frames, as ``python -m bench`` leaves them."""
    assert (ROOT / "docs" / "csg.svg").read_text() == charts.windows(SegmentPlan(21)).svg()
