"""Runs may be killed with SIGKILL at any moment: what is there is readable, and the film comes out the same.

A process of its own forks the workers, so that each starts in milliseconds and with a single thread:
``python -m tests.model.resume.test_kill``.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from model.errors import InputError
from model.io.media import VideoWriter
from model.resume.state import RunState

ROOT = Path(__file__).resolve().parent.parent.parent.parent
SEGMENTS, BLOCKS, SIZE, FPS = 8, 3, 32, 16
JOB = {"request": {"seed": 3, "segments": SEGMENTS}}
#: The number of random kills; and the file operations, by number, at which workers kill themselves in turns.
KILLS = 16
CALLS = (1, 5, 2, 7, 3, 8, 4, 6)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes, which needs POSIX"),
]


# The worker


def made(number: int) -> Tensor:
    """Returns the blocks of segment ``number``, or for numbers below 1 a tensor made before the first segment."""
    return torch.randn(1, 4, BLOCKS, 4, 4, generator=torch.Generator().manual_seed(number + 10))


def shown(blocks: Tensor) -> Tensor:
    """Returns the frames ``[F, H, W, 3]`` uint8 of blocks, which depend on every number of these."""
    wide = torch.nn.functional.interpolate(blocks[0, :3].transpose(0, 1), (SIZE, SIZE), mode="bilinear")
    return (wide + blocks[0, 3].mean()).mul(40).add(128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def begun_or_gone_on(folder: Path) -> RunState:
    try:
        return RunState.open(folder)
    except InputError:
        return RunState.create(folder, JOB)


def work(room: Path) -> None:
    """Goes on with the run in ``room`` and makes its film."""
    with begun_or_gone_on(room / "run") as state:
        before = []
        for number, name in enumerate(("inputs", "motion", "condition"), start=-2):
            tensors = state.load(name)
            if tensors is None:
                tensors = {"first": made(number), "second": made(number).bfloat16()}
                state.save(name, tensors)
            before.append(tensors["first"])
        segments, problems = state.finished_segments([(1, 4, BLOCKS, 4, 4)] * SEGMENTS)
        writer = VideoWriter(room / "film.mp4", SIZE, SIZE, FPS, pieces=room / "run", run=state.digest)
        if problems or writer.damaged:
            raise RuntimeError(f"{problems}, {writer.damaged}")
        writer.keep(min(writer.num_pieces, len(segments) + 1))
        with writer:
            encoded = writer.num_pieces
            for number in range(SEGMENTS + 1):
                if number > len(segments):
                    segments.append(made(number))
                    state.save_segment(number, segments[-1])
                if number >= encoded:
                    writer.write(shown(segments[number - 1] if number else before[-1][:, :, :1]))
                    writer.end_piece()


def killing_at(call: int) -> None:
    """Makes this process kill itself before its file operation number ``call``, counted from now on."""
    count = 0

    def counted(function: Callable) -> Callable:
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def serve() -> None:
    """Forks a worker for each line ``CALL ROOM`` and prints its process number, and then its exit code."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        call, room = line.rstrip("\n").split(" ", 1)
        pid = os.fork()
        if pid == 0:
            # The worker must not return to the loop, whose input belongs to the parent.
            try:
                if int(call):
                    killing_at(int(call))
                work(Path(room))
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


# The test


