"""A run goes on from wherever it was ended: its film is the same file, byte for byte, and readable at any time."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from model.generate import main
from model.io.media import VideoWriter, reserved
from model.memory.request import MemoryRequest
from model.pipeline import clip
from model.resume.clip import MOST_PLANS
from model.resume.state import RunState
from tests.support.memory_requests import predict_nothing

ROOT = Path(__file__).parent.parent.parent.parent
#: Three segments of one block: 13 frames in four pieces.
OPTIONS = ["--frames", "13", "--blocks", "1", "--size", "48x32", "--steps", "1", "--stage1-steps", "1", "--seed", "3"]
#: The frames of the film after each piece.
FRAMES = (1, 5, 9, 13)


@pytest.fixture(autouse=True)
def _quick_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    predict_nothing(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, photo_file: Path) -> str:
    """The hash of the film of a run that nobody disturbs, which leaves nothing but the film."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        predict_nothing(patch)
        assert main([str(photo_file), "--out", str(folder / "clip.mp4"), *OPTIONS]) == 0
    assert [path.name for path in folder.iterdir()] == ["clip.mp4"]
    return digest(folder / "clip.mp4")


@pytest.fixture(scope="module")
def photo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.effect_mandelbrot((96, 64), (-3, -2.5, 2, 2.5), 50).convert("RGB").save(path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def frames_of(path: Path) -> int:
    """Returns the number of frames of a film, 0 if there is none."""
    if not path.exists():
        return 0
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


class EndedError(Exception):
    """The exception that ends a run in these tests."""


def ended_after(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Returns ``call``, which ends the run after it was made ``number`` times."""
    calls = count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        if next(calls) == number:
            raise EndedError
        return result

    return counted


def ended_after_a_piece(end_piece: Callable[[VideoWriter], None]) -> Callable[[VideoWriter], None]:
    """Returns ``end_piece``, which ends the run once the partial film has more frames."""

    def ended(self: VideoWriter) -> None:
        before = frames_of(self.partial_path)
        end_piece(self)
        if frames_of(self.partial_path) > before:
            raise EndedError

    return ended


class Run:
    """A run in a room: its film, its folder, the command that begins it, and commands with what they print."""

    def __init__(self, room: Path, kept: Path, photo: Path, whole: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.room, self.photo, self._kept, self._whole, self._capsys = room, photo, kept, whole, capsys
        self.out, self.state, self.partial = (room / f"clip.{end}" for end in ("mp4", "run", "partial.mp4"))
        self.new = [str(photo), "--out", str(self.out), *OPTIONS]

    def told(self, options: list[str], code: int = 0) -> tuple[str, str]:
        """Runs a command line, which has to end with ``code``, and returns what it prints as output and as errors."""
        self._capsys.readouterr()
        assert main(options) == code
        return self._capsys.readouterr()

    def resumed(self, *options: str, code: int = 0) -> tuple[str, str]:
        """Goes on with the run, as :meth:`told`."""
        return self.told(["--resume", str(self.state), *options], code)

    def ended_after(self, segment: int) -> Run:
        """Begins the run and ends it as soon as a segment was saved, which is done once for all tests."""
        copy = self._kept / str(segment)
        if copy.exists():
            shutil.copytree(copy, self.room, dirs_exist_ok=True)
            return self
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunState, "save_segment", ended_after(RunState.save_segment, segment))
            with pytest.raises(EndedError):
                main(self.new)
        shutil.copytree(self.room, copy)
        return self

    def is_whole(self, film: Path | None = None) -> bool:
        """Returns whether the film is that of a run that nobody disturbs."""
        return digest(film or self.out) == self._whole


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of one run after the other, whose paths are in its job, and one where runs that ended are kept."""
    return tmp_path_factory.mktemp("room"), tmp_path_factory.mktemp("kept")


@pytest.fixture
def run(rooms: tuple[Path, Path], photo_file: Path, whole: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """A run that is not begun, in an empty room."""
    shutil.rmtree(rooms[0])
    rooms[0].mkdir()
    return Run(*rooms, photo_file, whole, capsys)


def test_a_run_that_ends_whenever_something_is_saved_writes_the_same_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ends at each of ten moments, and goes on each time, makes the film of an undisturbed run.

    Saved are the inputs, Stage I and the reference, then in turn pieces of the film and the segments after them.
    """
    films, given = [], run.new
    while not run.out.exists():
        with monkeypatch.context() as patch:
            patch.setattr(VideoWriter, "end_piece", ended_after_a_piece(VideoWriter.end_piece))
            for method in ("save", "save_segment"):
                patch.setattr(RunState, method, ended_after(getattr(RunState, method), 1))
            with suppress(EndedError):
                assert main(given) == 0
        given = ["--resume", str(run.state)]
        films.append(frames_of(run.partial))
        assert len(films) <= 11, "the run does not get on"
        printed = capsys.readouterr().out
        assert ("segments are there already" in printed) == (len(films) > 5)
        assert "bit for bit" not in printed  # nothing about the machine has changed
    assert films == [0, 0, 0, 1, 1, 5, 5, 9, 9, 13, 0]
    assert run.is_whole()
    assert [path.name for path in run.room.iterdir()] == ["clip.mp4"]


def test_a_damaged_reference_is_made_again(run: Run) -> None:
    """A reference that cannot be read is made again, without a photograph."""
    state = run.ended_after(3).state
    (state / "condition.safetensors").write_bytes(b"no tensors")
    run.photo.rename(run.photo.with_name("elsewhere.png"))
    try:
        printed, errors = run.resumed()
    finally:
        run.photo.with_name("elsewhere.png").rename(run.photo)
    assert "condition.safetensors is damaged" in printed
    assert "Stage I:" not in errors  # its latents were there
    assert run.is_whole()


def test_what_would_be_another_run_is_refused(run: Run) -> None:
    run.ended_after(1)
    state = ["--resume", str(run.state)]
    for options, told in (
        ([*state, "--seed", "4"], "resume: the run has its options; got --seed too"),
        ([*state, "--steps", "3", "--mode", "causal"], "got --mode, --steps too"),
        ([*state, "--restart"], "resume: not together with --restart or --state"),
        (run.new, f"state: {run.state} holds a run; --resume {run.state} goes on with it, --restart begins anew"),
        (["--resume", "nowhere"], "run: nowhere does not exist"),
        (["--out", str(run.out)], "PHOTO and --out FILE.mp4 are needed, or --resume DIR"),
    ):
        assert told in run.told(options, 2)[1]
    before = run.photo.read_bytes()
    run.photo.write_bytes(before + b" ")
    try:
        assert "resume: not what" in run.told(state, 2)[1]
    finally:
        run.photo.write_bytes(before)


def test_a_run_goes_on_where_everything_lies_elsewhere(run: Run, tmp_path: Path) -> None:
    """A run goes on at new paths, since its inputs are recognised by their fingerprints."""
    state = run.ended_after(2).state.rename(tmp_path / "moved run")
    photo, film = tmp_path / "another name.png", tmp_path / "new" / "film.mp4"
    photo.write_bytes(run.photo.read_bytes())
    run.told([str(photo), "--resume", str(state), "--out", str(film)])
    assert run.is_whole(film)


def test_a_run_whose_job_cannot_be_read_can_be_begun_anew(run: Run) -> None:
    (run.ended_after(1).state / "job.json").write_text("")
    assert "--restart begins anew" in run.told(run.new, 2)[1]
    run.told([*run.new, "--restart"])
    assert run.is_whole()
    assert not run.state.exists()


def test_a_job_that_asks_for_what_no_option_gives_is_refused_in_one_line(run: Run) -> None:
    """A job of the right sha256 with other types, values or sections than options give changes nothing."""
    state = run.ended_after(1).state
    file = state / "job.json"
    stored = json.loads(file.read_text())
    for section, changed, told in (
        ("arguments", {"mode": "other"}, "the stored run: argument --mode: invalid choice"),
        ("arguments", {"steps": 1.0}, "argument --steps: expected an integer"),
        ("arguments", {"out": None, "gone": False}, "PHOTO and --out FILE.mp4 are needed"),
        ("arguments", {"gone": True}, "unrecognized arguments: --gone"),
        ("arguments", {"m\nore": 1}, "unrecognized arguments: --m\\nore=1"),
        ("inputs", {"photo": 5}, "no fingerprint of its photograph"),
        ("request", {"\x1b[2J": "\x1b[2J"}, r"request.\x1b[2J"),
    ):
        job = {**stored["job"], section: {**stored["job"][section], **changed}}
        sha256 = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps({**stored, "job": job, "sha256": sha256}))
        before = {path.name: path.read_bytes() for path in state.iterdir()}
        error = run.resumed(code=2)[1]
        assert told in error
        assert error[:-1].isprintable()
        assert {path.name: path.read_bytes() for path in state.iterdir()} == before


def test_a_run_starts_before_a_damaged_segment_and_makes_damaged_inputs_again(run: Run) -> None:
    run.ended_after(2)
    for name in ("inputs", "segment-0002"):
        (run.state / f"{name}.safetensors").write_bytes(b"no tensors")
    told, _ = run.resumed("--keep-state")
    assert "1 of 3 segments are there already" in told
    assert "inputs.safetensors is damaged (not readable: " in told
    assert "segment-0002.safetensors is damaged (not readable: " in told
    assert (run.state / "inputs.safetensors").stat().st_size > 1000
    assert run.is_whole()
    # Complete, and kept: no segment is made again.
    assert "Stage II" not in run.resumed()[1]
    assert run.is_whole()
    assert not run.state.exists()


def test_two_runs_do_not_make_one_video(run: Run) -> None:
    """Whoever comes second is refused before it makes anything, whether it is new or goes on with another state."""
    state = run.ended_after(1).state.rename(run.room / "elsewhere")
    before = sorted(run.room.rglob("*"))
    with reserved(run.out):
        for options in (["--resume", str(state)], run.new, [*run.new, "--state", str(state), "--restart"]):
            assert "clip.mp4 is in use by another process" in run.told(options, 2)[1]
    assert sorted(run.room.rglob("*")) == before
    run.told(["--resume", str(state)])
    assert run.is_whole()


@pytest.mark.slow
def test_a_disk_without_room_ends_the_run_in_one_line_and_it_goes_on_later(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "clip.partial.mp4")

    with monkeypatch.context() as patch:
        patch.setattr("model.io.media._join", full)
        printed, errors = run.told(run.new, 1)
    assert errors.endswith("error: disk: No space left on device: clip.partial.mp4\n")
    assert f"--resume {run.state} goes on" in printed
    run.resumed()
    assert run.is_whole()


def test_another_machine_goes_on_and_says_what_that_means(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.ended_after(1)
    monkeypatch.setattr("model.cli.request.device_name", lambda device: "another card")
    printed, _ = run.resumed()
    assert "will not be the same bit for bit" in printed
    assert 'now "another card"' in printed
    assert frames_of(run.out) == FRAMES[-1]


# Out of memory

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def failing(patch: pytest.MonkeyPatch, name: str, error: Exception, times: int) -> list[Exception]:
    """Makes a function of the pipeline fail so often before it works, where plans are real; returns its failures."""
    patch.undo()
    works, failed = getattr(clip, name), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        if len(failed) == times:
            return works(*args, **kwargs)
        failed.append(error)
        raise error

    patch.setattr(clip, name, fails)
    return failed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("make_reference", "reference"), ("sample_latents", "decode")])
def test_a_run_out_of_memory_is_planned_anew_and_goes_on(
    name: str, stage: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the stage and what held the memory, and what was finished before is not made again."""
    failing(monkeypatch, name, FULL, 1)
    printed, errors = run.told(run.new)
    assert f"out of memory in {stage} (CUDA out of memory. Tried to allocate 2.00 GiB.)" in printed
    assert "predicted for" in printed
    assert f"planned anew, 1 of at most {MOST_PLANS - 1} times" in printed
    assert errors.count("Stage I: 100%") <= 2  # a bar is drawn twice at its end
    assert frames_of(run.out) == FRAMES[-1]


def test_a_machine_that_is_full_is_planned_for_with_less_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new plan takes less of the machine, not of the card, which would put more on the machine.

    There is no smaller plan here, so the run ends.
    """
    failing(monkeypatch, "make_reference", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 9)
    wanted: list[MemoryRequest] = []
    monkeypatch.setattr("model.resume.clip.find_plan", wanted.append)
    _, errors = run.told(run.new, 1)
    assert [(request.vram, 1e9 < request.ram < 4e9) for request in wanted] == [(None, True)]
    assert "predicted of the machine's memory" in errors


@pytest.mark.slow
def test_it_never_loops(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that never has enough memory tries a bounded number of plans and keeps what was made."""
    failed = failing(monkeypatch, "sample_latents", FULL, 99)
    printed, errors = run.told(run.new, 1)
    assert 1 <= len(failed) <= MOST_PLANS
    assert "\nerror: out of memory in decode (CUDA out of memory." in errors
    assert f"--resume {run.state} goes on" in printed
    monkeypatch.undo()
    run.resumed()
    assert frames_of(run.out) == FRAMES[-1]
