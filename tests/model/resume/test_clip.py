"""A run goes on from wherever it was ended: its film is the same file, byte for byte, and readable at any time."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from model.generate import main
from model.io.media import VideoWriter, reserved
from model.resume.clip import MOST_PLANS
from model.resume.state import RunState
from tests.support.memory_requests import predict_nothing

ROOT = Path(__file__).parent.parent.parent.parent
#: Three segments of one block: 13 frames in four pieces.
OPTIONS = ["--frames", "13", "--blocks", "1", "--size", "48x32", "--steps", "1", "--stage1-steps", "1", "--seed", "3"]
SEGMENTS = 3
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
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


class EndedError(Exception):
    """The exception that ends a run in these tests."""


def ended_after(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Returns ``call``, which ends the run after it was made ``number`` times."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = call(*args, **kwargs)
        calls += 1
        if calls == number:
            raise EndedError
        return result

    return counted


def ended_after_a_piece(end_piece: Callable[[VideoWriter], None]) -> Callable[[VideoWriter], None]:
    """Returns ``end_piece``, which ends the run once it has made a piece; without new frames it makes none."""

    def ended(self: VideoWriter) -> None:
        before = self.num_pieces
        end_piece(self)
        if self.num_pieces > before:
            raise EndedError

    return ended


@pytest.fixture(scope="module")
def ended_after_segment(tmp_path_factory: pytest.TempPathFactory, photo_file: Path) -> Callable[[int], Path]:
    """A function that returns the folder of a run that ended as soon as segment ``number`` was saved.

    The run is begun once; then the folder is made again as it was.
    """
    room, kept = tmp_path_factory.mktemp("room"), tmp_path_factory.mktemp("kept")

    def folder(number: int) -> Path:
        shutil.rmtree(room)
        copy = kept / str(number)
        if not copy.exists():
            with pytest.MonkeyPatch.context() as patch:
                predict_nothing(patch)
                patch.setattr(RunState, "save_segment", ended_after(RunState.save_segment, number))
                with pytest.raises(EndedError):
                    main([str(photo_file), "--out", str(room / "clip.mp4"), *OPTIONS])
            shutil.copytree(room, copy)
            return room
        return shutil.copytree(copy, room)

    return folder


def test_a_run_that_ends_whenever_something_is_saved_writes_the_same_file(
    whole: str, photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ends at each of ten moments, and goes on each time, makes the film of an undisturbed run.

    Saved are the inputs, Stage I and the reference, then in turn pieces of the film and the segments after them.
    """
    out, films = tmp_path / "clip.mp4", []
    given = [str(photo_file), "--out", str(out), *OPTIONS]
    while not out.exists():
        with monkeypatch.context() as patch:
            patch.setattr(VideoWriter, "end_piece", ended_after_a_piece(VideoWriter.end_piece))
            for method in ("save", "save_segment"):
                patch.setattr(RunState, method, ended_after(getattr(RunState, method), 1))
            with suppress(EndedError):
                assert main(given) == 0
        partial, given = tmp_path / "clip.partial.mp4", ["--resume", str(tmp_path / "clip.run")]
        films.append(frames_of(partial) if partial.exists() else 0)
        assert len(films) <= 11, "the run does not get on"
        printed = capsys.readouterr().out
        assert ("segments are there already" in printed) == (5 < len(films) < 11)
        assert "bit for bit" not in printed  # nothing about the machine has changed
    assert films == [0, 0, 0, 1, 1, 5, 5, 9, 9, 13, 0]
    assert digest(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(whole: str, photo_file: Path, tmp_path: Path) -> None:
    """A run that is killed at random moments until it is through leaves readable files each time, and the same film."""
    out, state = tmp_path / "clip.mp4", tmp_path / "clip.run"
    draw, most = random.Random(1), 2
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = 0
    while not out.exists():
        begun = (state / "job.json").exists()
        given = ["--resume", str(state)] if begun else [str(photo_file), "--out", str(out), *OPTIONS]
        process = subprocess.Popen(
            [sys.executable, "-m", "model.generate", *given], env=environment, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if kills < most:
            # From when the state appears on, most of the work is a second or two.
            deadline = time.monotonic() + 300
            while process.poll() is None and not (state / "job.json").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 2.5))
            process.send_signal(signal.SIGKILL)
            kills += 1
        told, _ = process.communicate(timeout=600)
        assert process.returncode in (0, -signal.SIGKILL), told
        partial = tmp_path / "clip.partial.mp4"
        if partial.exists():
            assert frames_of(partial) in FRAMES
    assert digest(out) == whole


