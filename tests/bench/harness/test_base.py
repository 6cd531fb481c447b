"""The option ``--base REV``: revisions in turns, what becomes of their runs, and all of it on a small repository."""

from __future__ import annotations

import copy
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.harness import base
from bench.harness.base import merge_runs, resolve, without_run_options
from bench.records.read import read_result
from model.errors import InputError
from tests.support import result_samples as samples
from tests.support.commands import git


def timed(seconds: float | None, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": "2K", "provider": "swifti2v", "seconds": seconds}
    if seconds is not None:
        row |= {"seconds_low": 0.99 * seconds, "seconds_high": 1.01 * seconds, "runs": 9, "tflops": 10 / seconds}
    return row | more


document = functools.partial(samples.document, metrics=("seconds", "launch_seconds", "tflops", "peak_bytes"))


def merged(folder: Path, *runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of merged runs."""
    documents = [document(folder / f"{i}.json", *rows) for i, rows in enumerate(runs)]
    found = merge_runs(copy.deepcopy(documents))
    (table,) = found["sections"]["dit"]["tables"]
    assert found | {"sections": None} == documents[0] | {"sections": None}
    return table["rows"]


# Merging


def test_runs_are_merged_to_medians_and_the_widest_of_their_spreads(tmp_path: Path) -> None:
    seconds = [1.0, 1.3, 0.9]
    (row,) = merged(tmp_path, *([timed(s, peak_bytes=int(100 * s))] for s in seconds))
    assert row["seconds"] == statistics.median(seconds)
    assert row["tflops"] == statistics.median(10 / s for s in seconds)
    assert row["peak_bytes"] == 100
    assert (row["seconds_low"], row["seconds_high"]) == pytest.approx((0.99 * 0.9, 1.01 * 1.3))
    assert "tflops_low" not in row
    (row,) = merged(tmp_path, [timed(1.0)], [timed(1.2)])
    assert (row["seconds"], row["seconds_low"], row["seconds_high"]) == pytest.approx((1.1, 0.99, 1.212))


def test_a_single_run_and_rows_of_one_run_only_stay_as_they_are(tmp_path: Path) -> None:
    first, other = timed(1.0), timed(2.0, provider="flash")
    assert merged(tmp_path, [first]) == document(tmp_path / "a.json", first)["sections"]["dit"]["tables"][0]["rows"]
    rows = merged(tmp_path, [first, other], [timed(3.0)])
    assert [(row["provider"], row["seconds"]) for row in rows] == [("swifti2v", 2.0), ("flash", 2.0)]
    assert rows[1]["seconds_high"] == 2.02


def test_rows_are_matched_by_their_whole_identity(tmp_path: Path) -> None:
    small = timed(5.0, shape="720p")
    rows = merged(tmp_path, [timed(1.0), small], [small | {"seconds": 7.0}, timed(3.0)])
    assert [(row["shape"], row["seconds"]) for row in rows] == [("2K", 2.0), ("720p", 6.0)]


def test_a_run_that_failed_gives_no_figures(tmp_path: Path) -> None:
    """A failed run is left out of the median; where it is the first the row stays failed, with its reason."""
    failed = {"shape": "2K", "provider": "swifti2v", "status": "out of memory", "reason": "24 GiB", "seconds": 77.0}
    (row,) = merged(tmp_path, [timed(1.0)], [failed], [timed(2.0)])
    assert (row["status"], row["seconds"]) == ("ok", 1.5)
    (row,) = merged(tmp_path, [failed], [timed(1.0)])
    assert (row["status"], row["reason"], row["seconds"]) == ("out of memory", "24 GiB", 77.0)


@pytest.mark.parametrize("without", [0, 1])
def test_a_time_that_one_of_the_runs_has_not_is_that_of_the_others(without: int, tmp_path: Path) -> None:
    """The host's time to issue a call is known for short calls only, and a call may be short in one run alone."""
    launches = [2e-5, 2e-5]
    launches[without] = None  # type: ignore[call-overload]
    (row,) = merged(tmp_path, *([timed(1.0, launch_seconds=launch)] for launch in launches))
    assert row["launch_seconds"] == 2e-5
    (row,) = merged(tmp_path, [timed(1.0, launch_seconds=None)], [timed(1.0, launch_seconds=None)])
    assert row["launch_seconds"] is None


# The command line, the revision


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["dit", "--base", "HEAD~1"], ["dit"]),
        (["dit", "--base=HEAD~1", "--quick"], ["dit", "--quick"]),
        (["--json", "dit", "--out", "folder", "--shapes", "2K"], ["dit", "--shapes", "2K"]),
        (["dit", "--out=folder", "--based", "x", "--base", "v1", "-1"], ["dit", "--based", "x", "-1"]),
        (["csg"], ["csg"]),
    ],
)
def test_each_run_has_the_command_line_without_base_out_and_json(given: list[str], kept: list[str]) -> None:
    assert without_run_options(given) == kept


