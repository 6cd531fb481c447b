"""Tables of Markdown files that are filled from result files."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.records.read import ROOT
from bench.report.fill import tables_in
from tests.support.result_samples import sample

README = """before
<!-- results: nvidia-h200 attention/attention columns=shape,provider,seconds provider=swifti2v|sdpa-cudnn -->
typed by hand
<!-- end of results -->
between
<!-- results: nvidia* csg/verdicts -->
<!-- end of results -->
<!-- results: nvidia csg/clips "method=two stages, CSG" columns=model -->
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


def test_tables_are_filled_from_the_newest_file(shipped, capsys):
    """Only what stands between the marks changes, and it then stays as it is."""
    command = ["report", "--fill", str(shipped)]
    assert main([*command, "--check"]) == 2
    again = f"run python -m bench report --fill {shipped}"
    assert capsys.readouterr().err == f"error: fill: {shipped}: not what the results give; {again}\n"
    assert shipped.read_text() == README
    assert main(command) == 0
    text = shipped.read_text()
    assert "typed by hand" not in text
    assert "(results/nvidia-h200/2026-11-26-aaaaaaa.json), 2026-11-26, commit aaaaaaaaa." in text
    assert text.count("| swifti2v ") == 2
    assert "flash" not in text
    assert "404.0" in text
    assert "| 14b " in text
    assert "CineScale" not in text
    assert text.startswith("before\n<!-- results: ")
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert main([*command, "--check"]) == 0
    assert main(command) == 0
    assert shipped.read_text() == text


def test_several_files_are_filled_with_links_of_their_own(shipped, tmp_path, capsys):
    """A file in a folder links from there; marks in fenced code are an example; one without others is passed over."""
    page, plain = tmp_path / "docs" / "results" / "card.md", tmp_path / "docs" / "plain.md"
    example = "```\n<!-- results: FOLDER SECTION/TABLE -->\n<!-- end of results -->\n```\n"
    page.parent.mkdir(parents=True)
    page.write_text(example + README + example)
    plain.write_text(example)
    assert main(["report", "--fill", str(shipped), str(plain), str(page)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{shipped}: tables: 3, written", f"{plain}: tables: 0, up to date", f"{page}: tables: 3, written",
    ]  # fmt: skip
    text = page.read_text()
    assert "(../../results/nvidia-h200/2026-11-26-aaaaaaa.json)" in text
    assert (text.startswith(example), text.endswith(example), plain.read_text()) == (True, True, example)
    assert main(["report", "--fill", str(plain)]) == 2
    assert f"{plain}: expected a table that begins with <!-- results: FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("h200 attention/attention", "folder: no results in one named h200*; the folders are nvidia-h200"),
        ("nvidia vae/clips", "table: vae/clips is in no file of nvidia*; there are attention/attention,"),
        ("nvidia attention", "results: expected FOLDER SECTION/TABLE"),
        ("nvidia attention/attention frames", "results: expected FOLDER SECTION/TABLE"),
        ("nvidia 'attention/attention", "results: expected FOLDER SECTION/TABLE"),
        ("nvidia attention/attention columns=speed", "field: attention/attention has no 'speed'; it has status,"),
        ("nvidia attention/attention provider=cudnn", "rows: none has provider=cudnn; there are swifti2v, sdpa-cudnn,"),
        ("nvidia csg/clips -->\n<!-- results: nvidia csg/clips", "expected <!-- end of results --> after each table"),
    ],
)
def test_where_a_mark_asks_for_what_is_not_there_no_file_is_written(what, expected, shipped, tmp_path, capsys):
    wrong = tmp_path / "wrong.md"
    wrong.write_text(README.replace("nvidia* csg/verdicts", what))
    assert main(["report", "--fill", str(shipped), str(wrong)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {wrong}, line 6: {expected}")
    assert shipped.read_text() == README


def test_tables_of_the_repository_are_up_to_date(capsys):
    """Every Markdown file with marks has the tables that the committed results give."""
    found = [path for pattern in ("*.md", "docs/**/*.md", "bench/**/*.md") for path in sorted(ROOT.glob(pattern))]
    pages = [str(path) for path in found if tables_in(path.read_text())]
    assert len(pages) >= 3
    assert main(["report", "--fill", *pages, "--check"]) == 0, capsys.readouterr().err
