"""Comparisons: what counts as a difference, what is not compared and why, and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.records.comparison import compare_documents
from bench.records.markdown import format_comparison
from model.errors import InputError
from tests.support.result_samples import H100, document, sample

TIME = ("seconds", "peak_bytes", "spills", "error", "tflops")


def timed(seconds: float, spread: float = 0.01, runs: int = 9, **more: Any) -> dict[str, Any]:
    ends = {"seconds_low": seconds * (1 - spread), "seconds_high": seconds * (1 + spread)}
    return {"seconds": seconds, **ends, "runs": runs, **more}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that makes a file of one table from its rows."""
    return lambda *rows, **given: document(tmp_path / "result.json", *rows, metrics=TIME, **given)


@pytest.fixture
def compared(file: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A function that compares files that have one row each, and returns that row."""
    return lambda *rows: compare_documents([file(row) for row in rows], rows)["tables"][0]["rows"][0]


@pytest.mark.parametrize(
    ("first", "other", "verdicts"),
    [
        (timed(1.0), timed(1.02), "same"),  # 2 * hypot(1 %, 1 %) is 2.8 %
        (timed(1.0), timed(1.04), "worse"),
        (timed(1.04), timed(1.0), "better"),
        (timed(1.0, 0.1), timed(1.2, 0.1), "same"),
        (timed(1.0, 0.001), timed(1.009, 0.001), "same"),  # never below 1 %
        (timed(1.0, 0.001), timed(1.011, 0.001), "worse"),
        (timed(1.0, 0.0, runs=1), timed(1.09, 0.0, runs=1), "same"),  # one run has no spread, and not a spread of 0
        (timed(1.0, 0.0, runs=2), timed(1.12, 0.0, runs=2), "worse"),
        ({"seconds": 1.0}, {"seconds": 1.12}, "worse"),
        # A rate has the spread of its time, and the other direction.
        (timed(1.0, 0.1, tflops=100.0), timed(1.2, 0.1, tflops=83.0), "same same"),
        (timed(1.0, tflops=100.0), timed(1.2, tflops=83.0), "worse worse"),
        # Counts do not vary, and over nothing there is no ratio.
        ({"peak_bytes": 1000, "spills": 0}, {"peak_bytes": 1020, "spills": 4}, "worse worse"),
        ({"peak_bytes": 1000, "spills": 4}, {"peak_bytes": 1009, "spills": 0}, "same better"),
    ],
)
def test_a_difference_counts_beyond_the_spreads(compared, first, other, verdicts):
    row, names = compared(first, other), [name for name in TIME if name in first]
    assert row["verdicts"] == {name: ["same", v] for name, v in zip(names, verdicts.split(), strict=True)}
    ratios = {name: other[name] / first[name] if first[name] else None for name in names}
    assert row["ratios"] == {name: [1.0 if first[name] else None, ratio] for name, ratio in ratios.items()}


def test_another_basis_has_a_ratio_and_no_verdict(file, compared):
    guess = {"seconds": 2.0, "basis": "predicted"}
    row = compared(timed(1.0), guess)
    assert (row["ratios"]["seconds"], row["verdicts"]["seconds"]) == ([1.0, 2.0], ["same", ""])
    text = format_comparison(compare_documents([file(timed(1.0)), file(guess)], ["one", "two"]))
    assert "A: measured; B: predicted" in text
    assert "0 figures better, 0 worse" in text
    # Two predictions come out the same every time.
    assert compared(guess, guess | {"seconds": 2.04})["verdicts"]["seconds"] == ["same", "worse"]


def test_a_row_that_fails_in_one_file_is_there_with_its_reason(file):
    documents = [file(timed(1.0)), file({"status": "out of memory", "reason": "tried to allocate 24 GiB"})]
    text = format_comparison(compare_documents(documents, ["a", "b"]))
    assert "B: out of memory (tried to allocate 24 GiB)" in text
    assert "without a result here and not in A: 1" in text
    back = format_comparison(compare_documents(documents[::-1], ["b", "a"]))
    assert "without a result in A and not here: 1" in back


def test_rows_in_one_file_only_are_named_and_those_that_others_reported_are_not(file):
    paper = {"provider": "paper", "seconds": 111.0, "basis": "reported"}
    documents = [file(timed(1.0), timed(2.0, provider="flash"), paper), file(timed(1.0), paper)]
    comparison = compare_documents(documents, ["a", "b"])
    assert [row["key"]["provider"] for row in comparison["tables"][0]["rows"]] == ["swifti2v"]
    assert comparison["unmatched"] == ["dit/rows: 2K, flash (only in A)"]
    assert "- dit/rows: 2K, flash (only in A)" in format_comparison(comparison)


def test_three_files_of_which_the_first_lacks_a_row(file):
    rows = [timed(1.0)], [timed(1.0), timed(2.0, provider="b")], [timed(0.5), timed(3.0, provider="b")]
    comparison = compare_documents([file(*found) for found in rows], ["one", "two", "three"])
    shared, without_first = comparison["tables"][0]["rows"]
    assert shared["verdicts"]["seconds"] == ["same", "same", "better"]
    assert without_first["values"]["seconds"] == [None, 2.0, 3.0]
    assert without_first["ratios"]["seconds"] == [None, None, None]
    assert without_first["verdicts"]["seconds"] == ["", "", ""]
    text = format_comparison(comparison)
    assert "C / A" in text
    assert "C against A: 1 figures better, 0 worse" in text


def test_other_settings_keep_a_table_apart(file):
    """Rows that look the same and are not: the size is a setting of whole passes and not in their rows."""
    settings = {"width": 2560, "steps": 4, "repeats": 3}
    first = file(timed(1.0), settings=settings)
    with pytest.raises(InputError, match="dit/rows: width is 2560 in A and 448 in B"):
        compare_documents([first, file(timed(1.0), settings=settings | {"width": 448})], "ab")
    # What changes no work may differ.
    assert compare_documents([first, file(timed(1.0), settings=settings | {"repeats": 9})], "ab")["unmatched"] == []


def test_settings_that_may_explain_a_difference_are_a_warning(file):
    """One that only one of the files was given may be the other's default, and keeps nothing apart."""
    found = (
        file(timed(1.0), settings={"steps": 4, "quick": True}),
        file(timed(1.0), settings={"steps": None, "quick": False}),
    )
    assert compare_documents(found, "ab")["warnings"] == [
        "section dit was run with another steps: 4 in A, default in B",
        "section dit was run with another quick: True in A, False in B",
    ]


def test_what_cannot_be_compared_is_said(file):
    """Other sizes, a single file, no tables, tables of another identity, and figures without a direction."""
    one = file(timed(1.0))
    apart = "no row is in two of them\n  A: a\n  B: b\n  dit/rows: 2K, swifti2v (only in A)\n  dit/rows: 720p, swifti2v"
    for documents, message in (
        ([one, file(timed(1.0, shape="720p"))], apart),
        ([one], "files: expected at least two, got 1"),
        ([{**one, "sections": {}}] * 2, "no table is in two of them"),
        (
            [one, file(timed(1.0), identity=("shape", "basis"))],
            "told apart by shape, provider in A and by shape",
        ),
        ([file({"error": 1e-3})] * 2, "no figure that is better lower or higher is in two of them"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            compare_documents(documents, "ab")


def test_what_makes_files_hard_to_compare_is_a_warning(file):
    first = file(timed(1.0), git=None)
    packages = {"torch": "2.12.0", "triton": "3.6.0"}
    other = deepcopy(file(timed(1.0), git={"commit": "b" * 40, "dirty": True}, packages=packages))
    other["sections"]["dit"] |= {"status": "interrupted", "reason": "interrupted"}
    other["sections"]["dit"]["machine"] = {"before": None, "after": {"throttling": ["power cap"]}}
    assert compare_documents([first, other], ["one", "two"])["warnings"] == [
        "A: made outside a git checkout, so the code is not known",
        "B: made with uncommitted changes",
        "torch differs: 2.13.0+cu130, 2.12.0",
        "B: section dit is incomplete, interrupted: interrupted",
        "B: section dit ended throttled by power cap",
    ]


def test_the_command_prints_tables_or_json_and_says_what_is_wrong(tmp_path, capsys):
    first, other = (str(sample(tmp_path / n, device, faster=f)) for n, device, f in
                    (("a.json", "NVIDIA H200", 1.0), ("b.json", H100, 0.8)))  # fmt: skip
    assert main(["compare", first, other]) == 0
    text = capsys.readouterr().out
    assert f"- A: NVIDIA H200, aaaaaaa, 2026-11-26 ({tmp_path.name}/a.json)" in text
    assert "1.250 WORSE" in text
    assert "**compile: every kernel, compiled**" in text
    assert main(["compare", first, other, "--json"]) == 0
    assert {table["section"] for table in json.loads(capsys.readouterr().out)["tables"]} >= {"attention", "compile"}
    assert main(["compare", first]) == 2
    assert capsys.readouterr().err == "error: files: expected at least two, got 1\n"
