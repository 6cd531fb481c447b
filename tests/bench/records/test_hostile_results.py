"""Result files that someone has damaged or made up: refused with the place of the fault, or shown right by all."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.records import package_tables
from bench.records.read import MOST_BYTES, read_result, shipped_results
from bench.report.fill import filled
from model.errors import InputError
from tests.support.result_samples import sample

ROW = ("sections", "attention", "tables", 0, "rows", 0)
AT = "at " + "/".join(map(str, ROW))
ENTRIES = ("sections", "attention", "package_entries")
ENTRY = {"capability": 90, "card": "c", "dtype": "bfloat16", "head_dim": 128, "tokens": 0, "seconds": {"a": 1.0}}
AGAIN = {"shape": "CSG window 2560x1408, 1.3B", "provider": "swifti2v", "status": "ok", "basis": "measured"}
TABLE = {"name": "t", "title": "t", "identity": ["shape"], "metrics": {}, "rows": []}
#: A field, what is written there as JSON, and how the message begins.
FAULTS = [
    ((*ROW, "seconds"), "NaN", f"{AT}/seconds: expected 0 or a number from 1e-100 to 1e+30 in magnitude, got nan"),
    ((*ROW, "seconds"), 400 * "9", f"{AT}/seconds: expected 0 or a number from 1e-100 to 1e+30 in magnitude, got 99"),
    ((*ROW, "seconds"), 5000 * "9", "is no result: Exceeds the limit (4300 digits)"),
    ((*ROW, "seconds"), '"fast"', f"{AT}/seconds: expected a number of at least 0 or null, got 'fast'"),
    ((*ROW, "seconds_low"), "-1", f"{AT}/seconds_low: expected a number of at least 0 or null, got -1"),
    ((*ROW, "status"), '"superb"', f"{AT}/status: 'superb' is not one of ['ok', "),
    ((*ROW, "status"), '"failed"', f"{AT}: 'reason' is a required property"),
    ((*ROW, "shape"), "null", f"{AT}/shape: expected text or a number, as identity names it, got None"),
    ((*ROW, "more"), 30 * "[" + 30 * "]", "at sections/attention/tables/0: expected at most 20 levels"),
    ((*ROW, "more"), 100_000 * "[", "is no result: maximum recursion depth exceeded"),
    (("sections", "attention", "settings", "frames"), "[5]", "at sections/attention/settings/frames: [5] is not of"),
    (("sections", "csg", "timelines", 0, "marks", 0), "[1]", "at sections/csg/timelines/0/marks/0: [1] is too short"),
    (("environment", "date"), '"yesterday"', "at environment/date: 'yesterday' does not match"),
    (("environment", "packages"), "{}", "at environment/packages: 'torch' is a required property"),
    # A table is found by its name and a row by its identity, so neither may be there twice.
    (("sections", "attention", "tables"), json.dumps([TABLE] * 2), "at sections/attention/tables/1/name: expected"),
    ((*ROW[:-1], 1), json.dumps(AGAIN), f"{AT[:-1]}1: expected each row once, got "),
    # No result makes ``bench tune --from`` write another file than a table of the package, or an entry of no use.
    (ENTRIES, '{"../../bench/results.schema": []}', f"at {'/'.join(ENTRIES)}: Additional properties are not allowed"),
    (ENTRIES, json.dumps({"attention": [ENTRY]}), f"at {'/'.join(ENTRIES)}/attention/0/tokens: 0 is less than"),
    (ENTRIES, json.dumps({"tuned": [ENTRY | {"tokens": 1}]}), f"at {'/'.join(ENTRIES)}/tuned/0: 'kernel' is a "),
    (("version",), "2", "expected swifti2v-results of version 1, as python -m bench writes it; run that benchmark"),
]  # fmt: skip
POOL = (
    0, -1, 1.5, 1e300, 5e-324, 10**25, 10**400, True, False, None, "", "x", [], {}, [1], ["a", None], {"a": 1},
    float("nan"), float("inf"), "\x1b[2J", "<script>alert(1)</script>", "a|b\nc", "$\\frac$", "\ud800", "\u0661",
    3000 * "a", "\u202e", 1e30, 1e-100, "2026-11-26", "9" * 5000,
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a run, as data."""
    return json.loads(sample(tmp_path_factory.mktemp("results") / "good.json").read_text())


