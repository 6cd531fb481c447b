"""A reader of HTML and SVG that fails where elements do not close in order."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Reader(HTMLParser):
    """Checks that elements close in order, and collects what is asked for."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attributes: Any) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in ("br", "input", "link", "meta"):
            self.open.append(self.elements[-1])

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop()[0] == name

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1][0], data))

    def count(self, name: str, **wanted: str) -> int:
        """Counts elements with these words in their attributes."""
        return sum(
            element == name
            and all(value in (found.get(key.rstrip("_")) or "").split() for key, value in wanted.items())
            for element, found in self.elements
        )

    def all_text(self) -> str:
        """Returns the text that is read, without styles and scripts."""
        return " ".join(text for name, text in self.texts if name not in ("style", "script"))
