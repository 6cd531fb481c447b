"""Sizes are read and written as people do."""

from __future__ import annotations

import pytest

from model import InputError
from model.machine.measure import format_bytes, parse_bytes

GB = 10**9


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * GB), ("4 GiB", 2**32), ("500mb", 5 * 10**8), ("1500k", 1500000), ("1000000", 10**6)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes("limit", text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [(text, "such as 12GB, 12GiB or 500MB, got") for text in ("", "4GG", "-1GB", "12\u212a")]
    + [(text, "from 1MB to 1000TB") for text in ("0", "1001TB", "9" * 400)]
    + [("8", r".*, got '8', which is bytes; did you mean 8GB\?$")],
)
def test_other_sizes_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^limit: expected a size {message}"):
        parse_bytes("limit", text)


def test_bytes_are_told_in_decimal_units() -> None:
    assert [format_bytes(size) for size in (0, 4_100_000, 4 * GB, 21.1e9)] == ["0.0 MB", "4.1 MB", "4.00 GB", "21.1 GB"]
