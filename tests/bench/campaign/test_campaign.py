"""The campaign: what it keeps of parts that end well, crash, take too long, are interrupted, or are tried again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.campaign import run as campaign
from bench.campaign.parts import Part
from bench.campaign.run import run_parts
from bench.harness.session import RESULT
from bench.records.read import read_result
from bench.records.write import Record
from tests.support.result_samples import environment

#: In the place of ``python -m bench``: how it ends is its first argument.
STAND_IN = """#!{python} -SsE
import json, os, pathlib, signal, subprocess, sys, time

how, folder = sys.argv[3], pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(folder / "argv.json").write_text(json.dumps(sys.argv[1:]))

def write(status, reason=None):
    row = {{"room": "kitchen", "seconds": 1.0, "status": "ok", "basis": "measured"}}
    metric = {{"label": "time", "unit": "s", "better": "lower"}}
    table = {{"name": "rows", "title": "rows", "identity": ["room"], "metrics": {{"seconds": metric}}, "rows": [row]}}
    section = {{"title": how, "status": status, "reason": reason, "tables": [table], "timelines": [], "verdicts": []}}
    file = {{"sections": {{how: section | {{"notes": [], "settings": {{}}}}}}}}
    (folder / "new").write_text(json.dumps(file))
    (folder / "new").replace(folder / "result.json")

if how == "well":
    write("complete")
elif how == "crash":
    write("running")
    print("Traceback", "CUDA error: an illegal memory access", "", sep=chr(10))
    sys.exit(3)
elif how == "nothing":
    sys.exit("error: cannot begin")
elif how == "slow":
    try:
        write("running")
        time.sleep(60)
    except KeyboardInterrupt:
        write("interrupted", "interrupted")
        sys.exit(130)
elif how == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
    write("running")
    time.sleep(60)
"""


def part(name: str, *arguments: str, seconds: int = 30) -> Part:
    return Part(name, f"is {name} right", arguments or (name,), ("toy", *arguments), seconds)


def sections(folder: Path) -> dict[str, Any]:
    """Returns the sections of the campaign's file on disk, which must be of the described form."""
    return read_result(folder / RESULT)["sections"]


def start(
    parts: list[Part], folder: Path, patch: pytest.MonkeyPatch, asked: list[Part] | None = None, *, dry: bool = False,
    seconds: float = 300, say: Callable[[str], object] = lambda text: None,
) -> list[str]:  # fmt: skip
    """Runs a campaign of these parts in the folder; returns the names of those that failed."""
    folder.mkdir(exist_ok=True)
    patch.setattr(campaign, "PARTS", tuple(parts))
    record = Record(folder / RESULT, environment())
    deadline = time.monotonic() + seconds
    return run_parts(parts if asked is None else asked, record, folder, dry=dry, deadline=deadline, say=say)


def stood_in(folder: Path, patch: pytest.MonkeyPatch, popen: type = subprocess.Popen) -> None:
    """Makes the parts processes of the stand-in."""
    script = folder / "stand-in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o755)
    patch.setattr(campaign, "GRACE", 0.5)
    patch.setattr(campaign, "sys", SimpleNamespace(executable=str(script)))
    known = {"TimeoutExpired": subprocess.TimeoutExpired, "STDOUT": subprocess.STDOUT}
    patch.setattr(campaign, "subprocess", SimpleNamespace(Popen=popen, **known))


# Processes


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[list[tuple[str, str]]]]:
    """A campaign with parts of every end: folder, names that failed, and what was in the file after each part."""
    folder, on_disk = tmp_path_factory.mktemp("campaign"), []
    parts = [part("crash"), part("slow", seconds=2), part("nothing"), part("deaf", seconds=2), part("well")]

    def say(text: str) -> None:
        if text.startswith("  "):
            on_disk.append([(name, found["status"]) for name, found in sections(folder).items()])

    with pytest.MonkeyPatch.context() as patch:
        stood_in(folder, patch)
        failed = start(parts, folder, patch, say=say)
    return folder, failed, on_disk


def test_each_section_is_in_the_file_as_soon_as_its_part_is_done(ended: Any) -> None:
    last = [
        ("crash", "interrupted"), ("slow", "interrupted"), ("nothing", "failed"), ("deaf", "interrupted"),
        ("well", "complete"),
    ]  # fmt: skip
    assert ended[2] == [last[:count] for count in range(1, 6)]


def test_a_part_that_takes_too_long_is_interrupted_and_keeps_what_it_had(ended: Any) -> None:
    slow = sections(ended[0])["slow"]
    assert (slow["status"], slow["reason"]) == ("interrupted", "interrupted after 2 s")
    assert slow["tables"][0]["rows"][0]["seconds"] == 1.0


