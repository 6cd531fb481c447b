"""The page of results as text: what is on it, what is marked, and that nothing in a file can become markup."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.records.read import read_result
from bench.records.write import Record, dumps
from bench.report.answer import answers
from bench.report.figures import bar_charts
from bench.report.markup import tag
from bench.report.page import build_page
from model.errors import InputError
from tests.support.page_reader import Reader
from tests.support.result_samples import H100, environment, sample

HOSTILE = "<script>alert('x')</script> & \"</style>"


def page_of(*paths: Path) -> str:
    return build_page(paths, [read_result(path) for path in paths])


@pytest.fixture
def one(tmp_path) -> Path:
    return sample(tmp_path / "nvidia-h200.json")


def test_the_page_is_well_formed_loads_nothing_and_does_not_vary(one):
    page = page_of(one)
    reader = Reader(page)
    assert page.startswith('<!doctype html>\n<html lang="en">')
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"@import|url\(|\bfetch\b|XMLHttpRequest|srcset|<(img|iframe|object|embed)\b", page)
    (policy,) = [found["content"] for name, found in reader.elements if found.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert all(found.get("href", "#").startswith(("#", "data:,")) for _, found in reader.elements)
    assert not any(key.startswith("on") or key == "src" for _, found in reader.elements for key in found)
    assert page == page_of(one)


def test_files_machines_and_ceilings_are_named(one):
    text = Reader(page_of(one)).all_text()
    for expected in (
        "NVIDIA H200", "aaaaaaaaa", "2026-11-26 10:00:00", "580.65", "13.0", "2.13.0+cu130", "3.6.0", "700 W",
        "1980 MHz", "1980 \u2192 1755", "118 \u2192 655", "34 \u2192 61", "4,050", "760.0 (bfloat16)",
        "throttled: power cap", "nvidia-h200.json",
    ):  # fmt: skip
        assert expected in text, expected
    assert str(one.parent) not in text


def test_everything_that_is_not_measured_is_marked(one):
    reader = Reader(page_of(one))
    for basis, rows in (("extrapolated", 4), ("predicted", 1), ("reported", 2), ("compiled", 9)):
        verdicts = 1 if basis == "extrapolated" else 0
        tiles = 3 if basis == "extrapolated" else 0  # seconds, and two ratios
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


def test_a_section_still_running_is_incomplete(one):
    data = json.loads(one.read_text())
    data["sections"]["attention"] |= {"status": "running", "reason": None, "seconds": None}
    one.write_text(dumps(data))
    assert "incomplete: the run did not say why" in Reader(page_of(one)).all_text()


def test_figures_to_be_reached_are_met_or_missed(one):
    assert re.findall(r'badge (\w+)">(met|MISSED)<', page_of(one)) == [
        ("bad", "MISSED"),
        ("bad", "MISSED"),
        ("good", "met"),
    ]


def test_numbers_carry_the_value_they_sort_by(one):
    page = page_of(one)
    for number in ("0.0475", "216268800", "22400.0", "0.0021"):
        assert f'data-value="{number}"' in page, number
    # A row without a value has none, and so stays at the end.
    assert "<td></td>" in page


def test_without_figures_or_sections_their_blocks_are_missing(tmp_path):
    path = sample(tmp_path / "a.json")
    data = json.loads(path.read_text())
    for section in data["sections"].values():
        section["verdicts"] = []
    path.write_text(dumps(data))
    page = page_of(path)
    assert 'id="figures"' not in page
    data["sections"] = {}
    path.write_text(dumps(data))
    assert "NVIDIA H200" in page_of(path)


def order_of(page: str) -> list[str]:
    """Returns what the page shows, from top to bottom, as the links to it have it."""
    reader = Reader(page)
    shown = [found["id"] for name, found in reader.elements if name == "section" and "id" in found]
    assert shown == [found["href"][1:] for name, found in reader.elements if name == "a"]
    return shown


def kept(path: Path, *names: str) -> Path:
    """Leaves only the sections of these names in a file, in this order."""
    data = json.loads(path.read_text())
    data["sections"] = {name: data["sections"].get(name, data["sections"]["attention"]) for name in names}
    path.write_text(dumps(data))
    return path


def test_the_page_opens_with_the_clip_and_ends_with_the_files(tmp_path):
    """The answer, then memory, then kernels, then what was missed and the rest, whatever the order in the file."""
    names = ("sanitize", "cost", "warmth", "dit", "compile", "vae", "attention", "operators", "memory", "csg")
    path = kept(sample(tmp_path / "a.json"), *names)
    assert order_of(page_of(path)) == [
        "clip", "section-csg", "section-memory", "section-operators", "section-attention", "section-vae",
        "section-dit", "figures", "section-compile", "section-sanitize", "section-cost", "section-warmth", "files",
    ]  # fmt: skip
    assert order_of(page_of(path, path))[8] == "comparison"


def test_the_answer_is_the_seconds_the_ratios_and_the_card(one):
    """The first things to be read are the clip's seconds, what it is faster than, and the card with its versions."""
    page = page_of(one)
    section = page[page.index('id="clip"') :]
    places = [
        section.index(text)
        for text in (
            "52.00 s", "one clip: 1.3b, 2K, two stages, CSG", "352x", "faster than 14b, end-to-end, 50 steps, guidance",
            "80.8x", "faster than 1.3b, end-to-end, 50 steps, guidance", "<b>NVIDIA H200</b>, driver 580.65, CUDA 13.0,"
            " cuDNN 9.12.0, torch 2.13.0+cu130, Triton 3.6.0, Python 3.12.4, commit aaaaaaaaa, 2026-11-26",
            "Extrapolated from 3 of 30 layers, 1 of 4 steps.",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert "The run is incomplete" not in section[: places[-1]]


def test_a_clip_of_a_run_that_was_cut_short_says_so(one):
    """The answer of an incomplete run is not read as that of a complete one."""
    data = json.loads(one.read_text())
    data["sections"]["csg"] |= {"status": "interrupted", "reason": "interrupted after 105 s"}
    one.write_text(dumps(data))
    assert "The run is incomplete: interrupted after 105 s." in Reader(page_of(one)).all_text()


def test_every_card_has_its_answer_from_its_newest_file(tmp_path):
    """GPUs come before CPUs, and an older run of a card is not its answer."""
    documents = [
        read_result(sample(tmp_path / f"{i}.json", device, faster=faster, date=f"2026-11-2{i}T10:00:00+00:00", **more))
        for i, (device, faster, more) in enumerate(
            [
                ("AMD EPYC", 0.1, {"device_type": "cpu"}),
                ("NVIDIA H200", 1.0, {}),
                (H100, 0.8, {}),
                ("NVIDIA H200", 2.0, {}),
            ]
        )
    ]
    assert [(answer.at, answer.row["total_seconds"]) for answer in answers(documents)] == [(3, 26), (2, 65), (0, 520)]


def test_a_clip_that_was_measured_whole_is_an_answer_too(tmp_path):
    """A small clip runs whole: its answer is its seconds, end-to-end over them, and Stage II alone."""
    record = Record(tmp_path / "a.json", environment("AMD EPYC", device_type="cpu", gpu={}))
    settings = {"model": "tiny preset, random weights", "width": 448, "height": 256}
    with record.section("csg", "End-to-end against CSG", settings) as section:
        table = section.table(
            "whole", "whole passes", identity=("frames", "mode"), metrics=("total_seconds", "speedup")
        )
        for frames, mode, seconds, speedup in (
            (5, "CSG, bidirectional", None, 1.0), (81, "end-to-end", 10.0, 1.0), (81, "CSG, bidirectional", 8.0, 2.5)
        ):  # fmt: skip
            table.add({"frames": frames, "mode": mode, "total_seconds": seconds, "speedup": speedup})
    page = page_of(tmp_path / "a.json")
    text = Reader(page).all_text()
    assert order_of(page) == ["clip", "section-csg", "files"]
    for expected in (
        "8.000 s", "one clip of 81 frames: tiny preset, random weights, 448x256, CSG, bidirectional", "1.25x",
        "faster than end-to-end: 10.00 s", "2.50x", "faster than end-to-end in Stage II alone",
    ):  # fmt: skip
        assert expected in text, expected


def test_without_a_clip_what_there_is_comes_first(tmp_path):
    """Nothing empty is shown: the title is followed by the card, and the card by the first section that there is."""
    path = kept(sample(tmp_path / "a.json"), "compile", "attention")
    page = page_of(path)
    assert order_of(page) == ["section-attention", "figures", "section-compile", "files"]
    assert "One clip" not in page
    assert page.index("<h1>") < page.index("<b>NVIDIA H200</b>, driver") < page.index("<nav") < page.index("<main")
    assert order_of(page_of(kept(path))) == ["files"]


def test_several_files_stand_side_by_side_and_are_compared(tmp_path):
    first, other = sample(tmp_path / "a.json"), sample(tmp_path / "b.json", H100, faster=0.8)
    page = page_of(first, other)
    text = Reader(page).all_text()
    assert "B against A: 0 figures better, " in text
    assert "1.250" in text
    assert "WORSE" in text
    assert "Roofline, A" in text
    assert "Roofline, B" in text


def test_files_with_nothing_in_common_are_shown_all_the_same(tmp_path):
    first, other = sample(tmp_path / "a.json"), sample(tmp_path / "b.json")
    for path, kept in ((first, "attention"), (other, "compile")):
        data = json.loads(path.read_text())
        data["sections"] = {kept: data["sections"][kept]}
        path.write_text(dumps(data))
    text = Reader(page_of(first, other)).all_text()
    assert "nothing to compare: no row is in two of them" in text
    assert "attention/attention: the whole table only in A" in text
    assert "every kernel, compiled" in text


def hostile(value: Any, key: str = "") -> Any:
    """Returns the document with every free text replaced."""
    fixed = (
        "status",
        "basis",
        "schema",
        "date",
        "device_type",
        "unit",
        "better",
        "identity",
        "columns",
        "matmul_dtype",
    )
    if key in fixed or key == "name":
        return value
    if isinstance(value, dict):
        return {k: hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v, key) for v in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_text_of_a_file_never_becomes_markup(one):
    data = hostile(deepcopy(json.loads(one.read_text())))
    data["sections"] = {f"{name}{HOSTILE}": section for name, section in data["sections"].items()}
    for section in data["sections"].values():
        for line in section["timelines"]:
            line |= {"name": HOSTILE, "marks": [[1.0, HOSTILE]]}
        for table in section["tables"]:
            table["name"] += HOSTILE
            for metric in table["metrics"].values():
                metric["label"] = HOSTILE
    one.write_text(dumps(data))
    page = page_of(one)
    assert Reader(page).count("script") == 1
    assert "<script>alert" not in page
    assert page.count("</style>") == 1
    assert "\x1b" not in page


def test_markup_escapes_all_but_itself():
    assert tag("g", "a < b", None, tag("b", 1), class_='q"', id=None, data_value=3) == (
        '<g class="q&#34;" data-value="3">a &lt; b<b>1</b></g>'
    )


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
    assert main(["report", str(one), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text() == page_of(one)
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    # Without files: what is in the repository; without --out: a page in out/.
    shipped = tmp_path / "results"
    sample(shipped / "nvidia-h200" / "x.json")
    monkeypatch.setattr("bench.records.read.SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 0
    assert "x.json" in (tmp_path / "out" / "report.html").read_text()


def test_quick_takes_the_newest_file_of_each_card_and_json_names_them(tmp_path, capsys):
    """The newest file is that with the latest date in it, whatever its name."""
    files = {name: sample(tmp_path / f"{name}.json") for name in ("new", "old", "other")}
    for name, change in (("old", {"date": "2025-01-01T00:00:00+00:00"}), ("other", {"device": "NVIDIA L40S"})):
        found = json.loads(files[name].read_text())
        found["environment"] |= change
        files[name].write_text(dumps(found))
    out = tmp_path / "page.html"
    arguments = ["report", *map(str, files.values()), "--out", str(out), "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["page"], [entry["file"] for entry in found["files"]]) == (str(out), list(map(str, files.values())))
    assert set(found["files"][0]["sections"]) == set(read_result(files["new"])["sections"])
    assert main([*arguments, "--quick"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["file"] for entry in found["files"]] == [str(files["new"]), str(files["other"])]
    assert "old.json" not in out.read_text()


def test_the_command_says_what_is_wrong_and_writes_nothing(one, tmp_path, capsys, monkeypatch):
    cut, out = tmp_path / "cut.json", tmp_path / "page.html"
    cut.write_text(one.read_text()[:3000])
    assert main(["report", str(one), str(cut), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {cut}: is cut off (line ")
    assert not out.exists()
    monkeypatch.setattr("bench.records.read.SHIPPED", tmp_path / "nothing")
    assert main(["report", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: files: there are no results in ")
    (tmp_path / "file").write_text("")
    assert main(["report", str(one), "--out", str(tmp_path / "file" / "page.html")]) == 2
    assert capsys.readouterr().err.startswith("error: out: cannot make the directory")
    assert main(["report", str(one), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: out: cannot write {tmp_path}: Is a directory")
    with pytest.raises(InputError, match="files: expected at least one"):
        build_page([], [])
