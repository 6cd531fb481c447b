"""The tests that need a process of their own: Triton decides at its first import what it is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(command: list[str], **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_kernels_in_the_interpreter() -> None:
    """tests/interpreter: numbers of every kernel over awkward shapes, on the CPU."""
    run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreter"], TRITON_INTERPRET="1")


@pytest.mark.skipif(
    importlib.util.find_spec("ttsem") is None,
    reason="the sanitizer is optional: pip install --no-deps --ignore-requires-python ttsem==0.1.0",
)
def test_kernels_under_the_sanitizer() -> None:
    """tests/sanitizer: out-of-bounds accesses and races."""
    run(["-m", "ttsem.sanitize", "pytest", "-q", "-p", "no:cacheprovider", "tests/sanitizer"])
