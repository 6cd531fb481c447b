"""docs/compatibility.md is what the tests say."""

from __future__ import annotations

import pytest

from tests.conftest import COMPATIBILITY
from tests.support import compatibility


def test_the_page_is_made_from_the_stored_results() -> None:
    rows = compatibility.load()
    assert rows
    assert compatibility.PAGE.read_text() == compatibility.render(rows)
    assert all(row["passed"] for row in rows)


def test_every_pair_that_is_tested_is_in_the_table(request: pytest.FixtureRequest) -> None:
    """Every pair of the tests collected in this session is in the table; the interpreter's are another session's."""
    stored = {(row["model"], row["feature"]) for row in compatibility.load()}
    assert request.config.stash[COMPATIBILITY] <= stored, "run pytest --compatibility"


def test_a_failure_and_a_second_version_are_seen_in_the_page() -> None:
    row = {"model": "A", "feature": "attention", "version": "1.9", "torch": "2.6.0", "passed": True}
    rows = [row | {"version": version} for version in ("1.9", "1.10", "1.11")]
    rows.append(row | {"version": "1.12", "passed": False})
    rows += [row | {"model": "B", "feature": "LoRA", "version": version} for version in ("1.9", "1.11")]
    page = compatibility.render(rows)
    assert "| A | 1.9 to 1.11, FAILED under 1.12 |  |" in page
    assert "| B |  | 1.9, 1.11 |" in page
    with pytest.raises(pytest.UsageError, match="unknown feature 'magic'"):
        compatibility.render([row | {"feature": "magic"}])
