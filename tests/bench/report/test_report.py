"""The page of results as text: what is on it, what is marked, and that nothing in a file can become markup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.records.read import read_result
from bench.records.write import dumps
from bench.report.answer import clips_of
from bench.report.figures import bar_charts
from bench.report.page import build_page
from tests.support.page_reader import Reader
from tests.support.result_samples import H100, sample


def page_of(*paths: Path) -> str:
    return build_page(paths, [read_result(path) for path in paths])


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Changes the sections of a file."""
    data = json.loads(path.read_text())
    change(data["sections"])
    path.write_text(dumps(data))
    return path


@pytest.fixture
def one(tmp_path) -> Path:
    return sample(tmp_path / "nvidia-h200.json")


def test_the_page_is_well_formed_loads_nothing_and_does_not_vary(one):
    page = page_of(one)
    reader = Reader(page)
    assert page.startswith('<!doctype html>\n<html lang="en">')
    assert not re.search(r"https?://|@import|url\(|\bfetch\b|XMLHttpRequest|srcset|<(img|iframe|object|embed)\b", page)
    (policy,) = [found["content"] for name, found in reader.elements if found.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert all(found.get("href", "#").startswith(("#", "data:,")) for _, found in reader.elements)
    assert not any(key.startswith("on") or key == "src" for _, found in reader.elements for key in found)
    assert page == page_of(one)


def test_files_machines_and_ceilings_are_named(one):
    text = Reader(page_of(one)).all_text()
    for expected in (
        "NVIDIA H200", "aaaaaaaaa", "2026-11-26 10:00:00", "580.65", "13.0", "2.13.0+cu130", "3.6.0", "700.0",
        "throttled: power cap", "nvidia-h200.json", "after power watts 655.0", "ceiling matmul tflops 760.0",
    ):  # fmt: skip
        assert expected in text, expected
    assert str(one.parent) not in text


def test_everything_that_is_not_measured_is_marked(one):
    reader = Reader(page_of(one))
    for basis, rows in (("extrapolated", 4), ("predicted", 1), ("reported", 2), ("compiled", 9)):
        verdicts = 1 if basis == "extrapolated" else 0
        tiles = 2 if basis == "extrapolated" else 0  # seconds, and the ratio
        assert reader.count("tr", class_=basis) == rows + verdicts, basis
        assert reader.count("span", class_=basis) == rows + verdicts + tiles + 1, basis  # and the legend
    assert reader.count("rect", class_="unmeasured") == 9  # bars: seven times, two peaks


def test_what_failed_is_there_with_its_reason(one):
    text = Reader(page_of(one)).all_text()
    for status, reason in (
        ("out of memory", "CUDA out of memory. Tried to allocate 24.00 GiB"),
        ("wrong", "error 2.2e-01 against float64; not timed"),
        ("not available", "flash-attn is not installed"),
        ("not reached", "the time given was over"),
    ):
        assert status in text
        assert reason in text
    assert "incomplete: CUDA error: an illegal memory access was encountered <kernel & launch>" in text
    running = {"status": "running", "reason": None, "seconds": None}
    changed(one, lambda sections: sections["attention"].update(running))
    assert "incomplete: the run did not say why" in Reader(page_of(one)).all_text()


def test_figures_are_met_or_missed_and_numbers_carry_the_value_they_sort_by(one):
    page = page_of(one)
    assert re.findall(r'badge (\w+)">(met|MISSED)<', page) == [("bad", "MISSED"), ("bad", "MISSED"), ("good", "met")]
    for number in ("0.0475", "216268800", "22400.0", "0.0021"):
        assert f'data-value="{number}"' in page, number
    # A row without a value has none, and so stays at the end.
    assert "<td></td>" in page


def order_of(page: str) -> list[str]:
    """Returns what the page shows, from top to bottom, as the links to it have it."""
    reader = Reader(page)
    shown = [found["id"] for name, found in reader.elements if name == "section" and "id" in found]
    assert shown == [found["href"][1:] for name, found in reader.elements if name == "a"]
    return shown


def kept(path: Path, *names: str) -> Path:
    """Leaves only the sections of these names in a file, in this order."""

    def keep(sections: dict[str, Any]) -> None:
        found = {name: sections.get(name, sections["attention"]) for name in names}
        sections.clear()
        sections.update(found)

    return changed(path, keep)


def test_the_page_opens_with_the_clip_and_ends_with_the_files(one):
    """The answer, then memory, then kernels, then what was missed and the rest, whatever the order in the file."""
    kept(one, "sanitize", "warmth", "dit", "compile", "vae", "attention", "operators", "memory", "csg")
    assert order_of(page_of(one)) == [
        "clip", "section-csg", "section-memory", "section-operators", "section-attention", "section-vae",
        "section-dit", "figures", "section-sanitize", "section-warmth", "section-compile", "files",
    ]  # fmt: skip
    # Without a clip the card comes first, and nothing empty is shown.
    page = page_of(kept(one, "compile", "attention"))
    assert order_of(page) == ["section-attention", "figures", "section-compile", "files"]
    assert page.index("<h1>") < page.index("<b>NVIDIA H200</b>, driver") < page.index("<nav") < page.index("<main")
    changed(one, lambda sections: sections["attention"].update(verdicts=[]))
    assert order_of(page_of(kept(one, "attention"))) == ["section-attention", "files"]
    assert order_of(page_of(kept(one))) == ["files"]


def test_the_answer_is_the_seconds_the_ratio_and_the_card(one):
    """The first to be read are the seconds of the longest clip, what it is faster than, and the card's versions."""
    page = page_of(one)
    section = page[page.index('id="clip"') :]
    places = [
        section.index(text)
        for text in (
            "160.0 s", "one clip: 14b, 2K, two stages, CSG", "114.4x", "faster than end-to-end, 50 steps, guidance: 18",
            "<b>NVIDIA H200</b>, driver 580.65, CUDA 13.0, torch 2.13.0+cu130, Triton 3.6.0, Python 3.12.4, commit"
            " aaaaaaaaa, 2026-11-26", "Extrapolated from 3 of 40 layers, 1 of 4 steps.",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert "The run is incomplete" not in section[: places[-1]]
    cut = {"status": "interrupted", "reason": "interrupted after 105 s"}
    changed(one, lambda sections: sections["csg"].update(cut))
    assert "The run is incomplete: interrupted after 105 s." in Reader(page_of(one)).all_text()


def test_every_card_has_its_answer_from_its_newest_file(tmp_path):
    """GPUs come before CPUs, and an older run of a card is not its answer."""
    made = (
        ("AMD EPYC", 0.1, {"device_type": "cpu"}), ("NVIDIA H200", 1.0, {}), (H100, 0.8, {}), ("NVIDIA H200", 2.0, {})
    )  # fmt: skip
    documents = [
        read_result(sample(tmp_path / f"{i}.json", device, faster=faster, date=f"2026-11-2{i}T10:00:00+00:00", **more))
        for i, (device, faster, more) in enumerate(made)
    ]
    found = [(clip["card"]["letter"], clip["tiles"][0]["value"]) for clip in clips_of(documents)]
    assert found == [("D", "80.00 s"), ("C", "200.0 s"), ("A", "1,600 s")]


def test_only_tables_that_compare_something_have_bars(one):
    tables = {t["name"]: t for s in read_result(one)["sections"].values() for t in s["tables"]}
    assert bar_charts(tables["kernels"], None) == {}
    assert list(bar_charts(tables["attention"], None)) == ["tflops", "peak_bytes"]
    speed, memory = (chart.svg() for chart in bar_charts(tables["operators"], None).values())
    assert "of copy" in speed
    assert "out of memory: CUDA" in speed
    assert "out of memory: CUDA" not in memory


def test_the_command_writes_the_page_whole_and_prints_where(one, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "page.html"
    other = sample(tmp_path / "b.json", H100, faster=0.8)
    assert main(["report", str(one), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text() == page_of(one, other)
    assert {"Roofline, A", "Roofline, B"} <= {text.strip() for _, text in Reader(out.read_text()).texts}
    # Without files: what is in the repository; without --out: a page in out/.
    shipped = tmp_path / "results"
    sample(shipped / "nvidia-h200" / "x.json")
    monkeypatch.setattr("bench.records.read.SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 0
    assert "x.json" in (tmp_path / "out" / "report.html").read_text()


def test_the_command_says_what_is_wrong_and_writes_nothing(one, tmp_path, capsys, monkeypatch):
    cut, out = tmp_path / "cut.json", tmp_path / "page.html"
    cut.write_text(one.read_text()[:3000])
    assert main(["report", str(one), str(cut), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {cut}: is cut off (line ")
    assert not out.exists()
    assert main(["report", str(one), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: out: cannot write {tmp_path}: Is a directory")
    monkeypatch.setattr("bench.records.read.SHIPPED", tmp_path / "nothing")
    assert main(["report", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: files: there are no results in ")
