"""Bad input to every subcommand: one line that says what was expected, exit code 2, and no folder that stays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.__main__ import build_parser, main
from bench.hardware import command as tests_command
from bench.harness.registry import Benchmark, benchmarks
from bench.static import command as compile_command
from swifti2v_kernels.common.cards import CARDS
from tests.support.result_samples import sample

ALL = list(benchmarks().values())
MEASURING = [benchmark for benchmark in ALL if benchmark.measure is not None]
#: What a command must be given besides.
NEEDED = {"compare": ["a.json", "b.json"]}
MEMORY = "{}: expected a size such as 12GB, 12GiB or 500MB, got '4 apples'"

REFUSED = [
    (["attention", "--shapes", "8K"], "shapes: no shape contains '8K'; the shapes are CSG window"),
    (["attention", "--update-table"], "update-table: expected a CUDA device, since the table holds measurements"),
    (
        ["precision", "--forms", "int4"],
        "forms: expected some of bfloat16, int8, float8, int8-matmul, float8-matmul, got 'int4'",
    ),
    (["attention", "--milliseconds", "0"], "argument --milliseconds: expected at least 1, got 0"),
    (["attention", "--only", "theirs"], "only: none contains 'theirs'; they are swifti2v"),
    (
        ["dit", "--quick", "--part", "layer", "--shapes", "2560x1408"],
        "shapes: no shape contains '2560x1408'",
    ),
    (["dit", "--ops", "fft"], "ops: no operator contains 'fft'; the operators are scaled_linear, "),
    (["dit", "--part", "attention"], "argument --part: invalid choice: 'attention'"),
    (["hosts", "--models", "Sora"], "models: expected a part of Wan, HunyuanVideo, padded text, LTX-Vid"),
    (["vae", "--shapes", "8K"], "shapes: none contains '8K'; they are 2.1, 360P, 81 frames; "),
    (["vae", "--only", "theirs"], "only: none contains 'theirs'; they are swifti2v; swifti2v, tiles; diffusers"),
    (["vae", "--limit", "4 apples"], MEMORY.format("limit")),
    (["vae", "--update-table"], "update-table: expected a CUDA device, since the table holds measurements"),
    (["vae", "--directions", "up"], "argument --directions: invalid choice: 'up'"),
    (["compile", "--targets", "90,75"], "targets: expected some of 80, 86, 89, 90, 100, 120, got '75'"),
    (["compile", "--cases", "fft"], "cases: no case contains 'fft'; the cases are "),
    (["compile", "--jobs", "none"], "argument --jobs: expected an integer of at least 1, got 'none'"),
    (["operators", "--cases", "fft"], "cases: no case contains 'fft'; the cases are "),
    (["tests", "--jobs", "0"], "argument --jobs: expected at least 1, got 0"),
    (["tune", "--minutes", "0"], "argument --minutes: expected at least 0.01, got 0"),
    (["tune", "--from", "none.json"], "none.json: cannot be read: No such file or directory"),
    (["csg", "nowhere.jpg"], "image: nowhere.jpg does not exist"),
    (["csg", "--frames", "5,x"], "frames: expected numbers separated by commas, got '5,x'"),
    (["csg", "--frames", "6"], "frames: expected 1 + 4n (5, 9, ... for 4), got 6; nearest: 5"),
    (["csg", "--size", "100x100"], "size: width and height must be multiples of 16, got 100x100; nearest: 96x96"),
    (["csg", "--whole", "--extrapolate"], "whole, extrapolate: expected one of them"),
    (["csg", "--weights", "none"], "weights: none does not exist"),
    (["csg", "--vae-memory", "4 apples"], MEMORY.format("vae-memory")),
    (["csg", "--shift", "-1"], "argument --shift: expected at least 0.001, got -1"),
    (["csg", "--minutes", "nan"], "argument --minutes: expected a number from 0.01 to 10000, got 'nan'"),
    (["csg", "--repeats", "1" + 9 * "0"], "argument --repeats: expected at most 1000"),
    # Also where a run on a CPU has no use for them.
    (["csg", "--models", "2b,,14b"], "argument --models: expected some of 1.3b, 5b, 14b, got '2b', ''"),
    (["csg", "--out", ""], "argument --out: expected a name, got ''"),
    (["csg", "--base=-n\x00"], "base: expected a revision of this git checkout, got '-n\\x00'"),
    (
        ["csg", "--extrapolate", "--frames", "21,41"],
        "frames: expected one number, 1 + 4n and at least 17, for the table of sizes; got '21,41'",
    ),
    (
        ["sanitize", "--checks", "memcheck,speed"],
        "argument --checks: expected some of memcheck, racecheck, got 'speed'",
    ),
    (["report", "none.json"], "none.json: cannot be read: No such file or directory"),
    (["report", "--check"], "check: expected --fill FILE.md beside it"),
    (["report", "--fill", "none.md"], "none.md: cannot be read: No such file or directory"),
    (
        ["report", "--fill", "none.md", "--out", "page.html"],
        "fill: takes all results in the repository and writes no page; leave result files, --out and --quick out",
    ),
    (["report", "--fill", "none.md", "--quick"], "fill: takes all results in the repository"),
    (["report", "--fill", "none.md", "none.json"], "fill: takes all results in the repository"),
    (["cost", "--gpus", "H300"], f"gpus: expected some of {', '.join(CARDS)}, got 'H300'"),
    (["cost", "--gpus", "H200,RTX"], f"gpus: expected some of {', '.join(CARDS)}, got 'RTX'"),  # there are several
    (["cost", "--steps", "8", "--size", "64x48"], "preset: expected one with height, steps, width"),
    (["cost", "--profile", "fast"], "profile: unknown 'fast'; choose one of reference, "),
    (["cost", "--preset", "tiny", "--size", "wide"], "size: expected WIDTHxHEIGHT such as 2560x1408, got 'wide'"),
    (["cost", "--preset", "tiny", "--left", "-1"], "argument --left: expected at least 0, got -1"),
    (
        ["cost", "--preset", "end-to-end", "--mode", "causal", "--stage1-steps", "4"],
        "preset: end-to-end is one stage in one window, without stage1-steps, mode",
    ),
    (["memory", "--capability", "77"], "argument --capability: invalid choice: 77 (choose from 80, "),
    (["memory", "--limit", "foo"], "limit: expected a size such as 12GB, 12GiB or 500MB, got 'foo'"),
    (
        ["memory", "--size", "100x100", "--limit", "4GB,8GB"],
        "size: width and height must be multiples of 16, got 100x100",
    ),
    (["memory", "--size", "large"], "size: expected WIDTHxHEIGHT such as 2560x1408, got 'large'"),
    (["memory", "--frames", "6", "--limit", "4GB,8GB"], "frames: expected 1 + 4n (5, 9, ... for 4), got 6; nearest: 5"),
    (["memory", "--frames", "0"], "argument --frames: expected at least 1, got 0"),
    (["memory", "--preset", "small"], "preset: unknown 'small'; choose one of tiny, "),
    (["memory", "--mode", "both"], "argument --mode: invalid choice: 'both'"),
    (
        ["tune", "--kernels", "nothing like it"],
        "kernels: nothing contains 'nothing like it'; there are: causal_conv3d ",
    ),
    (["tune", "--capability", 5000 * "9"], "argument --capability: expected at most 999"),
    (["campaign"], "campaign: expected a CUDA device; --dry-run runs every part at toy size on a CPU"),
    (["campaign", "--save", "--dry-run"], "save: expected a run on a card, not a dry run"),
    (
        ["campaign", "--parts", "csg,speed"],
        "parts: expected some of operators, attention, dit, vae, csg, clip, memory, ",
    ),
    (["compare"], "the following arguments are required: FILE"),
    (["compare", "a.json", "b.json"], "a.json: cannot be read: No such file or directory"),
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


# What all of them refuse alike


@pytest.mark.parametrize("subject", ALL, ids=lambda b: b.name)
def test_an_option_that_there_is_not(subject: Benchmark, refused: Callable[..., str]) -> None:
    message = refused(subject.name, *NEEDED.get(subject.name, ()), "--nonsense")
    assert message.startswith("unrecognized arguments: --nonsense")
    # Abbreviations are none either: --base must find itself on the command line.
    assert refused(subject.name, *NEEDED.get(subject.name, ()), "--ou", "x").startswith("unrecognized arguments")


@pytest.mark.parametrize("subject", MEASURING, ids=lambda b: b.name)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
        (["--device", "cuda"], "device: cuda was asked for, but torch sees no GPU"),
        (["--base", "no such revision"], "base: 'no such revision' is no revision of this git checkout"),
    ],
    ids=["device", "no GPU", "revision"],
)
def test_a_device_or_a_revision_that_there_is_not(
    options: list[str], message: str, subject: Benchmark, refused: Callable[..., str]
) -> None:
    assert refused(subject.name, *options) == message


@pytest.mark.parametrize("subject", MEASURING, ids=lambda b: b.name)
def test_a_results_folder_that_cannot_be(subject: Benchmark, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "results"
    message = refused(subject.name, "--device", "cpu", "--out", str(out))
    assert message == f"out: cannot make the directory {out}: Not a directory"
    assert (tmp_path / "file").read_text() == "mine"


# What each of them refuses


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_what_a_subcommand_cannot_take(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert refused(*arguments).startswith(message)


def test_every_subcommand_is_in_here() -> None:
    """A new subcommand belongs into the list of command lines that are refused."""
    assert {benchmark.name for benchmark in ALL} == {arguments[0] for arguments, _ in REFUSED}


def test_hardware_tests_of_which_none_is_meant(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tests_command, "collect", lambda: ["tests/gpu/test_device.py::test_a", "tests/gpu/test_device.py::test_b"]
    )
    assert refused("tests", "--tests", "fft") == "tests: none of 2 hardware tests contains 'fft'"


def test_a_report_that_is_not_up_to_date_is_named_and_left_as_it_is(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    text = "<!-- results: nvidia-h200 attention/attention columns=shape -->\nold\n<!-- end of results -->\n"
    page.write_text(text)
    sample(tmp_path / "results" / "nvidia-h200" / "a.json")
    monkeypatch.setattr("bench.report.command.shipped_results", lambda: [tmp_path / "results/nvidia-h200/a.json"])
    message = refused("report", "--fill", str(page), "--check")
    assert message.startswith(f"fill: {page}, line 2: is not what the results give; run python -m bench report --fill")
    assert page.read_text() == text


def test_targets_that_are_named_twice_are_compiled_once() -> None:
    args = build_parser().parse_args(["compile", "--targets", "90, 89,90", "--cases", "merge_attention d64"])
    targets, cases = compile_command._select(args)
    assert targets == [90, 89]
    assert len(cases) == len(set(cases)) >= 1


def test_hardware_tests_without_pytest(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert refused("tests") == "pytest is not installed; run: pip install -e '.[test]'"