def test_one_that_does_not_listen_is_killed_with_all_that_it_has_started(ended: Any) -> None:
    """The part's file still says that it is running, and the campaign's file says how it ended."""
    folder = ended[0]
    assert json.loads((folder / "deaf" / RESULT).read_text())["sections"]["deaf"]["status"] == "running"
    deaf = sections(folder)["deaf"]
    assert (deaf["status"], deaf["reason"]) == ("interrupted", "interrupted after 2 s")
    assert len(deaf["tables"][0]["rows"]) == 1
    child = Path("/proc") / (folder / "deaf" / "child").read_text() / "stat"
    assert not child.exists() or child.read_text().split(") ")[1][0] in "ZX"


def test_a_crash_takes_nothing_with_it_and_the_others_go_on(ended: Any) -> None:
    folder, failed, _ = ended
    found = sections(folder)
    assert failed == ["nothing"]  # the other left results
    assert found["nothing"]["reason"] == "exit code 1: error: cannot begin"
    assert (found["nothing"]["status"], found["nothing"]["tables"]) == ("failed", [])
    assert found["crash"]["reason"] == "exit code 3: CUDA error: an illegal memory access"
    assert len(found["crash"]["tables"][0]["rows"]) == 1
    assert (found["well"]["status"], found["well"]["reason"]) == ("complete", None)


