"""The campaign's parts can be called as they are written; its command, its saved file, and hardware tests as rows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.__main__ import build_parser, main
from bench.attention.providers import providers
from bench.campaign import command as campaign
from bench.campaign import run
from bench.campaign.parts import PARTS, WINDOW
from bench.csg.setups import setups
from bench.dit.layer import LAYER_PROVIDERS
from bench.dit.shapes import SHAPES as DIT_SHAPES
from bench.hardware import lost_device
from bench.hardware import tests as hardware_tests
from bench.hardware.tests import RETRIES, read_junit, run_tests
from bench.harness.registry import matches
from bench.harness.session import RESULT
from bench.records.read import read_result
from bench.vae.shapes import SHAPES as VAE_SHAPES
from model.config import get_preset
from model.machine.measure import parse_bytes
from tests.support.bench_session import leave_result, new_table
from tests.support.memory_requests import GB
from tests.support.result_samples import environment

COMPILE = "torch.compile"
H200_FILE = Path("nvidia-h200") / f"2026-11-26-{'a' * 7}.json"
#: pytest, of which one test a process ends well; ``never`` ends the process at once, ``stop`` as by Ctrl+C.
STAND_IN = """#!{python} -SsE
import sys
path = next(a for a in sys.argv if a.startswith("--junitxml=")).removeprefix("--junitxml=")
name = next(a for a in sys.argv if a.startswith("tests/"))
if "never" not in name:
    file, test = name.split(".py::")
    case = f'<testcase classname="{{file.replace("/", ".")}}" name="{{test}}" time="0.5"/>'
    open(path, "w").write(f"<testsuites><testsuite>{{case}}</testsuite></testsuites>")
sys.exit(2 if "stop" in name else 3)
"""


# Parts


def test_parts_are_command_lines_and_what_they_choose_by_name_is_there() -> None:
    """Every name that a part chooses on a card exists: a renamed shape would leave the part empty. CI runs the toys."""
    parser, args = build_parser(), {}
    for part in PARTS:
        args[part.name], toy = (parser.parse_args(shlex.split(line)) for line in (part.command, part.toy))
        assert args[part.name].command == toy.command
    peers = [peer.name for peer in providers(False) if not peer.ours]
    decoded = ["2.1, 2K, 81 frames", "2.2, 2K, 81 frames"]
    for name, option, known, chosen in (
        ("attention", "only", peers, ["sdpa-cudnn", "sdpa-flash"]),
        ("dit", "only", [p.name for p in LAYER_PROVIDERS], [p.name for p in LAYER_PROVIDERS if COMPILE in p.name]),
        ("dit", "shapes", [shape.name for shape in DIT_SHAPES], [f"{WINDOW}, 1.3B", f"{WINDOW}, 5B"]),
        ("vae", "shapes", [str(shape) for shape in VAE_SHAPES], decoded[:1]),
        ("layers", "shapes", [str(shape) for shape in VAE_SHAPES], decoded),
    ):
        assert [text for text in known if matches(getattr(args[name], option), text)] == chosen != [], name
    assert setups(args["csg"].models, args["csg"].sizes, 81, 4)
    assert get_preset(args["clip"].preset).stage_one.num_layers == 40
    assert [parse_bytes("limit", text) for text in args["memory"].limit.split(",")] == [24 * GB, 16 * GB, 12 * GB]


def test_the_parts_before_the_whole_clip_are_within_nine_minutes_even_if_each_takes_all_its_time() -> None:
    """Later parts are reached where earlier ones take less, as they do, or in a second campaign."""
    names = [part.name for part in PARTS]
    before = PARTS[: names.index("clip")]
    assert [part.name for part in before] == ["operators", "attention", "dit", "vae", "csg"]
    assert sum(part.seconds for part in before) <= 540 - run.GRACE * len(before)
    for name in ("csg", "tune"):  # what it measures at most, and a little for what is begun by then
        (part,) = [part for part in PARTS if part.name == name]
        assert 60 * build_parser().parse_args(shlex.split(part.command)).minutes < part.seconds
    assert "--no-write" in part.command  # a campaign leaves the tree as it is


# The command


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine that says it is an H200, and where its results are shipped."""
    monkeypatch.setattr(campaign, "pick_device", lambda name: torch.device("cuda" if name == "auto" else name))
    monkeypatch.setattr(campaign, "capture", lambda device: environment())
    monkeypatch.setattr(campaign, "SHIPPED", tmp_path / "results")
    return tmp_path / "results"


