"""A module added to a package for the time of a test: whatever finds modules by their being there must find it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch


@contextmanager
def added_module(
    package: ModuleType, folder: Path, file: str, text: str, found: Callable[[], object]
) -> Iterator[None]:
    """Adds ``extra/FILE`` with this text to the package's path; the cached search ``found`` must not remember it."""
    (folder / "extra").mkdir(parents=True, exist_ok=True)
    (folder / "extra" / file).write_text(text)
    importlib.invalidate_caches()
    found.cache_clear()  # type: ignore[attr-defined]
    try:
        with patch.object(package, "__path__", [*package.__path__, str(folder)]):
            yield
    finally:
        found.cache_clear()  # type: ignore[attr-defined]
        for name in ("extra", f"extra.{file.removesuffix('.py')}"):
            sys.modules.pop(f"{package.__name__}.{name}", None)
        package.__dict__.pop("extra", None)
