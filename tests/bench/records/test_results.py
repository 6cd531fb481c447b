"""Result files: what writes them, what reads them, and how their numbers are shown."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.environment import capture
from bench.harness.session import RESULT
from bench.records.markdown import format_section, format_table, markdown_table, note_of
from bench.records.metrics import METRICS, byte_scale, column_scale, format_value, significant, time_scale
from bench.records.outcome import BASES, STATUSES, Unavailable, failure
from bench.records.read import DESCRIPTION, folder_name, label_of, read_result, shipped_results
from bench.records.write import Record, Table, dumps
from model.errors import InputError
from tests.support.bench_session import session
from tests.support.result_samples import environment, sample

UNITS = ("s", "1/s", "bytes", "B/s", "FLOP", "TFLOP/s", "J", "error", "seam", "fraction", "ratio", "count")
IDENTITY, FIGURES = ("shape", "provider"), ("seconds", "peak_bytes")


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / RESULT, environment())


@pytest.fixture
def table(record) -> Table:
    with record.section("attention", "Attention", {}) as section:
        return section.table("rows", "rows", identity=IDENTITY, metrics=FIGURES)


@pytest.fixture
def good(tmp_path) -> Path:
    return sample(tmp_path / "good.json")


# What writes


def test_every_kind_of_row_section_and_timeline_is_valid(good):
    sections = read_result(good)["sections"]
    assert sections["dit"]["status"] == "failed"
    assert sections["csg"]["timelines"]
    rows = [row for section in sections.values() for table in section["tables"] for row in table["rows"]]
    assert {row["status"] for row in rows} == {"ok", "wrong", "not available", "not reached", "out of memory"}
    assert {row["basis"] for row in rows} == set(BASES) - {"counted"}


def test_an_empty_record_and_a_real_environment_are_valid(tmp_path):
    Record(tmp_path / RESULT, capture(torch.device("cpu")))
    assert read_result(tmp_path / RESULT)["sections"] == {}


def test_the_description_knows_every_status_and_basis():
    row = json.loads(DESCRIPTION.read_text())["$defs"]["row"]["properties"]
    assert row["status"]["enum"] == list(STATUSES)
    assert row["basis"]["enum"] == list(BASES)


def test_the_documentation_names_everything_and_its_example_runs(tmp_path):
    text = (Path(__file__).parent.parent.parent.parent / "docs" / "results" / "format.md").read_text()
    assert all(f"`{name}`" in text for name in (*STATUSES, *BASES, *UNITS))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    with session(tmp_path, "warmth", quick=True) as found:
        names["BENCHMARK"].measure(found.args, found)
    (table,) = read_result(tmp_path / RESULT)["sections"]["warmth"]["tables"]
    assert [row["provider"] for row in table["rows"]] == ["copy_", "add"]


def test_rows_without_identity_or_twice_the_same_are_refused(table):
    table.add({"shape": "2K", "provider": "ours", "seconds": 1.0})
    with pytest.raises(ValueError, match="row: lacks provider of table rows"):
        table.add({"shape": "2K"})
    with pytest.raises(ValueError, match=r"row: \['2K', 'ours'\] is in table rows already"):
        table.add({"shape": "2K", "provider": "ours", "seconds": 2.0})
    for field in ("status", "basis"):
        with pytest.raises(ValueError, match="row: unknown status"):
            table.add({"shape": "1K", "provider": "ours", field: "superb"})
    assert len(table.rows) == 1


def test_a_metric_must_be_known(record):
    with record.section("a", "a", {}) as section, pytest.raises(KeyError, match="furlongs"):
        section.table("rows", "rows", identity=IDENTITY, metrics=("furlongs",))


def test_every_row_is_on_disk_at_once(record):
    with record.section("attention", "Attention", {}) as section:
        table = section.table("rows", "rows", identity=IDENTITY, metrics=FIGURES)
        for count, provider in enumerate(("ours", "theirs"), 1):
            table.add({"shape": "2K", "provider": provider, "seconds": 1.0})
            found = read_result(record.path)["sections"]["attention"]
            assert (found["status"], len(found["tables"][0]["rows"])) == ("running", count)
    assert [path.name for path in record.path.parent.iterdir()] == [RESULT]


def test_numbers_that_json_has_not_become_null(record):
    with record.section("a", "a", {"shift": math.inf}) as section:
        table = section.table("rows", "rows", identity=("shape",), metrics=("seconds", "error"))
        table.add({"shape": "2K", "seconds": math.nan, "error": -math.inf, "list": [1.0, math.nan]})
    assert "NaN" not in record.path.read_text()
    assert "Infinity" not in record.path.read_text()
    section = read_result(record.path)["sections"]["a"]
    row = section["tables"][0]["rows"][0]
    assert (row["seconds"], row["error"], row["list"]) == (None, None, [1.0, None])
    assert section["settings"] == {"shift": None}


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (RuntimeError("CUDA error"), "failed", "CUDA error"),
        (ValueError(), "failed", "ValueError"),
        (SystemExit(3), "failed", "3"),
    ],
)
def test_a_section_that_is_cut_short_says_so_and_keeps_its_rows(record, error, status, reason):
    def cut_short() -> None:
        with record.section("a", "a", {}) as section:
            table = section.table("rows", "rows", identity=("shape",), metrics=("seconds",))
            table.add({"shape": "2K", "seconds": 1.0})
            raise error

    with pytest.raises(type(error)):
        cut_short()
    found = read_result(record.path)["sections"]["a"]
    assert (found["status"], found["reason"]) == (status, reason)
    assert found["seconds"] >= 0
    assert len(found["tables"][0]["rows"]) == 1


def test_a_wide_spread_is_warned_of(table):
    wide = table.add({"shape": "2K", "provider": "a", "seconds": 1.0, "seconds_low": 0.9, "seconds_high": 1.05})
    assert wide["warning"] == "spread 15 %: not a basis for comparisons"
    narrow = table.add({"shape": "2K", "provider": "b", "seconds": 1.0, "seconds_low": 0.98, "seconds_high": 1.0})
    assert "warning" not in narrow


def test_failures_become_statuses():
    assert failure(Unavailable("needs a GPU")) == {"status": "not available", "reason": "needs a GPU"}
    assert failure(torch.OutOfMemoryError("CUDA out of memory\nTried"))["status"] == "out of memory"
    assert failure(RuntimeError("one\ntwo")) == {"status": "failed", "reason": "one"}
    assert failure(AssertionError()) == {"status": "failed", "reason": "AssertionError"}


# What reads


def message(path: Path) -> str:
    """Returns the error of reading a file, which must name the file."""
    with pytest.raises(InputError) as caught:
        read_result(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def test_a_file_that_is_missing_empty_or_no_text(tmp_path):
    assert message(tmp_path / "none.json") == "cannot be read: No such file or directory"
    assert message(tmp_path) == "cannot be read: Is a directory"
    (tmp_path / "empty.json").write_text(" \n")
    assert message(tmp_path / "empty.json") == "is empty"
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff\xfe")
    assert message(tmp_path / "picture.json") == "is not a text file"


def test_a_file_that_is_cut_off_anywhere(good, tmp_path):
    text, path = good.read_text().rstrip(), tmp_path / "cut.json"
    positions = [1, 2, 10, *range(20, len(text), len(text) // 60), *range(len(text) - 12, len(text))]
    for position in positions:
        path.write_text(text[:position])
        assert message(path).startswith(("is cut off (line ", "is not JSON (line ")), position
    path.write_text(text[:1500])
    assert message(path).startswith("is cut off (line ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("frames,seconds\n5,1.0\n", "is not JSON (line 1, column 1: Expecting value)"),
        ("[1, 2]", "is not a result of python -m bench (no field 'schema')"),
        ("{}", "is not a result of python -m bench (no field 'schema')"),
        ('{"schema": "swifti2v-csg-1"}', "schema 'swifti2v-csg-1' is of an earlier bench; this one reads"),
        ('{"schema": "swifti2v-results", "version": 2}', "version 2 of swifti2v-results, but this bench reads version 1"
         ": update this checkout"),
        ('{"schema": "swifti2v-results", "version": 0}', "version 0 of swifti2v-results, but this bench reads version 1"
         ": run that benchmark again"),
        ('{"schema": "swifti2v-results"}', "version None of swifti2v-results"),
        ('{"schema": "swifti2v-results", "version": 1}', "at the top: 'environment' is a required property"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else(text, expected, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert message(path).startswith(expected)


def test_a_fault_is_named_with_its_place(good):
    data = json.loads(good.read_text())
    rows = data["sections"]["attention"]["tables"][0]["rows"]
    rows[1]["status"] = "superb"
    good.write_text(dumps(data))
    assert message(good).startswith("at sections/attention/tables/0/rows/1/status: 'superb' is not one of ['ok', ")
    rows[1]["status"] = "failed"
    good.write_text(dumps(data))
    assert message(good) == "at sections/attention/tables/0/rows/1: 'reason' is a required property"


def test_shipped_results_are_valid_and_lie_where_they_belong():
    for path in shipped_results():
        device = read_result(path)["environment"]
        assert path.parent.name in (folder_name(device["device"]), device["device_type"])


def test_files_are_labelled_and_folders_named_by_card():
    assert folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert folder_name("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-r-xeon-r-cpu-2-20ghz"
    document = {"environment": environment()}
    assert label_of("x.json", document) == "NVIDIA H200, aaaaaaa, 2026-11-26"
    document["environment"]["git"] = {"commit": "b" * 40, "dirty": True}
    assert label_of("x.json", document) == "NVIDIA H200, bbbbbbb+changes, 2026-11-26"
    document["environment"]["git"] = None
    assert label_of("x.json", document) == "NVIDIA H200, no commit, 2026-11-26"


# How numbers are shown


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", ""), (1.23456, "s", "1.235"), (0.0, "s", "0"), (22_400.0, "s", "22,400"), ("text", "s", "text"),
        (3 * 2**30, "bytes", "3.22 GB"), (4.05e12, "B/s", "4,050"), (1.9e12, "FLOP", "1.9 TFLOP"),
        (7.9e18, "FLOP", "7,900.0 PFLOP"), (2.1e-3, "error", "2.1e-03"), (0.853, "fraction", "0.85"),
        (202.0, "ratio", "202"), (642.3, "TFLOP/s", "642"), (1.5, "TFLOP/s", "1.500"), (295_680, "count", "295,680"),
        (math.nan, "s", "NaN"), (True, "count", "True"),
    ],
)  # fmt: skip
def test_numbers_for_people(value, unit, text):
    assert format_value(value, unit) == text


def test_seconds_take_the_unit_in_which_most_of_them_read_best():
    assert time_scale([0.002, 0.003, 5.0]) == (1e-3, "ms")
    assert time_scale([None, 0.0]) == (1.0, "s")
    assert time_scale([3e-8]) == (1e-6, "us")
    assert (significant(0.00012345), significant(1e-9)) == ("1.234e-04", "1.000e-09")


def test_a_column_of_bytes_has_one_unit_where_its_values_are_near_each_other():
    """GB is 10^9 bytes; where a column would round its least value to nothing, each cell has a unit of its own."""
    assert column_scale([None, 21_071_649_382, 4e7], "bytes") == (1e9, "GB")
    assert column_scale([58.4e6, 1e6, 0], "bytes") == (1e6, "MB")
    assert column_scale([232_448, 1024], "bytes") == (1e3, "kB")
    assert column_scale([28e9, 9e5], "bytes") == (None, "")
    assert column_scale([None, "text"], "bytes") == (None, "")
    assert column_scale([0.002], "s") == (1e-3, "ms")
    assert column_scale([1.0], "ratio") == (None, "")
    assert byte_scale([]) == (1e9, "GB")
    values = [format_value(value, "bytes", 1e9) for value in (21_071_649_382, 1.234e12, 4e7, 1.2e6, 0)]
    assert values == ["21.07", "1,234.00", "0.04", "0.0012", "0.00"]
    assert [format_value(value, "bytes") for value in (1e9, 4e6, 232_448, 0)] == [
        "1.00 GB",
        "4.0 MB",
        "232.4 kB",
        "0.0 MB",
    ]


def test_the_unit_of_a_column_of_bytes_stands_in_its_head(table):
    """No table has one cell in MB and the next in GB."""
    for provider, count in (("ours", 21_071_649_382), ("eager", 512_000_000)):
        table.add({"shape": "2K", "provider": provider, "seconds": 1.0, "peak_bytes": count})
    head, _, *rows = format_table(table.data).splitlines()
    assert "peak memory, GB" in head
    assert ["21.07" in rows[0], "0.51" in rows[1], "GB" in "".join(rows)] == [True, True, False]


def test_every_metric_has_a_known_unit_and_direction():
    for name, metric in METRICS.items():
        assert metric.unit in UNITS, name
        assert metric.better in ("lower", "higher", ""), name


def test_tables_as_markdown_are_escaped_and_say_what_must_be_said(table):
    assert markdown_table(["a"], []) == ""
    table.add({"shape": "a | b", "provider": "ours", "seconds": 2e-3, "seconds_low": 1.9e-3, "seconds_high": 2e-3})
    table.add({"shape": "2K", "provider": "model", "seconds": 3e-3, "basis": "predicted", "basis_note": "by a model"})
    table.add({"shape": "2K", "provider": "eager", "status": "out of memory", "reason": "24 GiB"})
    lines = format_table(table.data).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["shape", "provider", "time, ms", "note"]
    assert "a \\| b" in lines[2]
    assert "2.000 (1.900 - 2.000)" in lines[2]
    assert "predicted by a model" in lines[3]
    assert note_of(table.rows[2]) == "out of memory: 24 GiB"
    assert "peak memory" not in lines[0]  # no row has it


def test_a_section_as_markdown_has_verdicts_and_notes(good):
    text = format_section(read_result(good)["sections"]["attention"])
    assert "**attention in bf16**" in text
    assert "MISSED" in text
    assert "With several sources the others concatenate first." in text
