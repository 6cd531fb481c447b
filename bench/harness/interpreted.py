"""The part of a benchmark that runs in Triton's interpreter: a process of its own, since Triton is set up once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from bench.harness.session import RESULT, Session
from bench.records.read import ROOT
from model.errors import InputError


def run_interpreted(session: Session, what: str) -> None:
    """Runs the same command with ``TRITON_INTERPRET=1`` and takes over its tables.

    Args:
        session: the run of the command.
        what: what is checked there, for people.

    Raises:
        InputError: a check failed there.
    """
    session.say(f"checking {what} in Triton's interpreter")
    folder = session.folder / "interpreted"
    path = folder / RESULT
    path.unlink(missing_ok=True)  # of an earlier run
    # Of options that are given twice the later one counts.
    more = ["--out", str(folder.resolve()), "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "bench", *session.args.argv, *more]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True
    )
    if path.exists():
        (section,) = json.loads(path.read_text())["sections"].values()
        session.section.set(tables=[*session.section.data["tables"], *section["tables"]])
    if done.returncode:
        raise InputError(f"the check of {what} in the interpreter failed; see {folder}")
