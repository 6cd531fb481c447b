"""docs/compatibility.md is what the tests say."""

from __future__ import annotations

import pytest

from tests.conftest import COMPATIBILITY
from tests.support import compatibility


def test_the_page_is_made_from_the_stored_results() -> None:
    rows = compatibility.load()
    assert rows
    assert compatibility.PAGE.read_text() == compatibility.render(rows)


def test_every_pair_that_is_tested_is_in_the_table(request: pytest.FixtureRequest) -> None:
    """Every pair of the tests collected in this session is in the table; the interpreter's are another session's."""
    stored = {(row["model"], row["feature"]) for row in compatibility.load()}
    assert request.config.stash[COMPATIBILITY] <= stored, "run pytest --compatibility"
