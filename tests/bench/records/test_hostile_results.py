"""Result files that someone has damaged or made up: refused with the place of the fault, or shown right by all."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
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
SECOND = AT.replace("rows/0", "rows/1")
#: A field, what is written there as JSON, and how the message begins.
FAULTS = [
    ((*ROW, "seconds"), "NaN", f"{AT}/seconds: expected 0 or a number from 1e-100 to 1e+30 in magnitude, got nan"),
    ((*ROW, "seconds"), "-Infinity", f"{AT}/seconds: expected 0 or a number from 1e-100 to 1e+30 in magnitude, got"),
    ((*ROW, "seconds"), "1e999", f"{AT}/seconds: expected 0 or a number from 1e-100 to 1e+30 in magnitude, got inf"),
    ((*ROW, "seconds"), 5000 * "9", f"{AT}/seconds: expected 0 or a number from 1e-100 to 1e+30 in magnitude, got inf"),
    ((*ROW, "seconds"), '"fast"', f"{AT}/seconds: expected a number of at least 0 or null, got 'fast'"),
    ((*ROW, "seconds"), "true", f"{AT}/seconds: expected a number of at least 0 or null, got True"),
    ((*ROW, "seconds_low"), "-1", f"{AT}/seconds_low: expected a number of at least 0 or null, got -1"),
    ((*ROW, "runs"), '"many"', f"{AT}/runs: 'many' is not of type 'integer', 'null'"),
    ((*ROW, "provider"), "null", f"{AT}/provider: None is not of type 'string'"),
    ((*ROW, "shape"), "5", f"{SECOND}/shape: expected all text or all numbers in 'shape', got "),
    ((*ROW, "note"), '"\\ud800"', f"{AT}/note: expected text, got half of a character"),
    ((*ROW, "more"), 30 * "[" + 30 * "]", "at sections/attention/tables/0: expected at most 20 levels"),
    ((*ROW, "more"), 100_000 * "[", "expected at most 20 levels of objects and lists"),
    ((*ROW, "more"), '{"a": 1, "a": 2}', "expected every field once, got 'a' twice in one object"),
    (("sections", "attention", "ceilings", "matmul_tflops"), "0", "at sections/attention/ceilings/matmul_tflops: 0 is"),
    (("sections", "attention", "settings", "frames"), "[5]", "at sections/attention/settings/frames: [5] is not of"),
    (("sections", "attention", "notes"), '"one"', "at sections/attention/notes: 'one' is not of type 'array'"),
    (("sections", "csg", "timelines", 0, "marks", 0), "[1]", "at sections/csg/timelines/0/marks/0: [1] is too short"),
    (("environment", "device"), "7", "at environment/device: 7 is not of type 'string'"),
    (("environment", "date"), '"yesterday"', "at environment/date: 'yesterday' does not match"),
    (("environment", "packages"), "{}", "at environment/packages: 'torch' is a required property"),
    (("environment", "gpu", "cudnn"), '"9.1"', "at environment/gpu/cudnn: '9.1' is not of type 'integer', 'null'"),
    (("version",), "true", "at version: 1 was expected"),
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


def test_rows_and_tables_that_are_there_twice_are_refused(good: dict[str, Any], tmp_path: Path) -> None:
    """A table is found by its name and a row by its identity, so neither may be there twice, or lack its fields."""
    tables = good["sections"]["attention"]["tables"]
    rows, path = tables[0]["rows"], tmp_path / "r.json"
    ragged = [{name: value for name, value in rows[0].items() if name != "shape"}, *rows[1:]]
    for where, value, message in (
        (("sections", "attention", "tables"), [*tables, tables[0]], "tables/1/name: expected a name for each table"),
        (ROW[:-1], [*rows, rows[0]], f"tables/0/rows/{len(rows)}: expected each row once, got "),
        (ROW[:-1], ragged, "tables/0/rows/0/shape: expected text or a number, as identity names it, got None"),
    ):
        path.write_text(json.dumps(put(good, where, value)))
        assert refusal(path).startswith(f"at sections/attention/{message}")


def test_what_is_no_file_of_text_is_refused_at_once(tmp_path: Path) -> None:
    """Neither a pipe, which would never end, nor a device, zeros without end or other encodings are read."""
    path = tmp_path / "r.json"
    os.mkfifo(path)
    assert refusal(path) == refusal(Path("/dev/zero")) == "cannot be read: expected a file, not a pipe or a device"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    assert refusal(path) == "expected at most 50.0 MB, got 50.0 MB"
    for data, message in (
        (1000 * b"\0", "is not JSON (line 1, column 1: "), (b"\xef\xbb\xbf{}", "is not JSON (line 1, column 1: "),
        ("{}".encode("utf-16"), "is not a text file"),
    ):  # fmt: skip
        path.write_bytes(data)
        assert refusal(path).startswith(message)


def test_entries_for_the_package_are_of_its_tables_and_of_their_form(good: dict[str, Any], tmp_path: Path) -> None:
    """No result makes ``bench tune --from`` write another file than a table of the package, or an entry of no use."""
    entry = {"capability": 90, "card": "c", "dtype": "bfloat16", "head_dim": 128, "tokens": 1, "seconds": {"a": 1.0}}
    path, where = tmp_path / "r.json", ("sections", "attention", "package_entries")
    for entries, message in (
        ({"../../bench/results.schema": [entry]}, ": Additional properties are not allowed"),
        ({"attention": [{**entry, "tokens": 0}]}, "/attention/0/tokens: 0 is less than the minimum of 1"),
        ({"tuned": [entry]}, "/tuned/0: 'kernel' is a required property"),
    ):
        path.write_text(json.dumps(put(good, where, entries)))
        assert refusal(path).startswith(f"at {'/'.join(where)}{message}")
    path.write_text(json.dumps(put(good, where, {"attention": [entry]})))
    assert read_result(path)["sections"]["attention"]["package_entries"] == {"attention": [entry]}


def test_text_of_a_result_reaches_no_terminal_and_no_page_as_it_is(
    good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escapes of a terminal, HTML, and what would end a cell of a table are shown as text: in comparisons, Markdown
    files and the page.
    """
    evil = "\x1b[2J<script>x</script>|\\|&lt;\nB"
    data = put(good, ("environment", "device"), evil)
    data["sections"] = {"attention": {**data["sections"]["attention"], "notes": [evil]}}
    for row in data["sections"]["attention"]["tables"][0]["rows"]:
        row["provider"] = f"{evil}{row['provider']}"
    folder = tmp_path / "card"
    folder.mkdir()
    for name in ("a.json", "b.json"):
        (folder / name).write_text(json.dumps(data))
    assert main(["compare", str(folder / "a.json"), str(folder / "b.json")]) == 0
    shown = capsys.readouterr().out
    page = "<!-- results: card attention/attention -->\n<!-- end of results -->\n"
    markdown = filled(page, {folder / "a.json": read_result(folder / "a.json")}, tmp_path / "page.md")
    for text in (shown, markdown):
        assert "\x1b" not in text
        assert "<script" not in text
        assert "&lt;script>x&lt;/script>" in text
        assert "\\\\x1b[2J" in text
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| CSG w") and "swifti2v" in line]
        (cell,) = {row[1].strip() for row in rows}
        assert cell == "\\\\x1b[2J&lt;script>x&lt;/script>\\|\\\\\\|&amp;lt; Bswifti2v"
    assert main(["report", str(folder / "a.json"), "--out", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    assert "\x1b" not in html
    assert html.count("<script") == 1


def places(data: Any, where: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yields the place of every value in a document."""
    for name, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*where, name)
        yield from places(value, (*where, name))


def mutated(data: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """Returns the document with one to three values replaced, taken out, doubled or added, in places of all kinds."""
    data, kinds = copy.deepcopy(data), defaultdict(list)
    for where in places(data):
        kinds[tuple("#" if isinstance(name, int) else name for name in where)].append(where)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        *path, last = dice.choice(kinds[dice.choice(list(kinds))])
        place: Any = data
        for name in path:
            known = isinstance(place, dict) or (isinstance(place, list) and isinstance(name, int) and name < len(place))
            place = place[name] if known and (isinstance(place, list) or name in place) else None
        change = dice.random()
        if isinstance(place, list) and isinstance(last, int) and last < len(place):
            place[last:last] = [copy.deepcopy(place[last])] if change < 0.2 else []
            place[last] = place[last] if change < 0.2 else dice.choice(POOL)
        elif isinstance(place, dict) and last in place:
            if change < 0.1:
                del place[last]
            else:
                added = dice.choice(("", "<b>", "status", "speedup", "seconds_low", "a|b"))
                place[last if change < 0.8 else added] = dice.choice(POOL)
    return data


@pytest.mark.slow
def test_every_reader_shows_what_passes(
    good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str]]
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
            ["compare", first, second], ["compare", second, first, "--quick"], ["compare", second, first, "--json"],
            ["report", second, "--out", out / "page.html"], ["report", first, second, "--out", out / "page.html"],
            ["tune", "--from", second, "--device", "cpu", "--out", out],
        ):  # fmt: skip
            code, text = call(*argv)
            assert code in (0, 2), (seed, argv)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), (seed, argv)
        page = (out / "page.html").read_text()
        assert "\x1b" not in page
        assert page.count("<script") == 1
    assert passed > 10


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that runs a benchmark's command line and returns its exit code and all that it printed."""

    def run(*argv: Any) -> tuple[int, str]:
        code = main([str(argument) for argument in argv])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run
