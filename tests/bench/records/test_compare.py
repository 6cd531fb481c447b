"""Comparisons: what counts as a difference, what is not compared and why, and the command."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.records.comparison import (
    LEAST,
    WITHOUT_SPREAD,
    compare_documents,
    count_verdicts,
    labels_of,
    only_changes,
    threshold,
)
from bench.records.markdown import format_comparison
from bench.records.write import dumps
from model.errors import InputError
from tests.support import result_samples as samples
from tests.support.result_samples import H100, sample

TIME = ("seconds", "peak_bytes", "spills", "error", "tflops")


def document(folder: Path, rows: list[dict[str, Any]], **given: Any) -> dict[str, Any]:
    """A file of one table."""
    return samples.document(folder / "result.json", *rows, metrics=TIME, **given)


def compared(tmp_path: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    """Compares files that have one row each."""
    documents = [document(tmp_path / str(i), [row]) for i, row in enumerate(rows)]
    comparison = compare_documents(documents, [str(i) for i in range(len(rows))])
    return comparison["tables"][0]["rows"][0]


def timed(seconds: float, spread: float = 0.01, runs: int = 9) -> dict[str, Any]:
    return {"seconds": seconds, "seconds_low": seconds * (1 - spread), "seconds_high": seconds * (1 + spread),
            "runs": runs}  # fmt: skip


@pytest.mark.parametrize(
    ("first", "other", "verdict"),
    [
        (timed(1.0), timed(1.02), "same"),  # 2 * hypot(1 %, 1 %) is 2.8 %
        (timed(1.0), timed(1.04), "worse"),
        (timed(1.04), timed(1.0), "better"),
        (timed(1.0, 0.1), timed(1.2, 0.1), "same"),
        (timed(1.0, 0.001), timed(1.009, 0.001), "same"),  # never below 1 %
        (timed(1.0, 0.001), timed(1.011, 0.001), "worse"),
        (timed(1.0, 0.0, runs=1), timed(1.09, 0.0, runs=1), "same"),  # one run has no spread, and not a spread of 0
        (timed(1.0, 0.0, runs=2), timed(1.12, 0.0, runs=2), "worse"),
        ({"seconds": 1.0}, {"seconds": 1.09}, "same"),
        ({"seconds": 1.0}, {"seconds": 1.12}, "worse"),
    ],
)
def test_a_difference_counts_beyond_the_spreads(tmp_path, first, other, verdict):
    row = compared(tmp_path, first, other)
    assert row["verdicts"]["seconds"] == ["same", verdict]
    assert row["ratios"]["seconds"] == [1.0, other["seconds"] / first["seconds"]]


def test_a_rate_has_the_spread_of_its_time_and_the_other_direction(tmp_path):
    noisy = compared(tmp_path, timed(1.0, 0.1) | {"tflops": 100.0}, timed(1.2, 0.1) | {"tflops": 83.0})
    assert noisy["verdicts"]["tflops"] == ["same", "same"]
    quiet = compared(tmp_path, timed(1.0) | {"tflops": 100.0}, timed(1.2) | {"tflops": 83.0})
    assert quiet["verdicts"]["tflops"] == ["same", "worse"]
    assert quiet["verdicts"]["seconds"] == ["same", "worse"]


def test_counts_do_not_vary_and_nothing_has_no_ratio(tmp_path):
    row = compared(tmp_path, {"peak_bytes": 1000, "spills": 0}, {"peak_bytes": 1020, "spills": 4})
    assert row["verdicts"] == {"peak_bytes": ["same", "worse"], "spills": ["same", "worse"]}
    assert row["ratios"]["spills"] == [None, None]
    back = compared(tmp_path, {"peak_bytes": 1000, "spills": 4}, {"peak_bytes": 1009, "spills": 0})
    assert back["verdicts"] == {"peak_bytes": ["same", "same"], "spills": ["same", "better"]}


def test_the_threshold_is_symmetric_and_grows_with_the_spread():
    rows = [{"basis": "measured", **timed(1.0, spread)} for spread in (0.01, 0.02, 0.05)]
    values = [threshold(rows[0], other, "seconds", "s") for other in rows]
    assert values == sorted(values)
    assert values[1] == threshold(rows[1], rows[0], "seconds", "s") == pytest.approx(2 * math.hypot(0.01, 0.02))
    assert threshold(rows[0], rows[1], "launch_seconds", "s") == WITHOUT_SPREAD
    assert threshold(rows[0], rows[1], "peak_bytes", "bytes") == LEAST


def test_another_basis_has_a_ratio_and_no_verdict(tmp_path):
    guess = {"seconds": 2.0, "basis": "predicted"}
    row = compared(tmp_path, timed(1.0), guess)
    assert row["ratios"]["seconds"] == [1.0, 2.0]
    assert row["verdicts"]["seconds"] == ["same", ""]
    assert row["bases"] == ["measured", "predicted"]
    documents = [document(tmp_path / name, [r]) for name, r in (("a", timed(1.0)), ("b", guess))]
    text = format_comparison(compare_documents(documents, ["one", "two"]))
    assert "A: measured; B: predicted" in text
    assert "WORSE" not in text
    assert "0 figures better, 0 worse" in text
    # Two predictions come out the same every time.
    assert compared(tmp_path, guess, guess | {"seconds": 2.04})["verdicts"]["seconds"] == ["same", "worse"]


def test_a_row_that_fails_in_one_file_is_there_with_its_reason(tmp_path):
    failed = {"status": "out of memory", "reason": "tried to allocate 24 GiB"}
    documents = [document(tmp_path / name, [row]) for name, row in (("a", timed(1.0)), ("b", failed))]
    comparison = compare_documents(documents, ["a", "b"])
    (row,) = comparison["tables"][0]["rows"]
    assert row["statuses"] == ["ok", "out of memory"]
    assert row["reasons"] == [None, "tried to allocate 24 GiB"]
    assert row["values"] == {}
    text = format_comparison(comparison)
    assert "B: out of memory (tried to allocate 24 GiB)" in text
    assert "without a result here and not in A: 1" in text
    back = format_comparison(compare_documents(documents[::-1], ["b", "a"]))
    assert "without a result in A and not here: 1" in back


def test_rows_in_one_file_only_are_named(tmp_path):
    first = document(tmp_path / "a", [timed(1.0), timed(2.0) | {"provider": "flash"}])
    other = document(tmp_path / "b", [timed(1.0), timed(3.0) | {"provider": "cudnn"}])
    comparison = compare_documents([first, other], ["a", "b"])
    assert [row["key"]["provider"] for row in comparison["tables"][0]["rows"]] == ["swifti2v"]
    text = format_comparison(comparison)
    assert "- dit/rows: 2K, flash (only in A)" in text
    assert "- dit/rows: 2K, cudnn (only in B)" in text


def test_three_files_of_which_the_first_lacks_a_row(tmp_path):
    rows = [timed(1.0)], [timed(1.0), timed(2.0) | {"provider": "b"}], [timed(0.5), timed(3.0) | {"provider": "b"}]
    documents = [document(tmp_path / str(i), found) for i, found in enumerate(rows)]
    comparison = compare_documents(documents, ["one", "two", "three"])
    shared, without_first = comparison["tables"][0]["rows"]
    assert shared["verdicts"]["seconds"] == ["same", "same", "better"]
    assert without_first["values"]["seconds"] == [None, 2.0, 3.0]
    assert without_first["ratios"]["seconds"] == [None, None, None]
    assert without_first["verdicts"]["seconds"] == ["", "", ""]
    assert count_verdicts(comparison, 2) == {"better": 1}
    assert "C / A" in format_comparison(comparison)


def test_what_others_reported_is_not_compared(tmp_path):
    paper = {"provider": "paper", "seconds": 111.0, "basis": "reported"}
    documents = [document(tmp_path / name, [timed(1.0), paper]) for name in "ab"]
    comparison = compare_documents(documents, ["a", "b"])
    assert [row["key"]["provider"] for row in comparison["tables"][0]["rows"]] == ["swifti2v"]
    assert comparison["unmatched"] == []


def test_other_sizes_have_nothing_in_common_and_the_message_says_so(tmp_path):
    rows = [timed(1.0), {"provider": "paper", "seconds": 111.0, "basis": "reported"}]
    small = [row | {"shape": "720p"} if row["provider"] != "paper" else row
             for row in ({"provider": "swifti2v"} | r for r in rows)]  # fmt: skip
    documents = [document(tmp_path / "a", rows), document(tmp_path / "b", small)]
    with pytest.raises(InputError, match="nothing to compare: no row is in two of them") as caught:
        compare_documents(documents, ["one", "two"])
    assert str(caught.value).splitlines()[1:] == [
        "  A: one", "  B: two", "  dit/rows: 2K, swifti2v (only in A)", "  dit/rows: 720p, swifti2v (only in B)",
    ]  # fmt: skip


def test_other_settings_keep_a_table_apart(tmp_path):
    """Rows that look the same and are not: the size is a setting of whole passes and not in their rows."""
    settings = {"width": 2560, "steps": 4, "repeats": 3}
    first = document(tmp_path / "a", [timed(1.0)], settings=settings)
    with pytest.raises(InputError, match="dit/rows: width is 2560 in A and 448 in B"):
        compare_documents([first, document(tmp_path / "b", [timed(1.0)], settings=settings | {"width": 448})], "ab")
    # A field of the row itself may differ, and so may what changes no work.
    harmless = document(tmp_path / "c", [timed(1.0)], settings=settings | {"repeats": 9})
    assert compare_documents([first, harmless], "ab")["warnings"] == []
    quick = document(tmp_path / "d", [timed(1.0)], settings=settings | {"quick": True})
    full = document(tmp_path / "e", [timed(1.0)], settings=settings | {"quick": False, "steps": None})
    assert compare_documents([quick, full], "ab")["warnings"] == [
        "section dit was run with another steps: 4 in A, default in B",
        "section dit was run with another quick: True in A, False in B",
    ]


def test_rows_told_apart_by_other_fields_are_not_compared(tmp_path):
    first = document(tmp_path / "a", [timed(1.0)])
    other = document(tmp_path / "b", [timed(1.0)], identity=("shape", "provider", "basis"))
    with pytest.raises(InputError, match="told apart by shape, provider in A and by shape, provider, basis in B"):
        compare_documents([first, other], "ab")


def test_rows_without_a_direction_are_said_to_have_none(tmp_path):
    documents = [document(tmp_path / name, [{"error": 1e-3}]) for name in "ab"]
    with pytest.raises(InputError, match="no figure that is better lower or higher is in two of them"):
        compare_documents(documents, "ab")


def test_empty_files_and_a_single_one_are_bad_input(tmp_path):
    only = document(tmp_path / "a", [timed(1.0)])
    with pytest.raises(InputError, match="files: expected at least two, got 1"):
        compare_documents([only], ["a"])
    empty = [{**only, "sections": {}} for _ in range(2)]
    with pytest.raises(InputError, match="no table is in two of them"):
        compare_documents(empty, "ab")


def test_what_makes_files_hard_to_compare_is_a_warning(tmp_path):
    rows = [timed(1.0)]
    first = document(tmp_path / "a", rows, git=None)
    packages = {"torch": "2.12.0", "triton": "3.6.0"}
    other = document(tmp_path / "b", rows, git={"commit": "b" * 40, "dirty": True}, packages=packages)
    other = deepcopy(other)
    section = other["sections"]["dit"]
    section |= {"status": "interrupted", "reason": "interrupted"}
    section["machine"] = {"before": None, "after": {"throttling": ["power cap"]}}
    assert compare_documents([first, other], ["one", "two"])["warnings"] == [
        "A: made outside a git checkout, so the code is not known",
        "B: made with uncommitted changes",
        "torch differs: 2.13.0+cu130, 2.12.0",
        "B: section dit is incomplete, interrupted: interrupted",
        "B: section dit ended throttled by power cap",
    ]


def test_labels_are_told_apart_by_as_much_of_the_path_as_is_needed(tmp_path):
    found = document(tmp_path / "a", [timed(1.0)])
    other = document(tmp_path / "b", [timed(1.0)], device=H100)
    label = "NVIDIA H200, aaaaaaa, 2026-11-26"
    assert labels_of(["x.json", "y.json"], [found, other]) == [label, label.replace("H200", "H100 80GB HBM3")]
    assert labels_of(["r/x.json", "r/y.json"], [found, found]) == [f"{label} (x.json)", f"{label} (y.json)"]
    paths = ["one/result.json", "two/result.json", "x.json"]
    assert labels_of(paths, [found] * 3) == [f"{label} ({name})" for name in paths]


def test_quick_shows_what_is_better_worse_or_failed_and_counts_all(tmp_path, capsys):
    """The second is slower in one figure of four; in each file one row has failed."""
    rows = [{"shape": "a", **timed(1.0), "peak_bytes": 10}, {"shape": "b", **timed(1.0)}, {"shape": "c", **timed(1.0)}]
    rows[1]["tflops"] = 5.0
    failed = {"shape": "c", "status": "out of memory", "reason": "of 80 GB"}
    slower = [rows[0] | timed(2.0), rows[1], failed]
    names = ("a", "b")
    first, other = (document(tmp_path / n, found) for n, found in zip(names, (rows, slower), strict=True))
    full = compare_documents([first, other], names)
    (table,) = only_changes(full)["tables"]
    assert [(row["key"]["shape"], list(row["values"])) for row in table["rows"]] == [("a", ["seconds"]), ("c", [])]
    assert [len(row["values"]) for row in full["tables"][0]["rows"]] == [2, 2, 0]  # is left as it was
    files = [str(tmp_path / name / "result.json") for name in names]
    assert main(["compare", *files, "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"] == json.loads(dumps([table]))
    assert main(["compare", *files, "--quick"]) == 0
    text = capsys.readouterr().out
    assert "2.000 WORSE" in text
    assert "same |" not in text
    assert "B against A: 0 figures better, 1 worse, 3 the same within their spread" in text
    assert main(["compare", files[0], files[0], "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"] == []


def test_the_command_prints_writes_and_gives_json(tmp_path, capsys):
    first, other = sample(tmp_path / "a.json"), sample(tmp_path / "b.json", H100, faster=0.8)
    assert main(["compare", str(first), str(other)]) == 0
    text = capsys.readouterr().out
    assert "- A: NVIDIA H200" in text
    assert "1.250 WORSE" in text
    assert "**compile: every kernel, compiled**" in text
    assert main(["compare", str(first), str(other), "--section", "attention", "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert {table["section"] for table in comparison["tables"]} == {"attention"}
    out = tmp_path / "new" / "comparison.md"
    assert main(["compare", str(first), str(other), "--out", str(out)]) == 0
    assert out.read_text() == text
    assert capsys.readouterr().out.strip() == str(out)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    good = sample(tmp_path / "good.json")

    def error(*arguments: str) -> str:
        assert main(["compare", *arguments]) == 2
        return capsys.readouterr().err

    assert error(str(good)) == "error: files: expected at least two, got 1\n"
    assert "section: 'vae' is in none of the files; there are attention, dit" in error(
        str(good), str(good), "--section", "vae"
    )
    assert f"error: {tmp_path / 'none.json'}: cannot be read" in error(str(good), str(tmp_path / "none.json"))
