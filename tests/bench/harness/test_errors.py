"""Bad input to every subcommand: one line that says what was expected, exit code 2, and no folder that stays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.harness.registry import benchmarks
from swifti2v_kernels.common.cards import CARDS

#: What a subcommand checks itself; bad values of options are in tests/test_option_fuzz.py.
REFUSED = [
    (["attention", "--shapes", "8K"], "shapes: no shape contains '8K'; the shapes are CSG window"),
    (["attention", "--update-table"], "update-table: expected a CUDA device, since the table holds measurements"),
    (["attention", "--milliseconds", "0"], "argument --milliseconds: expected at least 1, got 0"),
    (["attention", "--only", "theirs"], "only: none contains 'theirs'; they are swifti2v"),
    (["attention", "--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
    (["attention", "--device", "cuda"], "device: cuda was asked for, but torch sees no GPU"),
    (["attention", "--nonsense"], "unrecognized arguments: --nonsense"),
    # Abbreviations are none either.
    (["attention", "--ou", "x"], "unrecognized arguments: --ou x"),
    (["precision", "--forms", "int4"], "argument --forms: expected some of bfloat16, int8, float8, int8-matmul, "),
    (["dit", "--quick", "--part", "layer", "--shapes", "2560x1408"], "shapes: no shape contains '2560x1408'"),
    (["dit", "--ops", "fft"], "ops: no operator contains 'fft'; the operators are scaled_linear, "),
    (["vae", "--shapes", "8K"], "shapes: none contains '8K'; they are 2.1, 360P, 81 frames; "),
    (["vae", "--limit", "4 apples"], "limit: expected a size such as 12GB, 12GiB or 500MB, got '4 apples'"),
    (["vae", "--update-table"], "update-table: expected a CUDA device, since the table holds measurements"),
    (["compile", "--targets", "90,75"], "argument --targets: expected some of 80, 86, 89, 90, 100, 120, got '75'"),
    (["compile", "--cases", "fft"], "cases: no case contains 'fft'; the cases are "),
    (["operators", "--cases", "fft"], "cases: no case contains 'fft'; the cases are "),
    (["tests", "--jobs", "0"], "argument --jobs: expected at least 1, got 0"),
    (["tune", "--kernels", "nothing like it"], "kernels: nothing contains 'nothing like it'; there are: "),
    (["csg", "nowhere.jpg"], "image: nowhere.jpg does not exist"),
    (["csg", "--frames", "6"], "frames: expected 1 + 4n (5, 9, ... for 4), got 6; nearest: 5"),
    (["csg", "--size", "100x100"], "size: width and height must be multiples of 16, got 100x100; nearest: 96x96"),
    (["csg", "--whole", "--extrapolate"], "whole, extrapolate: expected one of them"),
    (["csg", "--models", "2b,,14b"], "argument --models: expected some of 1.3b, 5b, 14b, got '2b', ''"),
    (["csg", "--extrapolate", "--frames", "21,41"], "frames: expected one number, 1 + 4n and at least 17, for the"),
    (["sanitize", "--checks", "speed"], "argument --checks: expected some of memcheck, racecheck, got 'speed'"),
    (["report", "none.json"], "none.json: cannot be read: No such file or directory"),
    (["report", "--check"], "check: expected --fill FILE.md beside it"),
    (["report", "--fill", "none.md", "--out", "page.html"], "fill: takes all results in the repository and writes no"),
    (["cost", "--gpus", "H200,RTX"], f"argument --gpus: expected some of {', '.join(CARDS)}, got 'RTX'"),
    (["memory", "--frames", "6", "--limit", "4GB,8GB"], "frames: expected 1 + 4n (5, 9, ... for 4), got 6; nearest: 5"),
    (["memory", "--preset", "small"], "preset: unknown 'small'; choose one of tiny, "),
    (["campaign"], "campaign: expected a CUDA device; --dry-run runs every part at toy size on a CPU"),
    (["campaign", "--save", "--dry-run"], "save: expected a run on a card, not a dry run"),
    (["campaign", "--parts", "csg,speed"], "argument --parts: expected some of operators, attention, dit, vae, csg, "),
    (["compare"], "the following arguments are required: FILE"),
]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command line, without a GPU and in an empty folder, and returns why it was refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.chdir(room)

    def run(*arguments: str) -> str:
        try:
            code = main(list(arguments))
        except SystemExit as error:  # argparse's own errors
            code = error.code
        printed = capsys.readouterr()
        assert code == 2, printed.out
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        # Results are in folders of out/, which may be there.
        assert [path for path in room.rglob("*") if path != room / "out"] == []
        return printed.err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_what_a_subcommand_cannot_take(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert refused(*arguments).startswith(message)


def test_every_subcommand_is_in_here() -> None:
    """A new subcommand belongs into the list of command lines that are refused."""
    assert set(benchmarks()) == {arguments[0] for arguments, _ in REFUSED}


def test_a_results_folder_that_cannot_be(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "results"
    message = refused("csg", "--device", "cpu", "--out", str(out))
    assert message == f"out: cannot make the directory {out}: Not a directory"
    assert (tmp_path / "file").read_text() == "mine"


def test_hardware_tests_without_pytest(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert refused("tests") == "pytest is not installed; run: pip install -e '.[test]'"
