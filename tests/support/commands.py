"""Commands run as ``python -m`` runs them, all from one process that has imported torch and ``model`` once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
#: Imports what all need, then forks for every command. ``runpy`` is what ``-m`` calls.
SOURCE = """
import json, os, runpy, sys
import model
for number, (module, *arguments) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[2]}/{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def git(folder: Path, *arguments: str) -> str:
    """Runs git in a folder, as somebody, and returns what it printed."""
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


class Ended(NamedTuple):
    """A command that has ended: its exit code and all that it printed."""

    code: int
    out: str
    err: str


def run_modules(room: Path, *commands: Sequence[str]) -> list[Ended]:
    """Runs ``[module, argument, ...]`` as ``python -W error::RuntimeWarning -m module argument ...`` from the root.

    Files that hold what was printed are written to ``room``.
    """
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", SOURCE, json.dumps(commands), str(room)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = [int(line) for line in done.stdout.split()]
    printed = [[(room / f"{number}.{name}").read_text() for name in ("out", "err")] for number in range(len(commands))]
    return [Ended(code, *texts) for code, texts in zip(codes, printed, strict=True)]
