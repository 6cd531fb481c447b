"""Runs may be killed with SIGKILL wherever files change: what is there is readable, and the film comes out the same.

A process of its own forks the workers, so that each starts in milliseconds and with a single thread:
``python -m tests.model.resume.test_kill ROOM``.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
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
#: The file operations, by number, at which workers kill themselves in turns.
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
        segments = state.finished_segments([(1, 4, BLOCKS, 4, 4)] * SEGMENTS)
        writer = VideoWriter(room / "film.mp4", SIZE, SIZE, FPS, pieces=room / "run", run=state.digest)
        if state.damaged or writer.damaged:
            raise RuntimeError(f"{state.damaged}, {writer.damaged}")
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


def ended(room: Path, call: int = 0) -> bool:
    """Forks a worker that kills itself at a file operation, or not at all (0); returns whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        # The worker must not return: what follows is its parent's.
        try:
            if call:
                killing_at(call)
            work(room)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0 or (code == -signal.SIGKILL and call), code
    return code == 0


# The test


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
        segments = state.finished_segments([(1, 4, BLOCKS, 4, 4)] * SEGMENTS)
        assert state.damaged == []
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


def digest(film: Path) -> str:
    return hashlib.sha256(film.read_bytes()).hexdigest()


def go_on_until_the_end(room: Path) -> None:
    """Forks workers until one is through, and checks after each that nothing finished is lost."""
    whole, broken, progress = room / "whole", room / "broken", [(0, 0)]
    assert ended(whole)
    assert num_frames(whole / "film.mp4") == 1 + SEGMENTS * BLOCKS
    while not ended(broken, CALLS[len(progress) % len(CALLS)]):
        progress.append(finished(broken))
        assert progress[-2] <= progress[-1]
        assert len(progress) < 200
    assert len(progress) > 20
    assert digest(broken / "film.mp4") == digest(whole / "film.mp4")
    assert finished(broken) == (SEGMENTS, SEGMENTS + 1)
    # Nothing is left that a killed worker had begun.
    assert sorted(path.name for path in broken.iterdir()) == ["film.mp4", "run"]
    assert not list((broken / "run").glob(".*"))


def test_a_run_that_is_killed_at_its_file_operations_goes_on(tmp_path: Path) -> None:
    """Workers that kill themselves at their first to eighth flush, rename or removal lose nothing finished."""
    command = [sys.executable, "-m", "tests.model.resume.test_kill", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    go_on_until_the_end(Path(sys.argv[1]))