@pytest.mark.parametrize("number", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_a_damaged_segment_is_named_and_the_run_starts_before_it(
    number: int, whole: str, capsys: pytest.CaptureFixture[str], ended_after_segment: Callable[[int], Path]
) -> None:
    folder = ended_after_segment(3)
    out, state = folder / "clip.mp4", folder / "clip.run"
    file = state / f"segment-000{number}.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert main(["--resume", str(state), "--keep-state"]) == 0
    printed = capsys.readouterr()
    assert f"segment-000{number}.safetensors is damaged (sha256 differs)" in printed.out
    there = f"{number - 1} of {SEGMENTS} segments are there already"
    assert (there if number > 1 else "damaged") in printed.out
    assert ("segments are there already" in printed.out) == (number > 1)
    assert digest(out) == whole
    # Complete, and kept: nothing is made again.
    assert main(["--resume", str(state)]) == 0
    assert "segment" not in capsys.readouterr().err
    assert digest(out) == whole
    assert not state.exists()


def test_a_damaged_reference_or_film_is_made_again(
    whole: str, photo_file: Path, capsys: pytest.CaptureFixture[str], ended_after_segment: Callable[[int], Path]
) -> None:
    folder = ended_after_segment(3)
    out, state = folder / "clip.mp4", folder / "clip.run"
    (state / "piece-0001.mp4").write_bytes(b"no film")
    (state / "condition.safetensors").write_bytes(b"no tensors")
    photo_file = photo_file.rename(photo_file.with_name("elsewhere.png"))
    capsys.readouterr()
    try:
        assert main(["--resume", str(state)]) == 0
    finally:
        photo_file.rename(photo_file.with_name("photo.png"))
    printed = capsys.readouterr()
    for part in ("piece-0001.mp4 is damaged", "condition.safetensors is damaged"):
        assert part in printed.out
    assert "Stage I:" not in printed.err  # its latents were there
    assert digest(out) == whole


def test_what_would_be_another_run_is_refused(
    photo_file: Path, capsys: pytest.CaptureFixture[str], ended_after_segment: Callable[[int], Path]
) -> None:
    folder = ended_after_segment(1)
    out, state = folder / "clip.mp4", folder / "clip.run"
    command = [str(photo_file), "--out", str(out), *OPTIONS]

    def refused(*options: str) -> str:
        capsys.readouterr()
        assert main(list(options)) == 2
        return capsys.readouterr().err

    assert "resume: the run has its options; got --seed too" in refused("--resume", str(state), "--seed", "4")
    assert "got --mode, --steps too" in refused("--resume", str(state), "--steps", "3", "--mode", "causal")
    assert "resume: not together with --restart or --state" in refused("--resume", str(state), "--restart")
    assert f"state: {state} holds a run; --resume {state} goes on with it, --restart begins anew" in refused(*command)
    assert "run: nowhere does not exist" in refused("--resume", "nowhere")
    assert "PHOTO and --out FILE.mp4 are needed, or --resume DIR" in refused("--out", str(out))
    before = photo_file.read_bytes()
    photo_file.write_bytes(before + b" ")
    try:
        assert "resume: not what" in refused("--resume", str(state))
    finally:
        photo_file.write_bytes(before)
    # Begun anew on demand.
    assert main([*command, "--restart"]) == 0
    assert not state.exists()


def test_a_run_goes_on_where_everything_lies_elsewhere(
    whole: str, photo_file: Path, tmp_path: Path, ended_after_segment: Callable[[int], Path]
) -> None:
    """A run goes on at new paths, since its inputs are recognised by their fingerprints."""
    state = (ended_after_segment(2) / "clip.run").rename(tmp_path / "moved run")
    photo = tmp_path / "another name.png"
    photo.write_bytes(photo_file.read_bytes())
    assert main([str(photo), "--resume", str(state), "--out", str(tmp_path / "new" / "film.mp4")]) == 0
    assert digest(tmp_path / "new" / "film.mp4") == whole


@pytest.mark.slow
def test_a_removal_that_is_broken_off_leaves_no_run(
    whole: str, photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The film is there, the rest is said to be of a finished run, and another run may begin in the folder."""
    out, state = tmp_path / "clip.mp4", tmp_path / "clip.run"
    with monkeypatch.context() as patch:
        remove = RunState.remove

        def broken_off(self: RunState) -> None:
            patch.setattr(Path, "unlink", ended_after(Path.unlink, 3))
            remove(self)

        patch.setattr(RunState, "remove", broken_off)
        with pytest.raises(EndedError):
            main([str(photo_file), "--out", str(out), *OPTIONS])
    assert digest(out) == whole
    capsys.readouterr()
    assert main(["--resume", str(state)]) == 2
    assert f"run: {state} is finished, and its video complete" in capsys.readouterr().err
    assert main([str(photo_file), "--out", str(out), *OPTIONS]) == 0
    assert not state.exists()


def test_a_run_whose_job_cannot_be_read_can_be_begun_anew(
    whole: str, photo_file: Path, capsys: pytest.CaptureFixture[str], ended_after_segment: Callable[[int], Path]
) -> None:
    folder = ended_after_segment(1)
    out, state = folder / "clip.mp4", folder / "clip.run"
    command = [str(photo_file), "--out", str(out), *OPTIONS]
    (state / "job.json").write_text("")
    assert main(command) == 2
    assert "--restart begins anew" in capsys.readouterr().err
    assert main([*command, "--restart"]) == 0
    assert digest(out) == whole


def test_a_job_that_asks_for_what_no_option_gives_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], ended_after_segment: Callable[[int], Path]
) -> None:
    """A job of the right sha256 with other types, values or sections than options give changes nothing."""
    state = ended_after_segment(1) / "clip.run"
    file = state / "job.json"
    stored = json.loads(file.read_text())
    before = {path.name: path.read_bytes() for path in state.iterdir()}

    def refused(section: str, key: str | None = None, value: Any = None) -> str:
        job = copy.deepcopy(stored["job"])
        if key is None:
            del job[section]
        else:
            job[section][key] = value
        sha256 = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        text = json.dumps({**stored, "job": job, "sha256": sha256})
        file.write_text(text)
        capsys.readouterr()
        assert main(["--resume", str(state)]) == 2
        error = capsys.readouterr().err
        assert error[-1] == "\n"
        assert error[:-1].isprintable()
        assert {path.name: path.read_bytes() for path in state.iterdir()} == {**before, "job.json": text.encode()}
        return error

    odd = [None, 5, 7.5, True, "odd", "\0", [], {"a": 1}, [5], "a" * 5000, -1, 10**4000, "\ud800.mp4"]
    for number, key in enumerate(stored["job"]["arguments"]):
        for value in odd[number % 3 :: 3]:  # a third for each: all of it takes a minute
            if type(value) is not type(stored["job"]["arguments"][key]) and (
                value is not None or key in ("photo", "out")
            ):
                told = refused("arguments", key, value)
                assert key in told.replace("-", "_"), told
    assert "mode of the stored run" in refused("arguments", "mode", "other")
    assert "steps of the stored run" in refused("arguments", "steps", 1.0)
    assert "steps of the stored run" in refused("arguments", "steps", 10**9)
    assert "differ in options: m\\nore" in refused("arguments", "m\nore", 1)
    assert "differ in options: anchor, blocks, cuda_graph" in refused("arguments")
    for told in (refused("inputs"), refused("inputs", "photo", 5)):
        assert "no fingerprint of its photograph" in told
    assert r"request.\x1b[2J" in refused("request", "\x1b[2J", "\x1b[2J")
    assert "resume: not what" in refused("request")


def test_inputs_that_are_made_again_are_kept_and_drop_nothing(
    whole: str, capsys: pytest.CaptureFixture[str], ended_after_segment: Callable[[int], Path]
) -> None:
    """Inputs, a reference and a segment of other shapes, with the right sha256, are damaged as empty files are."""
    folder = ended_after_segment(2)
    out, state = folder / "clip.mp4", folder / "clip.run"
    with RunState.open(state) as run:
        inputs = run.load("inputs")
        del inputs["picture"]
        run.restore("inputs", inputs)
        run.restore("segment-0002", {"blocks": torch.ones(1, 16, 2, 4, 6)})
    assert main(["--resume", str(state), "--keep-state"]) == 0
    told = capsys.readouterr().out
    assert "1 of 3 segments are there already" in told
    assert "segment-0002.safetensors is damaged (expected blocks [1, 16, 1, 4, 6] float32, got" in told
    assert (state / "inputs.safetensors").stat().st_size > 1000
    assert digest(out) == whole


def test_a_piece_of_another_run_is_made_again(
    whole: str, capsys: pytest.CaptureFixture[str], ended_after_segment: Callable[[int], Path]
) -> None:
    """A piece that is whole, but of another run or another number, does not get into the film."""
    folder = ended_after_segment(3)
    out, state = folder / "clip.mp4", folder / "clip.run"
    with VideoWriter(folder / "other.mp4", 48, 32, 16, pieces=folder / "other") as writer:
        for length in (1, 4):
            writer.write(torch.zeros(length, 32, 48, 3, dtype=torch.uint8))
            writer.end_piece()
    (folder / "other" / "piece-0001.mp4").replace(state / "piece-0001.mp4")
    assert main(["--resume", str(state)]) == 0
    assert "piece-0001.mp4 is damaged (sha256 differs)" in capsys.readouterr().out
    assert digest(out) == whole


def test_two_runs_do_not_make_one_video(
    whole: str, photo_file: Path, capsys: pytest.CaptureFixture[str], ended_after_segment: Callable[[int], Path]
) -> None:
    """Whoever comes second is refused before it makes anything, whether it is new or goes on with another state."""
    folder = ended_after_segment(1)
    state = (folder / "clip.run").rename(folder / "elsewhere")
    before = sorted(folder.rglob("*"))
    with reserved(folder / "clip.mp4"):
        for options in (
            ["--resume", str(state)],
            [str(photo_file), "--out", str(folder / "clip.mp4"), *OPTIONS],
            [str(photo_file), "--out", str(folder / "clip.mp4"), "--state", str(state), "--restart", *OPTIONS],
        ):
            assert main(options) == 2
            assert "clip.mp4 is in use by another process" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    assert main(["--resume", str(state)]) == 0
    assert digest(folder / "clip.mp4") == whole


@pytest.mark.slow
def test_a_disk_without_room_ends_the_run_in_one_line_and_it_goes_on_later(
    whole: str, photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, state = tmp_path / "clip.mp4", tmp_path / "clip.run"

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "piece-0001.mp4")

    with monkeypatch.context() as patch:
        patch.setattr("model.io.media._sealed", full)
        assert main([str(photo_file), "--out", str(out), *OPTIONS]) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith("error: disk: No space left on device: piece-0001.mp4\n")
    assert f"--resume {state} goes on" in printed.out
    assert main(["--resume", str(state)]) == 0
    assert digest(out) == whole


def test_another_machine_goes_on_and_says_what_that_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ended_after_segment: Callable[[int], Path]
) -> None:
    folder = ended_after_segment(1)
    out, state = folder / "clip.mp4", folder / "clip.run"
    monkeypatch.setattr("model.cli.request.device_name", lambda device: "another card")
    capsys.readouterr()
    assert main(["--resume", str(state)]) == 0
    printed = capsys.readouterr().out
    assert "will not be the same bit for bit" in printed
    assert "now 'another card'" in printed or "now another card" in printed or 'now "another card"' in printed
    assert frames_of(out) == FRAMES[-1]


# Out of memory


def short_of_memory(call: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Returns ``call``, which runs out of memory ``times`` times before it works."""
    left = times

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        return call(*args, **kwargs)

    return run


@pytest.mark.parametrize(
    ("place", "stage"),
    [
        pytest.param("model.pipeline.clip.make_reference", "reference", marks=pytest.mark.slow),
        pytest.param("model.pipeline.clip.sample_latents", "decode", marks=pytest.mark.slow),
    ],
)
def test_a_run_out_of_memory_is_planned_anew_and_goes_on(
    place: str, stage: str, whole: str, photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The message names the stage and what held the memory, and what was finished before is not made again."""
    monkeypatch.undo()  # predictions matter here
    module, _, name = place.rpartition(".")
    call = getattr(sys.modules[module], name)
    monkeypatch.setattr(place, short_of_memory(call, 1))
    out = tmp_path / "clip.mp4"
    assert main([str(photo_file), "--out", str(out), *OPTIONS]) == 0
    printed = capsys.readouterr()
    assert f"out of memory in {stage} (CUDA out of memory. Tried to allocate 2.00 GiB.)" in printed.out
    assert "predicted for" in printed.out
    assert f"planned anew, 1 of at most {MOST_PLANS - 1} times" in printed.out
    assert printed.err.count("Stage I: 100%") <= 2  # a bar is drawn twice at its end
    assert frames_of(out) == FRAMES[-1]


def test_a_machine_that_is_full_is_planned_for_with_less_of_it(
    photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new plan takes less of the machine, not of the card, which would put more on the machine.

    There is no smaller plan here, so the run ends.
    """
    monkeypatch.undo()  # predictions matter here
    wanted = []

    def none(request: Any) -> None:
        wanted.append((request.vram, request.ram))

    def full(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("model.pipeline.clip.make_reference", full)
    monkeypatch.setattr("model.resume.clip.find_plan", none)
    assert main([str(photo_file), "--out", str(tmp_path / "clip.mp4"), *OPTIONS]) == 1
    ((vram, ram),) = wanted
    assert vram is None
    assert 1e9 < ram < 4e9
    assert "predicted of the machine's memory" in capsys.readouterr().err


@pytest.mark.slow
def test_it_never_loops(
    photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that never has enough memory tries a bounded number of plans and keeps what was made."""
    monkeypatch.undo()  # predictions matter here
    tried = []

    def never(*args: Any, **kwargs: Any) -> Any:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("model.pipeline.clip.sample_latents", never)
    assert main([str(photo_file), "--out", str(tmp_path / "clip.mp4"), *OPTIONS]) == 1
    printed = capsys.readouterr()
    assert 1 <= len(tried) <= MOST_PLANS
    assert "\nerror: out of memory in decode (CUDA out of memory.)" in printed.err
    assert f"--resume {tmp_path / 'clip.run'} goes on" in printed.out
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path / "clip.run")]) == 0
    assert frames_of(tmp_path / "clip.mp4") == FRAMES[-1]
