"""Interruptions of a command while Python imports torch, which takes seconds: one line and exit code 130.

The packages of the commands import this file first, and it imports nothing but small modules of Python's own.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def end_if_interrupted(package: str) -> None:
    """Makes an interruption end this process at once if it is starting as ``python -m PACKAGE`` or a module in it.

    Nothing can be lost then. A program that imports the package keeps its own handling of interruptions, and one that
    the parent process has told this one to ignore stays ignored.
    """
    # While Python finds the module of -m, that is all of sys.argv[0].
    if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
        at = sys.orig_argv.index("-m") + 1
        if sys.orig_argv[at : at + 1] and sys.orig_argv[at].split(".")[0] == package:
            _arm()


@contextmanager
def work_interruptible() -> Iterator[None]:
    """Raises ``KeyboardInterrupt`` at an interruption while the body runs, so that it can put away what it has.

    After the body what was printed is flushed, and an interruption ends the process at once again. Where
    :func:`end_if_interrupted` is not in force, as in tests and other people's programs, signals are left alone.
    """
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()
    finally:
        _arm()


def _arm() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # Neither print nor SystemExit: both could meet a half imported module, which would say more than one line.
    os.write(2, b"interrupted\n")
    os._exit(130)