def put(data: dict[str, Any], where: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """Returns the data with another value in one place."""
    data = copy.deepcopy(data)
    place = data
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    return data


def refusal(path: Path) -> str:
    """Returns why a file is no result, in one line that begins with its name."""
    with pytest.raises(InputError) as caught:
        read_result(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize(("where", "value", "message"), FAULTS, ids=[f"{w[-1]} {v[:12]}" for w, v, _ in FAULTS])
def test_a_fault_is_refused_with_its_place(
    where: tuple[str | int, ...], value: str, message: str, good: dict[str, Any], tmp_path: Path
) -> None:
    """Text for a number, a number for text, no date, and JSON that is not strict are named with their place."""
    text = json.dumps(put(good, where, "HERE"))
    (tmp_path / "r.json").write_text(text.replace('"HERE"', value, 1))
    assert refusal(tmp_path / "r.json").startswith(message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b" \n", "is empty"), (b"frames,seconds\n", "is not JSON (line 1, column 1: Expecting value)"),
        (b'{"a": 1', "is cut off (line 1, column 8: "), (b"\xef\xbb\xbf{}", "is not JSON (line 1, column 1: "),
        ("{}".encode("utf-16"), "is not a text file"), (b"[1]", "expected swifti2v-results of version 1"),
        (b'{"schema": "swifti2v-csg-1"}', "expected swifti2v-results of version 1"),
        (b'{"schema": "swifti2v-results", "version": 1}', "at the top: 'environment' is a required property"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(data)
    assert refusal(tmp_path / "r.json").startswith(message)


def test_what_is_no_file_of_text_is_refused_at_once(tmp_path: Path) -> None:
    """Neither a pipe, which would never end, nor a device, nor what is too large is read."""
    path = tmp_path / "r.json"
    assert refusal(path) == "cannot be read: No such file or directory"
    assert refusal(tmp_path) == "cannot be read: Is a directory"
    os.mkfifo(path)
    assert refusal(path) == refusal(Path("/dev/zero")) == "cannot be read: expected a file, not a pipe or a device"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    assert refusal(path) == "expected at most 50.0 MB, got 50.0 MB"


def test_a_file_that_is_cut_off_anywhere_is_refused(good: dict[str, Any], tmp_path: Path) -> None:
    text, path = json.dumps(good), tmp_path / "cut.json"
    for position in (1, 2, 10, *range(20, len(text), len(text) // 20), len(text) - 1):
        path.write_text(text[:position])
        assert refusal(path).startswith(("is cut off (line ", "is not JSON (line ")), position


def test_text_of_a_result_reaches_no_terminal_and_no_page_as_it_is(
    good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escapes of a terminal, HTML, and what would end a cell of a table are shown as text: in comparisons, Markdown
    files and the page.
    """
    evil = "\x1b[2J\ud800<script>x</script>|\\|&lt;\nB"
    data = put(good, ("environment", "device"), evil)
    data["sections"] = {"attention": {**data["sections"]["attention"], "notes": [evil]}}
    for row in data["sections"]["attention"]["tables"][0]["rows"]:
        row["provider"] = f"{evil}{row['provider']}"
    path = tmp_path / "card" / "a.json"
    path.parent.mkdir()
    path.write_text(json.dumps(data))
    assert main(["compare", str(path), str(path)]) == 0
    shown = capsys.readouterr().out
    page = "<!-- results: card attention/attention -->\n<!-- end of results -->\n"
    markdown = filled(page, {path: read_result(path)}, tmp_path / "page.md")
    for text in (shown, markdown):
        assert "\x1b" not in text
        assert "<script" not in text
        assert "&lt;script>x&lt;/script>" in text
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| CSG w") and "swifti2v" in line]
        (cell,) = {row[1].strip() for row in rows}
        assert cell == "\\\\x1b[2J\\\\ud800&lt;script>x&lt;/script>\\|\\\\\\|&amp;lt; Bswifti2v"
    assert main(["report", str(path), "--out", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    assert "\x1b" not in html
    assert html.count("<script") == 1


def places(data: Any, where: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yields the place of every value in a document."""
    for name, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*where, name)
        yield from places(value, (*where, name))


def mutated(data: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """Returns the document with one value replaced, taken out, doubled or added, in a place of any kind."""
    data, kinds = copy.deepcopy(data), defaultdict(list)
    for where in places(data):
        kinds[tuple("#" if isinstance(name, int) else name for name in where)].append(where)
    *path, last = dice.choice(kinds[dice.choice(list(kinds))])
    place: Any = data
    for name in path:
        place = place[name]
    change = dice.random()
    if isinstance(place, list):
        place.insert(last, copy.deepcopy(place[last]))
        place[last] = place[last] if change < 0.2 else dice.choice(POOL)
    elif change < 0.1:
        del place[last]
    else:
        added = dice.choice(("", "<b>", "status", "speedup", "seconds_low", "a|b"))
        place[last if change < 0.8 else added] = dice.choice(POOL)
    return data


@pytest.mark.slow
def test_every_reader_shows_what_passes(
    good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of 120 mutations is refused in one line, or compared, made a page and taken over without a fault."""
    for name in ("attention", "conv3d", "tuned"):
        (tmp_path / f"{name}.json").write_text('{"entries": []}')
    monkeypatch.setattr(package_tables, "CONFIGS", tmp_path)
    originals = [good, *(read_result(path) for path in shipped_results() if path.stat().st_size < 80_000)]
    first, second, out, passed = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "out", 0
    for seed in range(120):
        dice = random.Random(seed)
        original = dice.choice(originals)
        first.write_text(json.dumps(original))
        second.write_text(json.dumps(mutated(original, dice)))
        try:
            read_result(second)
        except InputError:
            refusal(second)
            continue
        passed += 1
        for argv in (
            ["compare", first, second], ["compare", second, first, "--json"],
            ["report", second, "--out", out / "page.html"], ["report", first, second, "--out", out / "page.html"],
            ["tune", "--from", second, "--device", "cpu", "--out", out],
        ):  # fmt: skip
            code = main([str(argument) for argument in argv])
            printed = capsys.readouterr()
            assert code in (0, 2), (seed, argv)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", printed.out + printed.err), (seed, argv)
        page = (out / "page.html").read_text()
        assert "\x1b" not in page
        assert page.count("<script") == 1
    assert passed > 10
