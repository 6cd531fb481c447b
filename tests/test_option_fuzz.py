"""Options of commands, drawn at random: whatever is given, a command answers at once and in few words."""

from __future__ import annotations

import argparse
import functools
import os
import random
import re
import shlex
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import bench.__main__
import bench.campaign.command
import bench.csg.whole
import bench.hardware.command
import bench.harness.interpreted
import bench.static.report
import model.generate
import model.inspect
import model.plan
from bench.harness.registry import benchmarks
from bench.harness.session import Session
from bench.records.write import Section
from model.errors import printable
from tests.support.result_samples import sample

#: Draws of one run, their seeds, and the seconds that an answer may take.
DRAWS, SECONDS = 1000, 10
#: Where real work begins in one of the commands: what stands there ends a draw, whose options are good, with 0.
WORK = (
    (model.generate, "plan_memory"), (model.plan, "plan_memory"),
    (bench.csg.whole, "plan_memory"), (Section, "table"), (Session, "ceilings"), (bench.static.report, "compile_all"),
    (bench.harness.interpreted.subprocess, "run"), (bench.campaign.command, "run_parts"),
)  # fmt: skip
NASTY = (
    "", " ", "0", "-1", "2", "7.5", "1000000000", 5000 * "9", "nan", "-inf", "1e308", "\u0663", "\uff12\uff15x\uff11",
    "a\0b", "\udcff", 100_000 * "x", "/", "..", "nowhere/at/all", "folder", "notes.txt", "notes.txt/clip.mp4",
    "photo.png", "clip.mp4", "result.json", "pipe", "2560x1408", "64x48", "0x0", f"{5000 * '9'}x64", "4GB",
    "0.0000001GB", f"{400 * '9'}GB", "auto", "tiny", "14b", "cpu", "cuda:7", "-", ",", "a,,b", "H200", "\x1b[2J",
    "%s {0} $(x)", "--out=-x", "7,25", "90", "meta", "*",
)  # fmt: skip


class Command(NamedTuple):
    """A command: its words, its function and its parser."""

    words: str
    main: Callable[[list[str]], int]
    parser: argparse.ArgumentParser


def commands() -> list[Command]:
    """Returns every command with its parser."""
    ours = (model.generate, model.plan, model.inspect)
    found = [Command(module.__name__, module.main, module.build_parser()) for module in ours]
    (subcommands,) = (a for a in bench.__main__.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(subcommands.choices) == set(benchmarks())
    for name, parser in subcommands.choices.items():
        found.append(Command(f"bench {name}", functools.partial(_bench, name), parser))
    return found


def _bench(name: str, argv: list[str]) -> int:
    return bench.__main__.main([name, *argv])


def examples(command: Command) -> list[list[str]]:
    """Returns the options of the command lines in a parser's examples, and none at all."""
    start, text = f"python -m {command.words}", re.sub(r"\\\n\s*", "", command.parser.epilog or "")
    # Files that there are: else no example would get further than their names.
    text = re.sub(r"\S+\.json\b", "result.json", re.sub(r"\S+\.jpe?g\b", "photo.png", text))
    lines = [line.strip().partition("    ")[0] for line in text.splitlines()]
    return [[], *(shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start))]


def drawn(command: Command, dice: random.Random) -> list[str]:
    """Returns a command line: an example's, or none, with some options that are good and some that are not."""
    argv = list(dice.choice(examples(command)))
    actions = [action for action in command.parser._actions if not isinstance(action, argparse._HelpAction)]
    for action in dice.sample(actions, k=min(len(actions), dice.choice((1, 1, 2, 3)))):
        values = [v for v in (*(action.choices or ()), action.default) if v not in (None, [], argparse.SUPPRESS)]
        value = str(dice.choice(values)) if values and dice.random() < 0.3 else dice.choice(NASTY)
        if not action.option_strings:
            argv.insert(0, value)
        elif action.nargs == 0:
            argv.append(action.option_strings[-1])
        else:
            argv.append(f"{action.option_strings[-1]}={value}")
    # Now and then with something that there is not.
    return [*argv, dice.choice(NASTY)] if dice.random() < 0.1 else argv


def answer(command: Command, argv: list[str]) -> Any:
    """Returns the exit code of a command line; a traceback, also of a late answer, is the code."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return command.main(argv)
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def furnish(room: Path, result: bytes) -> dict[str, bytes]:
    """Makes the files that values may name, ``result`` among them; returns what is in them."""
    for path in list(room.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Image.new("RGB", (96, 64)).save(room / "photo.png")
    (room / "result.json").write_bytes(result)
    os.mkfifo(room / "pipe")
    (room / "notes.txt").write_text("not what you seek\n")
    (room / "clip.mp4").write_bytes(b"mine")
    (room / "folder").mkdir()
    return contents(room)


def contents(room: Path) -> dict[str, bytes]:
    """Returns every file in the room and what is in it; folders have nothing."""
    return {str(p.relative_to(room)): p.read_bytes() if p.is_file() else b"" for p in sorted(room.rglob("*"))}


@pytest.mark.slow
def test_whatever_options_are_given_a_command_answers_at_once_and_in_few_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any options end with 0, 1 or 2 within 10 s, without a traceback, and what is refused leaves everything as it was.

    Options are read from the commands' parsers, so a new one is drawn without being listed. Nothing real is made:
    where planning a clip's memory, a table of a benchmark or another process would begin (:data:`WORK`), a draw ends.
    """

    def begun(*_: Any, **__: Any) -> None:
        raise SystemExit(0)

    result = sample(tmp_path / "result.json").read_bytes()
    for place, name in WORK:
        monkeypatch.setattr(place, name, begun)
    monkeypatch.setattr(bench.hardware.command, "collect", lambda: ["tests/gpu/test_device.py::test_a"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    found, faults, codes, before = commands(), [], set(), furnish(tmp_path, result)
    for seed in range(DRAWS):
        dice = random.Random(seed)
        (command,) = dice.choices(found, [len(one.parser._actions) for one in found])
        code = answer(command, drawn(command, dice))
        out, err = capsys.readouterr()
        codes.add(code)
        told_well = err.count("\n") <= 10 and len(err) <= 6000 and err == printable(err).replace("\\r", "\r")
        if code not in (0, 1, 2) or "Traceback" in out + err or not told_well:
            faults.append((seed, command.words, code, err[-600:]))
        if code == 2:
            left = contents(tmp_path).items() ^ before.items()
            faults += [(seed, "left", sorted(left))] if left else []
        else:
            before = furnish(tmp_path, result)
    assert not faults
    assert codes >= {0, 2}
