"""The campaign's parts can be called as they are written; its command, its saved file, and hardware tests as rows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.__main__ import build_parser, main
from bench.attention.providers import QUICK_SHAPES as QUICK_ATTENTION
from bench.attention.providers import providers
from bench.campaign import command as campaign
from bench.campaign import run
from bench.campaign.parts import PARTS, QUICK, WINDOW
from bench.csg.setups import setups
from bench.dit.command import compared_cases
from bench.dit.layer import LAYER_PROVIDERS
from bench.dit.shapes import SHAPES as DIT_SHAPES
from bench.hardware import lost_device
from bench.hardware import tests as hardware_tests
from bench.hardware.tests import RETRIES, read_junit, run_tests
from bench.harness.registry import matches
from bench.harness.session import RESULT
from bench.operators.discover import all_cases
from bench.records.read import ROOT, read_result
from bench.vae.providers import PROVIDERS as VAE_PROVIDERS
from bench.vae.shapes import QUICK_SHAPES as QUICK_VAE
from bench.vae.shapes import SHAPES as VAE_SHAPES
from model.cli.options import parse_size
from model.config import get_preset
from model.machine.measure import parse_bytes
from model.sizes import check_frames, check_size
from tests.support.bench_session import leave_result, new_table
from tests.support.result_samples import environment

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
    """Every name that a part chooses exists; a renamed shape or implementation would leave the part empty or wrong."""
    parser, more = build_parser(), ["--out", "folder", "--device", "cpu"]
    args = {
        (part.name, i): parser.parse_args([*shlex.split(line), *more])
        for part in PARTS
        for i, line in enumerate((part.command, part.toy))
    }
    assert all(args[part.name, 0].command == args[part.name, 1].command for part in PARTS)
    attention = [p.name for p in providers(False) if matches(args["attention", 0].only, p.name) and not p.ours]
    assert attention == ["sdpa-cudnn", "sdpa-flash"]
    assert any(args["attention", 1].shapes in shape.name for shape in QUICK_ATTENTION)
    assert args["dit", 0].shapes == WINDOW
    assert [shape.name for shape in DIT_SHAPES if WINDOW in shape.name] == [
        f"{WINDOW}, 1.3B", f"{WINDOW}, 5B",
    ]  # fmt: skip
    assert any(matches(args["dit", 0].only, p.name) for p in LAYER_PROVIDERS if not p.ours)
    assert any(args["dit", 1].ops in case.name for case in compared_cases())
    assert [str(s) for s in VAE_SHAPES if args["vae", 0].shapes in str(s)] == ["2.1, 2K, 81 frames"]
    assert any(args["vae", 1].shapes in str(s) for s in QUICK_VAE)
    assert any(matches(args["vae", 1].only, p.name) for p in VAE_PROVIDERS)
    assert [str(s) for s in VAE_SHAPES if args["layers", 0].shapes in str(s)] == [
        "2.1, 2K, 81 frames", "2.2, 2K, 81 frames",
    ]  # fmt: skip
    assert any(args["operators", 1].cases in case.name for case in all_cases())
    assert any(args["tune", 1].kernels in case.name for case in all_cases() if case.real is not None)
    for number in range(2):
        found = args["csg", number]
        assert setups(found.models, found.sizes, 81, 4)
        for name in ("clip", "memory"):
            found = args[name, number]
            get_preset(found.preset or "1.3b")
            check_frames(found.frames or 25)
            check_size(*parse_size(found.size or "2560x1408"), 16)
            assert all(parse_bytes("limit", text) for text in (found.limit or "1GB").split(","))


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
    assert main(["campaign", "--quick", "--out", str(out)]) == 0
    assert sorted(read_result(out / RESULT)["sections"]) == sorted(QUICK)


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


@pytest.mark.slow
def test_the_hardware_tests_import_no_package_that_a_rented_machine_lacks() -> None:
    """The hardware tests are collected with no more than what docs/benchmarks.md lists for a campaign."""
    text = (ROOT / "docs" / "benchmarks.md").read_text().split("needs a plain checkout, not installed, and `")[1]
    # torch brings jinja2 along.
    there = {*text.split("`")[0].split(), "jinja2"}
    extras = {re.split(r"[^\w-]", line)[0] for line in requires("swifti2v") or () if "extra ==" in line}
    absent = {name.replace("-", "_") for name in extras - there}
    assert {"safetensors", "diffusers", "av"} <= absent
    blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)})); import pytest; sys.exit(pytest.main())"
    files = sorted(str(path) for path in (ROOT / "tests").glob(hardware_tests.HARDWARE))
    command = [sys.executable, "-c", blocked, "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]


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