PROGRAM = """
import pathlib, shutil, sys
assert sys.argv[1:] == ["dit", "--quick", "--out", sys.argv[-1]], sys.argv
with pathlib.Path(sys.argv[-1]).parent.joinpath("order").open("a") as file:
    file.write(NAME)
if NAME == "broken":
    sys.exit("first line\\nlast line")
out = pathlib.Path(sys.argv[-1])
out.mkdir()
shutil.copy(pathlib.Path(__file__).with_name("template.json"), out / "result.json")
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository whose bench takes 1 s in its only commit, and 0.5 s in the tree, which is not committed."""
    root = tmp_path / "repository"
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(base, "ROOT", root)
    (root / "bench").mkdir(parents=True)
    (root / "bench" / "__init__.py").touch()  # else a PYTHONPATH that leads here would come first
    for name, seconds in (("old ", 1.0), ("new ", 0.5)):
        document(root / "bench" / "template.json", timed(seconds))
        (root / "bench" / "__main__.py").write_text(f"NAME = {name!r}\n{PROGRAM}")
        if name == "old ":
            git(root, "init", "--quiet")
            git(root, "add", ".")
            git(root, "commit", "--quiet", "-m", "first")
    return root


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["tables", "json"])
def test_both_run_in_turns_and_are_compared(
    options: list[str], repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A drift favours neither revision: each is once the first and once the last; the second checkout is removed."""
    out = tmp_path / "out"
    assert main(["dit", "--quick", "--base", "HEAD", "--out", str(out), *options]) == 0
    assert (out / "order").read_text() == "old new new old "
    commit = git(repository, "rev-parse", "HEAD")
    printed = capsys.readouterr().out
    if options:
        comparison = json.loads(printed)
        assert comparison["tables"][0]["rows"][0]["ratios"]["seconds"] == [1.0, 0.5]
    else:
        assert printed.startswith(f"base ({commit[:9]}), run 1 of 2\nhere (this tree), run 1 of 2\n")
        assert f"A: HEAD ({commit[:9]})" in printed
        assert "0.500 better" in printed
        assert (out / "comparison.md").read_text() in printed
    files = ["base-1", "base-2", "base.json", "comparison.md", "here-1", "here-2", "here.json", "order"]
    assert sorted(path.name for path in out.iterdir()) == files
    for which, seconds in (("base", 1.0), ("here", 0.5)):
        (table,) = read_result(out / f"{which}.json")["sections"]["dit"]["tables"]
        assert table["rows"][0]["seconds"] == seconds
    assert git(repository, "worktree", "list").count("\n") == 0


def test_a_run_that_fails_is_named_with_its_last_lines_and_leaves_no_checkout(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "bench" / "__main__.py").write_text(f"NAME = 'broken'\n{PROGRAM}")
    assert main(["dit", "--quick", "--base", "HEAD", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == "error: base: python -m bench dit --quick failed in repository:\nfirst line\nlast line\n"
    assert (tmp_path / "out" / "order").read_text() == "old broken"
    assert git(repository, "worktree", "list").count("\n") == 0


@pytest.mark.parametrize("revision", ["nonsense", "HEAD~1", "", "HEAD:bench", "--all", "f" * 40])
def test_an_unknown_revision_is_one_line_and_leaves_no_folder(
    revision: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dit", "--quick", f"--base={revision}", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: base: {revision!r} is no revision of this git checkout\n"
    assert not (tmp_path / "out").exists()


def test_revisions_are_any_that_name_a_commit(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "tag", "-a", "v1", "-m", "annotated")
    assert {resolve(name) for name in ("HEAD", "v1", commit, commit[:12])} == {commit}


def test_outside_a_checkout_or_without_git_there_is_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(base, "ROOT", tmp_path)
    with pytest.raises(InputError, match="base: 'HEAD' is no revision of this git checkout"):
        resolve("HEAD")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="base: cannot run git"):
        resolve("HEAD")
