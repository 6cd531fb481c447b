"""The campaign: what it keeps of parts that end well, crash, take too long, are interrupted, or are tried again."""

from __future__ import annotations

import json
import shlex
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
from tests.support.bench_session import leave_result
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
    return Part(name, f"is {name} right", seconds, shlex.join(arguments or (name,)), "toy")


def found(folder: Path) -> dict[str, tuple[str, str | None, int]]:
    """Returns status, reason and count of rows of each section of the campaign's file, which must be of its form."""
    sections = read_result(folder / RESULT)["sections"].items()
    return {n: (s["status"], s["reason"], sum(len(t["rows"]) for t in s["tables"])) for n, s in sections}


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


def test_each_part_is_kept_as_it_ended_as_soon_as_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too slow is interrupted, one that does not listen is killed with all that it has started, and a crash
    takes nothing with it."""
    parts = [part("crash"), part("slow", seconds=2), part("nothing"), part("deaf", seconds=2), part("well")]
    on_disk: list[list[str]] = []

    def say(text: str) -> None:
        if text.startswith("  "):
            on_disk.append(list(found(tmp_path)))

    stood_in(tmp_path, monkeypatch)
    assert start(parts, tmp_path, monkeypatch, say=say) == ["nothing"]  # the others left results
    assert on_disk == [[part.name for part in parts[:count]] for count in range(1, 6)]
    assert found(tmp_path) == {
        "crash": ("interrupted", "exit code 3: CUDA error: an illegal memory access", 1),
        "slow": ("interrupted", "interrupted after 2 s", 1),
        "nothing": ("failed", "exit code 1: error: cannot begin", 0),
        "deaf": ("interrupted", "interrupted after 2 s", 1),
        "well": ("complete", None, 1),
    }
    child = Path("/proc") / (tmp_path / "deaf" / "child").read_text() / "stat"
    assert not child.exists() or child.read_text().split(") ")[1][0] in "ZX"
    command = ["-m", "bench", "well", "--out", str(tmp_path / "well")]
    assert json.loads((tmp_path / "well" / "argv.json").read_text()) == command
    # In a dry run at toy size, on a CPU.
    start([Part("a", "a", 30, "slow", "well --quick")], tmp_path, monkeypatch, dry=True)
    assert json.loads((tmp_path / "a" / "argv.json").read_text()) == [
        "-m", "bench", "well", "--quick", "--out", str(tmp_path / "a"), "--device", "cpu",
    ]  # fmt: skip


def test_an_interruption_by_hand_keeps_the_section_of_the_part_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting(subprocess.Popen):
        """A process whose first wait ends as by Ctrl+C as soon as there is a result."""

        met = False

        def wait(self, timeout: float | None = None) -> int:
            while not self.met and not (tmp_path / "slow" / RESULT).exists():
                assert self.poll() is None, "it ended by itself"
                time.sleep(0.05)
            if not self.met:
                Waiting.met = True
                raise KeyboardInterrupt
            return super().wait(timeout)

    stood_in(tmp_path, monkeypatch, Waiting)
    with pytest.raises(KeyboardInterrupt):
        start([part("slow"), part("well")], tmp_path, monkeypatch)
    assert found(tmp_path) == {"slow": ("interrupted", "interrupted", 1)}
    assert not (tmp_path / "well").exists()


# Without processes


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """The names of parts that were run, each with the seconds that it was given; they are complete at once."""
    calls: list[tuple[str, float]] = []

    def run(part: Part, folder: Path, dry: bool, seconds: float) -> None:
        calls.append((part.name, seconds))
        leave_result(folder, "complete", 1)

    monkeypatch.setattr(campaign, "_run", run)
    return calls


def test_a_part_has_its_own_time_but_no_more_than_what_is_left(calls: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A dry run is no measurement: there only what is left counts."""
    parts = [part("short", seconds=20), part("long", seconds=900)]
    start(parts, tmp_path / "real", monkeypatch, seconds=100)
    start(parts, tmp_path / "dry", monkeypatch, seconds=100, dry=True)
    assert [name for name, _ in calls] == ["short", "long"] * 2
    assert calls[0][1] == 20
    assert all(99 < seconds <= 100 for _, seconds in calls[1:])


def test_after_the_deadline_parts_are_not_reached_and_what_was_there_stays(
    calls: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A part is not begun either where there is no time to write what it finds."""
    leave_result(tmp_path / "begun", "interrupted", 2)
    said: list[str] = []
    parts = [part("begun"), part("new")]
    assert start(parts, tmp_path, monkeypatch, seconds=campaign.GRACE - 0.1, say=said.append) == calls == []
    assert said == ["begun: not reached", "new: not reached"]
    assert found(tmp_path) == {
        "begun": ("interrupted", "of 2", 2), "new": ("not reached", "the time given was over", 0),
    }  # fmt: skip


def test_complete_parts_are_not_run_again_and_parts_not_asked_for_stay_in_the_file(
    calls: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A part that was running when the campaign was killed has its rows in its folder, and counts as interrupted."""
    parts = [part(name) for name in ("first", "second", "third", "fourth")]
    for name, status, rows in (("first", "complete", 1), ("second", "running", 2), ("third", "complete", 3)):
        leave_result(tmp_path / name, status, rows)
    start(parts, tmp_path, monkeypatch, asked=[parts[0], parts[3]])
    assert [name for name, _ in calls] == ["fourth"]
    assert found(tmp_path) == {
        "first": ("complete", None, 1), "second": ("interrupted", "it was cut short", 2),
        "third": ("complete", None, 3), "fourth": ("complete", None, 1),
    }  # fmt: skip


@pytest.mark.parametrize("by_hand", [False, True], ids=["ends", "interrupted by hand"])
@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (("interrupted", 3), ("interrupted", 1), ("interrupted", 3)),
        (("interrupted", 3), ("interrupted", 5), ("interrupted", 5)),
        (("interrupted", 3), ("complete", 1), ("complete", 1)),
        (("interrupted", 3), None, ("interrupted", 3)),
        (("not reached", 0), None, ("failed", 0)),
    ],
    ids=str,
)
def test_of_two_attempts_the_one_with_more_is_kept(
    first: Any, second: Any, kept: Any, by_hand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second goes on in the folder of the first, without its result; later campaigns keep the better one too."""
    place = tmp_path / "tune"
    leave_result(place, *first)
    (place / "journal").write_text("first")

    def run(part: Part, folder: Path, dry: bool, seconds: float) -> str | None:
        assert (folder / "journal").read_text() == "first"
        assert not (folder / RESULT).exists()
        if second is not None:
            leave_result(folder, *second)
        if by_hand:
            raise KeyboardInterrupt
        return "exit code 1"

    monkeypatch.setattr(campaign, "_run", run)
    with pytest.raises(KeyboardInterrupt) if by_hand else pytest.MonkeyPatch.context():
        start([part("tune")], tmp_path, monkeypatch)
    for _ in range(2):
        status, _, rows = found(tmp_path)["tune"]
        assert (status, rows) == kept
        start([part("tune")], tmp_path, monkeypatch, asked=[])