def test_a_campaign_leaves_a_valid_file_its_tables_and_a_copy_under_card_date_and_commit(
    card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts run in the order of their value, whatever the order that they are named in; JSON is the file."""
    monkeypatch.setattr(run, "_run", lambda part, folder, dry, seconds: leave_result(folder, "complete", 1))
    out = tmp_path / "out"
    assert main(["campaign", "--parts", "dit, attention,dit", "--save", "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == (out / RESULT).read_text() == (card / H200_FILE).read_text()
    assert f"copied to {card / H200_FILE}" in printed.err
    assert list(read_result(card / H200_FILE)["sections"]) == ["attention", "dit"]
    assert re.findall(r"## (\w+)\n\n\*\*rows\*\*", (out / "table.md").read_text()) == ["attention", "dit"]


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--dry-run"], 2)])
def test_a_part_that_fails_is_an_error_of_a_dry_run_only(
    options: list[str], code: int, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A campaign on a card ends well all the same, since the other parts have results."""
    monkeypatch.setattr(run, "_run", lambda part, folder, dry, seconds: "exit code 1: error: cannot begin")
    assert main(["campaign", "--parts", "dit", *options, "--out", str(tmp_path / "out")]) == code
    printed = capsys.readouterr()
    message = f"failed: dit; see {tmp_path / 'out'}/NAME/log.txt\n"
    assert printed.err == ("" if code == 0 else f"error: {message}")
    assert message in printed.out + printed.err
    assert read_result(tmp_path / "out" / RESULT)["sections"]["dit"]["reason"] == "exit code 1: error: cannot begin"


# The hardware tests


def test_what_pytest_reports_becomes_rows(tmp_path: Path) -> None:
    """The rows of a report that pytest itself has written have the names that pytest takes."""
    room = tmp_path / "tests"
    room.mkdir()
    (room / "test_room.py").write_text("""
import pytest
@pytest.fixture
def broken(): raise OSError("no heating")
def test_warm(): pass
@pytest.mark.parametrize("n", ["a b", "[0]", "1.5"])
def test_cold(n): assert n == "a b", "it is\\n  cold"
@pytest.mark.skip(reason="no window")
def test_open(): pass
def test_heated(broken): pass
""")
    path = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}"]
    subprocess.run([*command, "--rootdir", str(tmp_path), "tests"], cwd=tmp_path, capture_output=True, check=False)
    rows = {str(row["test"]).removeprefix("tests/test_room.py::"): row for row in read_junit(path)}
    names = ("test_warm", "test_cold[a b]", "test_cold[[0]]", "test_cold[1.5]", "test_open", "test_heated")
    assert tuple(rows) == names
    assert [row.get("status", "ok") for row in rows.values()] == ["ok", "ok", "failed", "failed", "skipped", "failed"]
    assert rows["test_open"]["reason"] == "no window"
    assert str(rows["test_cold[1.5]"]["reason"]).startswith("AssertionError: it is cold assert '1.5' == 'a b'")
    assert "no heating" in str(rows["test_heated"]["reason"])
    assert all(isinstance(row["seconds"], float) for row in rows.values())
    for row in rows.values():
        new_table(tmp_path, ("test",), ("seconds",)).add(row)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hardware tests run in ``STAND_IN`` instead of pytest."""
    script = tmp_path / "stand-in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(hardware_tests, "sys", SimpleNamespace(executable=str(script)))


def test_after_an_interruption_nothing_is_begun_anew_and_what_was_found_is_kept(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(jobs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hardware_tests, "as_completed", interrupted)
    table = new_table(tmp_path, ("test",), ("seconds",))
    with pytest.raises(KeyboardInterrupt):
        run_tests(["tests/test_a.py::stop", "tests/test_a.py::more"], 1, tmp_path, table)
    assert [(row["test"][-4:], row["status"]) for row in table.rows] == [("stop", "ok"), ("more", "not reached")]


def test_what_is_left_to_a_process_that_ended_goes_on_in_new_ones(stand_in: None, tmp_path: Path) -> None:
    """Every test is in one row, and one that ends its process each time is not reached."""
    names = ["tests/test_a.py::one", "tests/test_a.py::never", "tests/test_a.py::two", "tests/test_a.py::three"]
    table = new_table(tmp_path, ("test",), ("seconds",))
    run_tests(names, 2, tmp_path, table)
    assert len(table.rows) == len(names)
    rows = {row["test"]: row for row in table.rows}
    assert {name: row["status"] for name, row in rows.items()} == {
        name: "not reached" if "never" in name else "ok" for name in names
    }
    assert rows["tests/test_a.py::never"]["reason"] == f"process ended {RETRIES + 1} times"
    assert rows["tests/test_a.py::three"]["seconds"] == 0.5  # which had come after it


def test_the_session_ends_with_the_device_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    lost_device.pytest_runtest_logfinish("tests/test_a.py::one")  # nothing has used it
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(pytest.exit.Exception, match=r"the device is lost after tests/test_a\.py::two") as caught:
        lost_device.pytest_runtest_logfinish("tests/test_a.py::two")
    assert caught.value.returncode == 3
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    lost_device.pytest_runtest_logfinish("tests/test_a.py::three")
