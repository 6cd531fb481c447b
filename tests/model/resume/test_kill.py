"""A run may be killed with SIGKILL wherever files change: its film is readable at any time, and comes out the same.

A process of its own forks the runs, so that each starts in milliseconds and with a single thread:
``python -m tests.model.resume.test_kill ROOM``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model.generate import main
from tests.model.resume.test_clip import FRAMES, OPTIONS, ROOT, digest, frames_of
from tests.support.memory_requests import predict_nothing


def killing_at(call: int) -> None:
    """Makes this process kill itself before its file operation number ``call``, counted from now on."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def ended(room: Path, photo: Path, call: int = 0) -> bool:
    """Forks a run that kills itself at a file operation, or not at all (0); returns whether it came to its end."""
    state = room / "clip.run"
    begun = (state / "job.json").exists()
    given = ["--resume", str(state)] if begun else [str(photo), "--out", str(room / "clip.mp4"), *OPTIONS]
    pid = os.fork()
    if pid == 0:
        # It must not return: what follows is its parent's.
        try:
            if call:
                killing_at(call)
            os._exit(main(given))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0 or (code == -signal.SIGKILL and call), code
    return code == 0


def go_on_until_the_end(room: Path) -> None:
    """Forks runs until one is through, and checks after each that no finished frame is lost."""
    photo, whole, broken, films = room / "photo.png", room / "whole", room / "broken", [0]
    Image.effect_mandelbrot((96, 64), (-3, -2.5, 2, 2.5), 50).convert("RGB").save(photo)
    assert ended(whole, photo)
    while not ended(broken, photo, call=len(films)):
        partial = broken / "clip.partial.mp4"
        films.append(frames_of(partial) if partial.exists() else 0)
        assert films[-1] in (0, *FRAMES)
        assert films[-2] <= films[-1] or (broken / "clip.mp4").exists()
        assert len(films) < 50
    assert len(films) > 10
    assert digest(broken / "clip.mp4") == digest(whole / "clip.mp4")
    # Nothing is left that a killed run had begun.
    assert [path.name for path in broken.iterdir()] == ["clip.mp4"]


@pytest.mark.slow
def test_a_run_that_is_killed_at_its_file_operations_goes_on(tmp_path: Path) -> None:
    """Runs that kill themselves, each a flush, rename or removal later than the last, lose nothing finished."""
    command = [sys.executable, "-m", "tests.model.resume.test_kill", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        predict_nothing(patch)
        go_on_until_the_end(Path(sys.argv[1]))
