"""Tests of this folder run the kernels in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreter``.

Triton decides at its first import whether it interprets, so they need a process of their own.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 in the environment")