class Workers:
    """The process that forks workers."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.model.resume.test_kill"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, room: Path, *, kill_after: float | None = None, kill_at: int = 0) -> bool:
        """Runs a worker and returns whether it was killed, by this test or by itself, before it was done."""
        self.process.stdin.write(f"{kill_at} {room}\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            # The number is not another process's: the parent may have waited for this one, but it has forked no other.
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                kill_after = None
        code = int(self.process.stdout.readline())
        assert code == 0 or (code == -signal.SIGKILL and (kill_after is not None or kill_at)), code
        return code != 0


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers()
    yield started
    started.process.stdin.close()
    assert started.process.wait(timeout=120) == 0


@pytest.fixture(scope="module")
def unbroken(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """The sha256 of the film of a run that nobody kills, and the seconds that the run took."""
    assert not workers.run(tmp_path_factory.mktemp("first"))  # also waits until the process has its imports
    room = tmp_path_factory.mktemp("unbroken")
    started = time.perf_counter()
    assert not workers.run(room)
    seconds = time.perf_counter() - started
    assert num_frames(room / "film.mp4") == 1 + SEGMENTS * BLOCKS
    return hashlib.sha256((room / "film.mp4").read_bytes()).hexdigest(), seconds


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert [frame.pts * frame.time_base * FPS for frame in frames] == list(range(len(frames)))
    return len(frames)


def finished(room: Path) -> tuple[int, int]:
    """Reads everything of a run that was killed and returns the numbers of its segments and pieces."""
    try:
        state = RunState.open(room / "run")
    except InputError as error:
        if "does not exist" not in str(error) and "no run was begun" not in str(error):
            raise
        # Killed before there was a job: nothing else is there.
        assert not list(room.glob("run/*.safetensors")) + list(room.glob("run/*.mp4"))
        return 0, 0
    with state:
        assert state.job["request"] == JOB["request"]
        there = [state.load(name) is not None for name in ("inputs", "motion", "condition")]
        assert there == sorted(there, reverse=True)
        segments, problems = state.finished_segments([(1, 4, BLOCKS, 4, 4)] * SEGMENTS)
        assert state.damaged == problems == []
        assert all(torch.equal(blocks, made(number)) for number, blocks in enumerate(segments, start=1))
        assert len(segments) == len(list(room.glob("run/segment-*.safetensors")))
    writer = VideoWriter(room / "film.mp4", SIZE, SIZE, FPS, pieces=room / "run", run=state.digest)
    assert writer.damaged == []
    assert writer.num_pieces == len(list(room.glob("run/piece-*.mp4")))
    assert writer.num_pieces <= len(segments) + 1
    if writer.num_pieces:
        film = room / "film.mp4"
        assert num_frames(writer.partial_path if writer.partial_path.exists() else film) >= writer.num_frames
    return len(segments), writer.num_pieces


def ended_well(room: Path, film: str) -> None:
    """Checks that the film is there, and nothing that a killed worker had begun."""
    assert hashlib.sha256((room / "film.mp4").read_bytes()).hexdigest() == film
    assert finished(room) == (SEGMENTS, SEGMENTS + 1)
    assert sorted(path.name for path in room.iterdir()) == ["film.mp4", "run"]
    assert not list((room / "run").glob(".*"))


def test_a_run_that_is_killed_at_any_time_goes_on(
    workers: Workers, unbroken: tuple[str, float], tmp_path: Path
) -> None:
    film, seconds = unbroken
    chance = random.Random(5)
    killed, room, moments, longest = 0, tmp_path / "0", [], 0.4 * seconds
    room.mkdir()
    while killed < KILLS:
        if workers.run(room, kill_after=chance.uniform(0, longest)):
            killed += 1
            moments.append(finished(room))
            if moments[-2:] == 2 * moments[-1:]:
                longest *= 1.5  # the machine is slower now
        else:
            longest *= 0.8
            ended_well(room, film)
            room = tmp_path / str(killed)
            room.mkdir(exist_ok=True)
    assert not workers.run(room)
    ended_well(room, film)
    assert len(set(moments)) > KILLS // 4  # they were killed at different stages


def test_a_run_that_is_killed_at_its_file_operations_goes_on(
    workers: Workers, unbroken: tuple[str, float], tmp_path: Path
) -> None:
    """Workers that kill themselves at their first to eighth flush, rename or removal lose nothing finished."""
    progress = [(0, 0)]
    for number in range(200):
        if not workers.run(tmp_path, kill_at=CALLS[number % len(CALLS)]):
            break
        progress.append(finished(tmp_path))
    assert len(progress) > 20
    assert progress == sorted(progress)  # nothing that was finished is ever lost
    ended_well(tmp_path, unbroken[0])


if __name__ == "__main__":
    serve()
