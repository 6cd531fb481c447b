"""Subcommands of ``python -m bench`` are found by being written; what they all can do, and what their runs leave."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import bench
from bench.__main__ import build_parser, main
from bench.harness.registry import Benchmark, benchmarks, matches
from bench.harness.session import RESULT, _settings
from bench.records.read import ROOT, read_result
from tests.support.added_module import added_module
from tests.support.bench_session import read_section
from tests.support.result_samples import sample

WARMTH = """
from bench.harness.registry import Benchmark
from model.errors import InputError

def add_arguments(parser):
    parser.add_argument("--photo", default="/somewhere/of/mine/photo.jpg")
    parser.add_argument("--fail", default="")

def run(args, session):
    if args.fail == "early":
        raise InputError("fail: expected never, got early")
    if args.fail == "early, with a file":
        (session.folder / "journal").write_text("work of an hour")
        raise InputError("fail: expected never, got early")
    table = session.section.table("rows", "warmth of rooms", identity=("room",), metrics=("seconds",))
    table.add({"room": "kitchen", "seconds": 1.5})
    session.say("measured the kitchen")
    if args.fail == "late":
        raise InputError("fail: expected never, got late")

BENCHMARK = Benchmark("warmth", "how warm it is", "Warmth.", "examples:\\n  python -m bench warmth", add_arguments, run,
                      title="Warmth")
"""
#: The subcommands in the table of docs/benchmarks.md.
NAMES = sorted(
    name
    for line in (ROOT / "docs" / "benchmarks.md").read_text().split("\n## ")[1].splitlines()
    if line.startswith("| `")
    for name in re.findall(r"`(\w+)`", line.split("|")[1])
)


def added(folder: Path, text: str) -> AbstractContextManager[None]:
    return added_module(bench, folder / "more", "command.py", text, benchmarks)


@pytest.fixture
def warmth(tmp_path: Path) -> Iterator[Path]:
    """A folder for results of a subcommand that is found as a file of its own."""
    with added(tmp_path, WARMTH):
        yield tmp_path / "results"


# What there is


def test_the_subcommands_are_those_of_the_documentation() -> None:
    assert sorted(benchmarks()) == NAMES
    assert [b.order for b in benchmarks().values()] == sorted(b.order for b in benchmarks().values())


def test_a_new_file_is_a_subcommand(warmth: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"bench.extra.command: expected BENCHMARK = Benchmark\(...\)"),
        ("BENCHMARK = 'warmth'", r"bench.extra.command: expected BENCHMARK = Benchmark\(...\)"),
        (WARMTH.replace("run,", "run, run,"), "bench.extra.command: expected either measure or run"),
        (WARMTH.replace("run,", "None,"), "bench.extra.command: expected either measure or run"),
    ],
    ids=["empty", "a text", "both", "neither"],
)
def test_a_file_without_a_benchmark_that_can_do_something_is_named(text: str, message: str, tmp_path: Path) -> None:
    with added(tmp_path, text), pytest.raises(TypeError, match=message):
        benchmarks()
    assert sorted(benchmarks()) == NAMES


@pytest.mark.parametrize(
    ("texts", "name", "expected"),
    [
        ("", "anything", True), ("sdpa", "sdpa-flash", True), ("flash", "sdpa-flash", True), ("flex", "sdpa", False),
        ("flex|flash", "sdpa-flash", True), ("flex | flash", "sdpa-flash", True), ("flex|cudnn", "sdpa-flash", False),
        ("SDPA", "sdpa-flash", False),
    ],
)  # fmt: skip
def test_texts_match_names_that_contain_one_of_them(texts: str, name: str, expected: bool) -> None:
    assert matches(texts, name) is expected


# What they all can do


@pytest.mark.parametrize("subject", benchmarks().values(), ids=lambda b: b.name)
def test_help_describes_and_has_examples(subject: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    """Every subcommand has the common options, and those that measure have more."""
    with pytest.raises(SystemExit) as done:
        main([subject.name, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  python -m bench" in text
    assert " ".join(subject.description.split()) in " ".join(text.split())
    shared = {"--quick", "--json", "--out"} | ({"--device", "--base"} if subject.measure is not None else set())
    assert {option for option in shared if f"{option} " in text} == shared
    assert subject.measure is None or subject.title


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


def test_an_unknown_subcommand_is_one_line_that_names_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["atention"])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown subcommand 'atention'; expected one of csg, ")
    assert error.count("\n") == 1
    assert all(name in error for name in NAMES)


# What a run leaves


def test_settings_name_files_and_folders_by_their_last_part_only() -> None:
    """A result file is published: it must not tell where somebody keeps things."""
    given = {
        "photo": "/home/somebody/photo.jpg", "weights": Path("/data/wan/14b"), "relative": Path("some/file.json"),
        "frames": "5,21", "repeats": 3, "shift": 5.0, "quick": True, "minutes": None,
    }  # fmt: skip
    hidden = {"command": "csg", "argv": ["csg"], "json": True, "out": Path("/home/somebody/out"), "base": "HEAD~1"}
    found = _settings(argparse.Namespace(**given, **hidden))
    assert found == given | {"photo": "photo.jpg", "weights": "14b", "relative": "some/file.json"}
    json.dumps(found, allow_nan=False)


def test_settings_are_in_the_file_and_paths_are_nowhere(warmth: Path) -> None:
    assert main(["warmth", "--quick", "--out", str(warmth)]) == 0
    assert read_section(warmth)["settings"] == {"photo": "photo.jpg", "fail": "", "device": "auto", "quick": True}
    assert "/somewhere/of/mine" not in (warmth / RESULT).read_text()
    assert str(warmth) not in (warmth / RESULT).read_text()


def test_json_is_the_file_and_nothing_else_is_printed(warmth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmth", "--json", "--out", str(warmth)]) == 0
    assert capsys.readouterr().out == (warmth / RESULT).read_text()


@pytest.mark.parametrize(
    ("fail", "prepare", "left"),
    [
        ("early", lambda folder: None, None),
        ("early", lambda folder: folder.mkdir(), []),
        ("early", lambda folder: sample(folder / RESULT), [RESULT]),
        ("early, with a file", lambda folder: None, ["journal", RESULT]),
        ("late", lambda folder: None, [RESULT]),
    ],
    ids=[
        "nothing measured",
        "a folder that was there",
        "an earlier result",
        "something was kept",
        "something measured",
    ],
)
def test_bad_input_is_one_line_and_takes_nothing_away(
    fail: str,
    prepare: Callable[[Path], None],
    left: list[str] | None,
    warmth: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All is as it was where nothing was found, an earlier result too; else the file says how it ended."""
    prepare(warmth)
    assert main(["warmth", "--fail", fail, "--out", str(warmth)]) == 2
    assert capsys.readouterr().err == f"error: fail: expected never, got {fail.split(',')[0]}\n"
    assert (sorted(path.name for path in warmth.iterdir()) if warmth.exists() else None) == left
    if fail == "early":
        assert not left or read_result(warmth / RESULT)["sections"].keys() == {"attention", "dit", "csg", "compile"}
    else:
        section = read_result(warmth / RESULT)["sections"]["warmth"]
        assert section["status"] == "failed"
        assert section["reason"].startswith("fail: expected never")
