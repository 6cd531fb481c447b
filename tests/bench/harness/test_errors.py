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
    (["attention", "--shapes", "8K"], "shapes: none contains '8K'; they are CSG window"),
    (["attention", "--milliseconds", "0"], "argument --milliseconds: expected an integer from 1 to 60000, got '0'"),
    (["attention", "--only", "theirs"], "only: none contains 'theirs'; they are swifti2v"),
    (["attention", "--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
    (["attention", "--device", "cuda"], "device: cuda was asked for, but torch sees no GPU"),
    # An abbreviation is no option.
    (["attention", "--ou", "x"], "unrecognized arguments: --ou x"),
    (["precision", "--preset", "tiny", "--layers", "3"], "layers: expected at most 2, those of tiny, got 3"),
    (["precision", "--size", "100x100"], "size: width and height must be multiples of 16, got 100x100; nearest: 96x96"),
    (["precision", "--weights", "none"], "weights: none does not exist"),
    (["precision", "--weights", "none", "--layers", "2"], "layers: expected nothing beside --weights, whose DiT is"),
    (["dit", "--quick", "--part", "layer", "--shapes", "2560x1408"], "shapes: none contains '2560x1408'; they are "),
    (["dit", "--ops", "fft"], "ops: none contains 'fft'; they are scaled_linear "),
    (["vae", "--shapes", "8K"], "shapes: none contains '8K'; they are 2.1, 360P, 81 frames; "),
    (["vae", "--limit", "4 apples"], "limit: expected a size such as 12GB, 12GiB or 500MB, got '4 apples'"),
    (["compile", "--targets", "90,75"], "argument --targets: expected some of 80, 86, 89, 90, 100, 120, got '75'"),
    (["compile", "--cases", "fft"], "cases: none contains 'fft'; they are "),
    (["operators", "--cases", "fft"], "cases: none contains 'fft'; they are "),
    (["tests", "--jobs", "0"], "argument --jobs: expected an integer from 1 to 256, got '0'"),
    (["tune", "--kernels", "nothing like it"], "kernels: none contains 'nothing like it'; they are "),
    (["csg", "nowhere.jpg"], "image: nowhere.jpg does not exist"),
    (["csg", "--frames", "6"], "frames: expected 1 + 4n (5, 9, ... for 4), got 6; nearest: 5"),
    (["csg", "--size", "100x100"], "size: width and height must be multiples of 16, got 100x100; nearest: 96x96"),
    (["csg", "--whole", "--extrapolate"], "whole, extrapolate: expected one of them"),
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
    (["compare"], "the following arguments are required: FILE"),
]


#: What a subcommand that needs a GPU says without one, and ends well.
WITHOUT_GPU = [
    (["attention", "--quick"], "no CUDA device: nothing is timed; python -m bench operators"),
    (["dit", "--quick"], "no CUDA device: nothing is timed; python -m bench operators"),
    (["sanitize", "--cases", "frames_out"], "3 cases need a GPU and compute-sanitizer"),
    (["tune", "--kernels", "rms_norm_silu"], " kernels and shapes need a GPU to be tuned"),
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


@pytest.mark.parametrize(("arguments", "message"), WITHOUT_GPU, ids=[arguments[0] for arguments, _ in WITHOUT_GPU])
def test_without_a_gpu_it_says_what_it_leaves_undone(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert message in capsys.readouterr().out


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