def test_parts_are_called_at_real_size_or_at_toy_size_on_a_cpu(
    ended: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads((ended[0] / "well" / "argv.json").read_text()) == [
        "-m", "bench", "well", "--out", str(ended[0] / "well"),
    ]  # fmt: skip
    stood_in(tmp_path, monkeypatch)
    start([Part("a", "a", ("slow",), ("well", "--quick"), 30)], tmp_path, monkeypatch, dry=True)
    assert json.loads((tmp_path / "a" / "argv.json").read_text()) == [
        "-m", "bench", "well", "--quick", "--out", str(tmp_path / "a"), "--device", "cpu",
    ]  # fmt: skip


def waiting_for(row: Callable[[], bool], error: Callable[[float], BaseException]) -> type:
    """Makes processes whose first wait ends with this error as soon as a result is there."""

    class Waiting(subprocess.Popen):
        met = False

        def wait(self, timeout: float | None = None) -> int:
            if self.met:
                return super().wait(timeout)
            while not row():
                assert self.poll() is None, "it ended by itself"
                time.sleep(0.05)
            Waiting.met = True
            raise error(timeout or 0)

    return Waiting


def test_an_interruption_by_hand_keeps_the_section_of_the_part_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = (tmp_path / "slow" / RESULT).exists
    stood_in(tmp_path, monkeypatch, waiting_for(found, lambda seconds: KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        start([part("slow"), part("well")], tmp_path, monkeypatch)
    ((name, section),) = sections(tmp_path).items()
    assert (name, section["status"], section["reason"]) == ("slow", "interrupted", "interrupted")
    assert len(section["tables"][0]["rows"]) == 1
    assert not (tmp_path / "well").exists()


@pytest.mark.slow
def test_a_benchmark_that_takes_too_long_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real benchmark, whose time is over when it has its first row, keeps that row."""
    path = tmp_path / "whole" / RESULT

    def row() -> bool:
        found = json.loads(path.read_text())["sections"].values() if path.exists() else ()
        return any(row["status"] == "ok" for section in found for table in section["tables"] for row in table["rows"])

    popen = waiting_for(row, lambda seconds: subprocess.TimeoutExpired("bench", seconds))
    known = {"TimeoutExpired": subprocess.TimeoutExpired, "STDOUT": subprocess.STDOUT}
    monkeypatch.setattr(campaign, "subprocess", SimpleNamespace(Popen=popen, **known))
    arguments = ("csg", "--frames", "5,161", "--size", "256x144", "--repeats", "1", "--device", "cpu")
    assert start([part("whole", *arguments, seconds=41)], tmp_path, monkeypatch) == []
    section = sections(tmp_path)["whole"]
    assert (section["status"], section["reason"]) == ("interrupted", "interrupted after 41 s")
    assert section["tables"][0]["rows"][0]["status"] == "ok"
    assert section["title"] == "End-to-end against CSG"
    assert "KeyboardInterrupt" not in (tmp_path / "whole" / "log.txt").read_text()
    assert os.listdir(tmp_path / "whole") == [name for name in os.listdir(tmp_path / "whole") if name[0] != "."]


# Time


def recorded(calls: list[tuple[str, float]]) -> Callable[..., None]:
    def run(part: Part, folder: Path, dry: bool, seconds: float) -> None:
        calls.append((part.name, seconds))
        attempt(folder, "complete", 1)

    return run


def attempt(folder: Path, status: str, rows: int) -> None:
    """Leaves what a part's process would."""
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder / RESULT, environment())
    with record.section("any", "any", {}) as section:
        table = section.table("rows", "rows", identity=("room",), metrics=("seconds",))
        for number in range(rows):
            table.add({"room": number, "seconds": 1.0})
    record.data["sections"]["any"] |= {"status": status, "reason": None if status == "complete" else f"of {rows}"}
    record.save()


def test_a_part_has_its_own_time_but_no_more_than_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run is no measurement: there only what is left counts."""
    calls: list[tuple[str, float]] = []
    monkeypatch.setattr(campaign, "_run", recorded(calls))
    parts = [part("short", seconds=20), part("long", seconds=900)]
    start(parts, tmp_path / "real", monkeypatch, seconds=100)
    start(parts, tmp_path / "dry", monkeypatch, seconds=100, dry=True)
    assert [name for name, _ in calls] == ["short", "long"] * 2
    assert calls[0][1] == 20
    assert all(99 < seconds <= 100 for _, seconds in calls[1:])


def test_after_the_deadline_parts_are_not_reached_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part is not begun either where there is no time to write what it finds."""
    calls: list[tuple[str, float]] = []
    monkeypatch.setattr(campaign, "_run", recorded(calls))
    attempt(tmp_path / "begun", "interrupted", 2)
    said: list[str] = []
    parts = [part("begun"), part("new")]
    assert start(parts, tmp_path, monkeypatch, seconds=campaign.GRACE - 0.1, say=said.append) == []
    assert calls == []
    assert said == ["begun: not reached", "new: not reached"]
    found = sections(tmp_path)
    assert (found["begun"]["status"], len(found["begun"]["tables"][0]["rows"])) == ("interrupted", 2)
    assert (found["new"]["status"], found["new"]["reason"]) == ("not reached", "the time given was over")


# Again in the same folder


def test_complete_parts_are_not_run_again_and_parts_not_asked_for_stay_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, float]] = []
    monkeypatch.setattr(campaign, "_run", recorded(calls))
    parts = [part(name) for name in ("first", "second", "third", "fourth")]
    attempt(tmp_path / "first", "complete", 1)
    attempt(tmp_path / "second", "interrupted", 2)
    attempt(tmp_path / "third", "complete", 3)
    said: list[str] = []
    start(parts, tmp_path, monkeypatch, asked=[parts[0], parts[3]], say=said.append)
    assert [name for name, _ in calls] == ["fourth"]
    assert said[0] == "first: there already"
    found = sections(tmp_path)
    assert {name: (s["status"], len(s["tables"][0]["rows"])) for name, s in found.items()} == {
        "first": ("complete", 1), "second": ("interrupted", 2), "third": ("complete", 3), "fourth": ("complete", 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (("interrupted", 3), ("interrupted", 1), "first"),
        (("interrupted", 3), ("interrupted", 3), "first"),
        (("interrupted", 3), ("interrupted", 5), "second"),
        (("interrupted", 3), ("complete", 1), "second"),
        (("failed", 0), ("interrupted", 1), "second"),
        (("interrupted", 3), None, "first"),
        (("failed", 0), None, "first"),
    ],
    ids=str,
)
@pytest.mark.parametrize("by_hand", [False, True], ids=["ends", "interrupted by hand"])
def test_of_two_attempts_the_one_with_more_is_kept_with_its_files(
    first: Any, second: Any, kept: str, by_hand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt goes on from the journal of the first, and finds no result."""
    place = tmp_path / "tune"
    attempt(place, *first)
    (place / "journal").write_text("first\n")

    def run(part: Part, folder: Path, dry: bool, seconds: float) -> str | None:
        assert folder == place
        assert not (folder / RESULT).exists()
        with (folder / "journal").open("a") as journal:
            journal.write("second\n")
        (folder / "log.txt").write_text("second")
        if second is not None:
            attempt(folder, *second)
        if by_hand:
            raise KeyboardInterrupt
        return "exit code 1"

    monkeypatch.setattr(campaign, "_run", run)
    with pytest.raises(KeyboardInterrupt) if by_hand else pytest.MonkeyPatch.context():
        start([part("tune")], tmp_path, monkeypatch)
    section = sections(tmp_path)["tune"]
    status, rows = first if kept == "first" else second
    assert (section["status"], len(section["tables"][0]["rows"])) == (status, rows)
    assert section["tables"] == json.loads((place / RESULT).read_text())["sections"]["any"]["tables"]
    assert (place / "journal").read_text().startswith("first\n")
    assert (place / "log.txt").exists() == (kept == "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == [RESULT, "tune"]


@pytest.mark.parametrize("second", [None, ("running", 1), ("running", 5)], ids=str)
def test_a_campaign_that_was_killed_in_a_second_attempt_has_lost_nothing_of_the_first(
    second: tuple[str, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next campaign finds what the killed one had set aside."""
    place = tmp_path / "csg"
    attempt(place, "interrupted", 3)
    campaign._set_aside(place)
    if second is not None:
        attempt(place, *second)
    start([part("csg")], tmp_path, monkeypatch, asked=[])
    section = sections(tmp_path)["csg"]
    assert section["status"] == "interrupted"
    assert len(section["tables"][0]["rows"]) == max(3, second[1] if second else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csg", RESULT]
