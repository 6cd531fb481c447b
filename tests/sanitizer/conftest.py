"""Tests of this folder need the sanitizer around them: ``python -m ttsem.sanitize pytest tests/sanitizer``."""

from __future__ import annotations

import sys

import pytest

if "ttsem" not in sys.modules:
    raise pytest.UsageError("tests/sanitizer runs by: python -m ttsem.sanitize pytest tests/sanitizer")
