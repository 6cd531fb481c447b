"""An interruption of ``python -m swifti2v_kernels``, which only reads and prints: one line and exit code 130."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def end_if_interrupted(package: str) -> None:
    """Makes an interruption end this process at once if it is starting as ``python -m PACKAGE``.

    A program that imports the package keeps its own handling of interruptions, and one that the parent process has told
    this one to ignore stays ignored.
    """
    # While Python finds the module of -m, that is all of sys.argv[0].
    started = sys.argv[:1] == ["-m"] and ("-m", package) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    if started and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)
