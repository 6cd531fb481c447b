"""Sizes are read and written as people do."""

from __future__ import annotations

import pytest

from model import InputError
from model.machine.measure import format_bytes, parse_bytes

GB = 10**9


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * GB), ("4 GiB", 2**32), ("500mb", 5 * 10**8), ("1.5k", 1500), ("77", 77)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes("limit", text) == size


@pytest.mark.parametrize("text", ["", "four", "4GG", "0", "-1GB", "4ib"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="limit: expected a size such as 12GB"):
        parse_bytes("limit", text)


def test_bytes_are_told_in_decimal_units() -> None:
    assert [format_bytes(size) for size in (0, 4_100_000, 4 * GB, 21.1e9)] == ["0.0 MB", "4.1 MB", "4.00 GB", "21.1 GB"]
