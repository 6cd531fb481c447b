"""Subcommands of ``python -m bench`` are found by being written; what they all can do, and what their runs leave."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import bench
from bench.__main__ import build_parser, main
from bench.harness.registry import Benchmark, benchmarks, matches
from bench.harness.session import RESULT, _settings
from bench.records.read import ROOT, read_result
from tests.support.added_module import added_module
from tests.support.bench_session import read_section

WARMTH = """
from bench.harness.registry import Benchmark
from model.errors import InputError

def add_arguments(parser):
    parser.add_argument("--photo", default="/somewhere/of/mine/photo.jpg")
    parser.add_argument("--fail", default="")

def run(args, session):
    if args.fail == "early":
        raise InputError("fail: expected never, got early")
    table = session.section.table("rows", "warmth of rooms", identity=("room",), metrics=("seconds",))
    table.add({"room": "kitchen", "seconds": 1.5})
    session.say("measured the kitchen")
    if args.fail == "late":
        raise InputError("fail: expected never, got late")

BENCHMARK = Benchmark("warmth", "how warm it is", "Warmth.", "examples:\\n  python -m bench warmth", add_arguments, run,
                      title="Warmth")
"""


@pytest.fixture
def warmth(tmp_path: Path) -> Iterator[Path]:
    """A folder for results of a subcommand that is found as a file of its own."""
    with added_module(bench, tmp_path / "more", "command.py", WARMTH, benchmarks):
        yield tmp_path / "new" / "results"


def test_the_subcommands_are_those_of_the_documentation() -> None:
    lines = (ROOT / "docs" / "benchmarks.md").read_text().split("\n## ")[1].splitlines()
    named = [line.split("|")[1] for line in lines if line.startswith("| `")]
    assert sorted(benchmarks()) == sorted(name for text in named for name in re.findall(r"`(\w+)`", text))


def test_a_new_file_is_a_subcommand(warmth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is in the help, prints its table and leaves its file, which ``--json`` prints alone."""
    assert main(["warmth", "--out", str(warmth)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("measured the kitchen\n")
    assert "**warmth of rooms**" in out
    assert f"Results in {warmth}" in out
    section = read_result(warmth / RESULT)["sections"]["warmth"]
    assert (section["title"], section["status"]) == ("Warmth", "complete")
    assert "kitchen" in (warmth / "table.md").read_text()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "how warm it is" in capsys.readouterr().out
    assert main(["warmth", "--json", "--out", str(warmth)]) == 0
    assert capsys.readouterr().out == (warmth / RESULT).read_text()


def test_texts_match_names_that_contain_one_of_them() -> None:
    found = {texts: matches(texts, "sdpa-flash") for texts in ("", "flash", "flex | flash", "flex", "SDPA")}
    assert list(found.values()) == [True, True, True, False, False], found


@pytest.mark.parametrize("subject", benchmarks().values(), ids=lambda b: b.name)
def test_every_example_is_a_command_line_that_it_takes(subject: Benchmark) -> None:
    """The command of an example ends at two spaces, after which it says what it is for, or at a redirection."""
    parser, parsed = build_parser(), 0
    for line in subject.examples.splitlines():
        command = line.strip().split("  ")[0].split(" > ")[0]
        if not command.startswith("python -m bench"):
            continue
        words = shlex.split(command.removeprefix("python -m bench"))
        args = parser.parse_args(words if words and words[0] in benchmarks() else ["csg", *words])
        assert args.command == subject.name, line
        parsed += 1
    assert parsed >= 1
    assert subject.measure is None or subject.title


def test_an_unknown_subcommand_is_one_line_that_names_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["atention"])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: unknown subcommand 'atention'; expected one of {', '.join(benchmarks())}")
    assert error.count("\n") == 1


def test_settings_name_files_and_folders_by_their_last_part_only(warmth: Path) -> None:
    """A result file is published: it must not tell where somebody keeps things."""
    given = {"weights": Path("/data/wan/14b"), "relative": Path("some/file.json"), "frames": ("5", "21"), "shift": 5.0}
    hidden = {"command": "csg", "argv": ["csg"], "json": True, "out": Path("/home/somebody/out")}
    found = _settings(argparse.Namespace(**given, **hidden))
    assert found == {"weights": "14b", "relative": "some/file.json", "frames": "5,21", "shift": 5.0}
    json.dumps(found, allow_nan=False)
    assert main(["warmth", "--quick", "--out", str(warmth)]) == 0
    assert read_section(warmth)["settings"] == {"photo": "photo.jpg", "fail": "", "device": "auto", "quick": True}
    assert str(warmth) not in (warmth / RESULT).read_text()


def test_bad_input_is_one_line_and_takes_nothing_away(warmth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All is as it was where nothing was found, an earlier result too; else the file says how it ended."""
    assert main(["warmth", "--fail", "early", "--out", str(warmth)]) == 2
    assert capsys.readouterr().err == "error: fail: expected never, got early\n"
    assert not warmth.parent.exists()
    assert main(["warmth", "--out", str(warmth)]) == 0
    before = (warmth / RESULT).read_text()
    assert main(["warmth", "--fail", "early", "--out", str(warmth)]) == 2
    assert (warmth / RESULT).read_text() == before
    assert main(["warmth", "--fail", "late", "--out", str(warmth)]) == 2
    section = read_result(warmth / RESULT)["sections"]["warmth"]
    assert (section["status"], section["reason"]) == ("failed", "fail: expected never, got late")
