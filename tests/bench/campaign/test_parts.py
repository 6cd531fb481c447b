"""The campaign's parts can be called as they are written; its command, its saved file, and hardware tests as rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
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
from bench.campaign.parts import PARTS, QUICK, WINDOW, Part, chosen
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
from bench.records.write import Record
from bench.vae.providers import PROVIDERS as VAE_PROVIDERS
from bench.vae.shapes import QUICK_SHAPES as QUICK_VAE
from bench.vae.shapes import SHAPES as VAE_SHAPES
from model.cli.options import parse_size
from model.config import get_preset
from model.errors import InputError
from model.machine.measure import parse_bytes
from model.sizes import check_frames, check_size
from tests.support.bench_session import new_table
from tests.support.result_samples import environment

H200_FILE = Path("nvidia-h200") / f"2026-11-26-{'a' * 7}.json"
#: pytest, of which one test a process ends well; ``never`` ends the process at once.
STAND_IN = """#!{python} -SsE
import sys
path = next(a for a in sys.argv if a.startswith("--junitxml=")).removeprefix("--junitxml=")
name = next(a for a in sys.argv if a.startswith("tests/"))
if "never" not in name:
    file, test = name.split(".py::")
    case = f'<testcase classname="{{file.replace("/", ".")}}" name="{{test}}" time="0.5"/>'
    open(path, "w").write(f"<testsuites><testsuite>{{case}}</testsuite></testsuites>")
sys.exit(3)
"""


# Parts


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_is_a_command_line_that_its_command_takes(part: Part, tmp_path: Path) -> None:
    """The parser takes each part together with what the campaign adds to it, on a card and in a dry run."""
    parser, out = build_parser(), ["--out", str(tmp_path)]
    for arguments in ([*part.arguments, *out], [*part.toy, *out, "--device", "cpu"]):
        args = parser.parse_args(arguments)
        assert args.command == arguments[0]
        assert args.out == tmp_path
    assert part.toy[0] == part.arguments[0]  # a dry run tries the same command


def test_what_parts_choose_by_name_is_there() -> None:
    """Every name that a part chooses exists; a renamed shape or implementation would leave the part empty or wrong."""
    parser = build_parser()
    args = {(p.name, i): parser.parse_args(list(a)) for p in PARTS for i, a in enumerate((p.arguments, p.toy))}
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
    # What it measures at most, and a minute for what is begun by then.
    csg = build_parser().parse_args(list(PARTS[names.index("csg")].arguments))
    assert 60 * csg.minutes < PARTS[names.index("csg")].seconds
    tune = build_parser().parse_args(list(PARTS[names.index("tune")].arguments))
    assert 60 * tune.minutes < PARTS[names.index("tune")].seconds
    assert not tune.write  # a campaign leaves the tree as it is


def test_parts_are_chosen_by_name_and_run_in_the_order_of_their_value() -> None:
    assert chosen(None) == list(PARTS)
    assert [part.name for part in chosen("csg, operators,csg")] == ["operators", "csg"]
    for text, wrong in (("csg,speed,power", "speed, power"), ("", "")):
        with pytest.raises(InputError) as caught:
            chosen(text)
        names = "operators, attention, dit, vae, csg, clip, memory, layers, tune, tests, sanitize"
        assert str(caught.value) == f"parts: expected some of {names}, got {wrong}"
    assert len({part.name for part in PARTS}) == len(PARTS)


# The command


def fake_run(status: str) -> Any:
    def one(part: Part, folder: Path, dry: bool, seconds: float) -> str | None:
        if status == "nothing":
            return "exit code 1: error: cannot begin"
        folder.mkdir(parents=True)
        with Record(folder / RESULT, environment()).section(part.name, part.answers, {}) as section:
            table = section.table("rows", "rows of it", identity=("room",), metrics=("seconds",))
            table.add({"room": "kitchen", "seconds": 1.0})
            if status == "by hand":
                raise KeyboardInterrupt
        return None

    return one


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
    monkeypatch.setattr(run, "_run", fake_run("well"))
    assert main(["campaign", "--parts", "attention,dit", "--save", "--out", str(tmp_path / "out")]) == 0
    assert (card / H200_FILE).read_text() == (tmp_path / "out" / RESULT).read_text()
    assert list(read_result(card / H200_FILE)["sections"]) == ["attention", "dit"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.index("## attention\n\n**rows of it**") < text.index("## dit\n\n**rows of it**")
    assert f"copied to {card / H200_FILE}" in capsys.readouterr().out


def test_quick_is_the_kernels_alone_and_json_is_the_file(
    card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_run", fake_run("well"))
    assert main(["campaign", "--quick", "--json", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "out" / RESULT).read_text()
    assert list(json.loads(printed.out)["sections"]) == list(QUICK) == ["operators", "attention", "dit"]
    assert "results in" in printed.err
    assert main(["campaign", "--quick", "--parts", "csg", "--out", str(tmp_path / "other")]) == 0
    assert list(read_result(tmp_path / "other" / RESULT)["sections"]) == ["csg"]
    # In the four minutes that it has by default there is room for all three.
    assert sum(part.seconds for part in chosen(",".join(QUICK))) <= 4 * 60


def test_a_campaign_that_is_interrupted_by_hand_is_written_and_copied_too(
    card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_run", fake_run("by hand"))
    assert main(["campaign", "--parts", "attention,dit", "--save", "--out", str(tmp_path / "out")]) == 130
    ((name, section),) = read_result(card / H200_FILE)["sections"].items()
    assert (name, section["status"]) == ("attention", "interrupted")
    assert "kitchen" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--dry-run"], 2)])
def test_a_part_that_fails_is_an_error_of_a_dry_run_only(
    options: list[str], code: int, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A campaign on a card ends well all the same, since the other parts have results."""
    monkeypatch.setattr(run, "_run", fake_run("nothing"))
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


def test_a_report_that_was_not_written_or_is_cut_off_has_no_rows(tmp_path: Path) -> None:
    assert read_junit(tmp_path / "none.xml") == []
    (tmp_path / "cut.xml").write_text('<testsuites><testsuite><testcase name="a"')
    assert read_junit(tmp_path / "cut.xml") == []


def test_what_is_left_to_a_process_that_ended_goes_on_in_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every test is in one row, and one that ends its process each time is not reached."""
    script = tmp_path / "stand-in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(hardware_tests, "sys", SimpleNamespace(executable=str(script)))
    names = ["tests/test_a.py::one", "tests/test_a.py::never", "tests/test_a.py::two", "tests/test_a.py::three"]
    table = new_table(tmp_path, ("test",), ("seconds",))
    yielded = list(run_tests(names, 2, tmp_path, table))
    assert Counter(yielded) == Counter(names)
    rows = {row["test"]: row for row in table.rows}
    assert {name: row["status"] for name, row in rows.items()} == {
        name: "not reached" if "never" in name else "ok" for name in names
    }
    assert rows["tests/test_a.py::never"]["reason"] == f"process ended {RETRIES + 1} times"
    assert rows["tests/test_a.py::three"]["seconds"] == 0.5  # which had come after it


def test_the_session_ends_with_the_device_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []

    def synchronize() -> None:
        if lost:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    lost.append("the device")
    lost_device.pytest_runtest_logfinish("tests/test_a.py::one")  # nothing has used it
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(pytest.exit.Exception, match=r"the device is lost after tests/test_a\.py::two") as caught:
        lost_device.pytest_runtest_logfinish("tests/test_a.py::two")
    assert caught.value.returncode == 3
    lost.clear()
    lost_device.pytest_runtest_logfinish("tests/test_a.py::three")
