"""Out-of-bounds accesses, races and reads of unwritten memory, found by executing the compiled kernels on the CPU.

    python -m ttsem.sanitize pytest tests/sanitizer

ttsem (pinned in the ``sanitize`` extra) runs what Triton's front end produces, checks every access against the tensor
it belongs to, and compares what two programs touch. Plain ``pytest -m slow`` starts it in a process of its own where it
is installed (tests/test_processes.py).
"""

from __future__ import annotations

import sys

import pytest

if "ttsem" not in sys.modules:
    raise pytest.UsageError("tests/sanitizer runs by: python -m ttsem.sanitize pytest tests/sanitizer")
