"""Result files: what writes them, what reads them, and how their numbers are shown."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch

from bench.harness.environment import capture
from bench.harness.session import RESULT
from bench.records.markdown import format_table
from bench.records.metrics import METRICS, column_scale, format_value, significant
from bench.records.outcome import BASES, STATUSES
from bench.records.read import DESCRIPTION, ROOT, folder_name, label_of, read_result, shipped_results
from bench.records.write import Record, Section, Table
from model.errors import InputError
from tests.support.bench_session import session
from tests.support.result_samples import environment

UNITS = ("s", "1/s", "bytes", "B/s", "FLOP", "TFLOP/s", "J", "error", "seam", "fraction", "ratio", "count")


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / RESULT, environment())


def new_table(section: Section) -> Table:
    return section.table("rows", "rows", identity=("shape", "provider"), metrics=("seconds", "peak_bytes"))


@pytest.fixture
def table(record) -> Table:
    with record.section("attention", "Attention", {}) as section:
        return new_table(section)


# What writes


def test_an_empty_record_and_a_real_environment_are_valid(tmp_path):
    Record(tmp_path / RESULT, capture(torch.device("cpu"))).save()
    assert read_result(tmp_path / RESULT)["sections"] == {}


def test_the_description_knows_every_status_and_basis():
    row = json.loads(DESCRIPTION.read_text())["$defs"]["row"]["properties"]
    assert row["status"]["enum"] == list(STATUSES)
    assert row["basis"]["enum"] == list(BASES)


def test_the_documentation_names_everything_and_its_example_runs(tmp_path):
    text = (ROOT / "docs" / "results" / "format.md").read_text()
    assert all(f"`{name}`" in text for name in (*STATUSES, *BASES, *UNITS))
    assert {metric.unit for metric in METRICS.values()} <= set(UNITS)
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
    with pytest.raises(ValueError, match="row: unknown status"):
        table.add({"shape": "1K", "provider": "ours", "status": "superb"})
    assert len(table.rows) == 1


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / RESULT).mkdir()
    with pytest.raises(InputError, match=f"out: cannot write {tmp_path / RESULT}"):
        Record(tmp_path / RESULT, environment())


def test_every_row_is_on_disk_at_once(record):
    with record.section("attention", "Attention", {}) as section:
        table = new_table(section)
        for count, provider in enumerate(("ours", "theirs"), 1):
            table.add({"shape": "2K", "provider": provider, "seconds": 1.0})
            found = read_result(record.path)["sections"]["attention"]
            assert (found["status"], len(found["tables"][0]["rows"])) == ("running", count)
    assert [path.name for path in record.path.parent.iterdir()] == [RESULT]


def test_numbers_that_json_has_not_become_null(record):
    with record.section("a", "a", {"shift": math.inf}) as section:
        row = {"shape": "2K", "provider": "ours", "seconds": math.nan, "list": [1.0, -math.inf]}
        new_table(section).add(row)
    section = read_result(record.path)["sections"]["a"]
    row = section["tables"][0]["rows"][0]
    assert (row["seconds"], row["list"], section["settings"]) == (None, [1.0, None], {"shift": None})


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (RuntimeError("CUDA error"), "failed", "CUDA error"),
        (ValueError(), "failed", "ValueError"),
    ],
)
def test_a_section_that_is_cut_short_says_so_and_keeps_its_rows(record, error, status, reason):
    def cut_short() -> None:
        with record.section("a", "a", {}) as section:
            new_table(section).add({"shape": "2K", "provider": "ours", "seconds": 1.0})
            raise error

    with pytest.raises(type(error)):
        cut_short()
    found = read_result(record.path)["sections"]["a"]
    assert (found["status"], found["reason"], len(found["tables"][0]["rows"])) == (status, reason, 1)


def test_bad_input_before_anything_is_measured_leaves_an_earlier_file(record):
    """A mistyped option costs nobody the results in ``--out``."""

    def refused() -> None:
        with record.section("a", "a", {}):
            raise InputError("size: expected another")

    record.path.write_text("earlier")
    with pytest.raises(InputError):
        refused()
    assert record.path.read_text() == "earlier"


def test_a_wide_spread_is_warned_of(table):
    wide = table.add({"shape": "2K", "provider": "a", "seconds": 1.0, "seconds_low": 0.9, "seconds_high": 1.05})
    assert wide["warning"] == "spread 15 %: not a basis for comparisons"
    narrow = table.add({"shape": "2K", "provider": "b", "seconds": 1.0, "seconds_low": 0.98, "seconds_high": 1.0})
    assert "warning" not in narrow


def test_shipped_results_are_valid_and_lie_where_they_belong():
    for path in shipped_results():
        device = read_result(path)["environment"]
        assert path.parent.name in (folder_name(device["device"]), device["device_type"])


def test_files_are_labelled_and_folders_named_by_card():
    assert folder_name("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-r-xeon-r-cpu-2-20ghz"
    document = {"environment": environment()}
    assert label_of("x.json", document) == "NVIDIA H200, aaaaaaa, 2026-11-26 (x.json)"
    document["environment"]["git"] = {"commit": "b" * 40, "dirty": True}
    assert label_of("/one/two/x.json", document) == "NVIDIA H200, bbbbbbb+changes, 2026-11-26 (two/x.json)"
    document["environment"]["git"] = None
    assert label_of("x.json", document) == "NVIDIA H200, no commit, 2026-11-26 (x.json)"


# How numbers are shown


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", ""), (1.23456, "s", "1.235"), (0.0, "s", "0"), (22_400.0, "s", "22,400"), ("text", "s", "text"),
        (3 * 2**30, "bytes", "3.22 GB"), (232_448, "bytes", "232.4 kB"), (4.05e12, "B/s", "4,050"),
        (1.9e12, "FLOP", "1.9 TFLOP"), (7.9e18, "FLOP", "7,900.0 PFLOP"), (2.1e-3, "error", "2.1e-03"),
        (0.853, "fraction", "0.85"), (202.0, "ratio", "202"), (642.3, "TFLOP/s", "642"), (1.5, "TFLOP/s", "1.500"),
        (295_680, "count", "295,680"), (math.nan, "s", "NaN"), (True, "count", "True"),
    ],
)  # fmt: skip
def test_numbers_for_people(value, unit, text):
    assert format_value(value, unit) == text


def test_columns_have_the_unit_in_which_they_read_best():
    """GB is 10^9 bytes; seconds go by most of the values, bytes by the largest, of which small ones keep two digits."""
    assert column_scale([0.002, 0.003, 5.0], "s") == (1e-3, "ms")
    assert column_scale([3e-8], "s") == (1e-6, "us")
    assert (significant(0.00012345), significant(1e-9)) == ("1.234e-04", "1.000e-09")
    assert column_scale([None, 21_071_649_382, 4e7], "bytes") == (1e9, "GB")
    assert column_scale([58.4e6, 1e6, 0], "bytes") == (1e6, "MB")
    assert column_scale([None, "text"], "bytes") == column_scale([1.0], "ratio") == (None, "")
    values = [format_value(value, "bytes", 1e9) for value in (21_071_649_382, 1.234e12, 4e7, 1.2e6, 0)]
    assert values == ["21.07", "1,234.00", "0.04", "0.0012", "0.00"]


def test_tables_as_markdown_are_escaped_and_say_what_must_be_said(table):
    table.add({"shape": "a | b", "provider": "ours", "seconds": 2e-3, "seconds_low": 1.9e-3, "seconds_high": 2e-3})
    table.add({"shape": "2K", "provider": "model", "seconds": 3e-3, "basis": "predicted", "basis_note": "by a model"})
    table.add({"shape": "2K", "provider": "eager", "status": "out of memory", "reason": "24 GiB"})
    lines = format_table(table.data).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["shape", "provider", "time, ms", "note"]
    assert "a \\| b" in lines[2]
    assert "2.000 (1.900 - 2.000)" in lines[2]
    assert "predicted by a model" in lines[3]
    assert "out of memory: 24 GiB" in lines[4]
