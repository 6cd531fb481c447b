"""Tables of a README that are written from result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from tests.support.result_samples import sample

README = """before
<!-- results: nvidia-h200 attention/attention columns=shape,provider,seconds provider=swifti2v|sdpa-cudnn -->
typed by hand
<!-- end of results -->
between
<!-- results: nvidia* csg/verdicts -->
<!-- end of results -->
after
"""


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """Results of two cards as if they were in the repository, and a README beside them."""
    root = tmp_path / "results"
    sample(root / "nvidia-h200" / "2026-11-25-bbbbbbb.json", date="2026-11-25T10:00:00+00:00", faster=0.5)
    sample(root / "nvidia-h200" / "2026-11-26-aaaaaaa.json")
    monkeypatch.setattr("bench.records.read.SHIPPED", root)
    (tmp_path / "README.md").write_text(README)
    return tmp_path / "README.md"


def test_a_readme_is_written_from_the_newest_file(shipped, capsys):
    command = ["report", "--readme", str(shipped)]
    assert main([*command, "--check"]) == 2
    assert "is not what its results give (first at line 3); run python -m bench report" in capsys.readouterr().err
    assert shipped.read_text() == README
    assert main(command) == 0
    text = shipped.read_text()
    assert "typed by hand" not in text
    assert "(results/nvidia-h200/2026-11-26-aaaaaaa.json), 2026-11-26, commit aaaaaaaaa." in text
    assert text.count("| swifti2v ") == 2
    assert "flash" not in text
    assert "404.0" in text
    assert text.startswith("before\n<!-- results: ")
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert main([*command, "--check"]) == 0
    assert main(command) == 0
    assert shipped.read_text() == text


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("h200 attention/attention", "folder: no results in one named h200*; the folders are nvidia-h200"),
        ("nvidia vae/clips", "table: vae/clips is in no file of nvidia*; there are attention/attention,"),
        ("nvidia attention", "results: expected FOLDER SECTION/TABLE"),
        ("nvidia attention/attention frames", "results: expected FOLDER SECTION/TABLE"),
        ("nvidia", "results: expected FOLDER SECTION/TABLE"),
        ("nvidia 'attention/attention", "results: expected FOLDER SECTION/TABLE"),
        (
            "nvidia attention/attention columns=speed",
            "field: attention/attention has no 'speed'; it has status, basis,",
        ),
        ("nvidia attention/attention speed=1", "field: attention/attention has no 'speed'"),
        ("nvidia attention/attention provider=cudnn", "rows: none has provider=cudnn; there are swifti2v, sdpa-cudnn,"),
    ],
)
def test_a_readme_that_asks_for_what_is_not_there(what, expected, shipped, capsys):
    shipped.write_text(README.replace("nvidia* csg/verdicts", what))
    before = shipped.read_text()
    assert main(["report", "--readme", str(shipped)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {shipped}, line 6: {expected}")
    assert shipped.read_text() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no block\n", ": expected a block that begins with <!-- results: FOLDER"),
        ("<!-- end of results -->\n<!-- results: nvidia csg/clips -->\n", ", line 1: <!-- end of results --> without"),
        ("<!-- results: nvidia csg/clips -->\n", ", line 1: expected <!-- end of results --> before the next block"),
    ],
)
def test_a_readme_with_marks_that_do_not_pair(text, expected, shipped, capsys):
    shipped.write_text(text)
    assert main(["report", "--readme", str(shipped)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {shipped}{expected}")


def test_names_with_spaces_stand_in_quotes(shipped, capsys):
    shipped.write_text(
        '<!-- results: nvidia csg/clips "method=two stages, CSG" columns=model -->\n<!-- end of results -->'
    )
    assert main(["report", "--readme", str(shipped), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"readme": str(shipped), "changed": True}
    assert "end-to-end" not in shipped.read_text().replace("end-to-end against", "")


def test_the_readme_of_the_repository_is_up_to_date():
    root = Path(__file__).parent.parent.parent.parent
    assert "<!-- results:" in (root / "README.md").read_text()
    assert main(["report", "--readme", str(root / "README.md"), "--check"]) == 0


def test_arguments_that_do_not_go_together(shipped, capsys):
    cases: list[tuple[list[Any], str]] = [
        (["report", "--check"], "check: expected --readme FILE beside it"),
        (["report", "x.json", "--readme", str(shipped)], "readme: takes all results in the repository"),
        (["report", "--readme", str(shipped.parent)], f"readme: {shipped.parent} cannot be read: Is a directory"),
    ]
    for arguments, expected in cases:
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {expected}")
