"""HTML and SVG whose text is escaped, control characters too: only what :func:`tag` has built passes as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from model.errors import printable

#: Elements that have no end tag.
_VOID = ("br", "input", "link", "meta")


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """Returns one element of a page as HTML.

    Args:
        name: name of the element.
        children: text, which is escaped, markup, or lists of these; None is nothing.
        attributes: ``class_`` is ``class`` and ``data_value`` is ``data-value``; None and False leave one out, True
            writes its name alone.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{html.escape(printable(str(value)))}"')
    start = f"<{name}{''.join(written)}>"
    return Markup(start if name in _VOID else f"{start}{join(children)}</{name}>")


def join(children: Iterable[Any], between: str = "") -> Markup:
    """Returns children one after the other."""
    return Markup(between.join(_child(child) for child in children))


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, (list, tuple)):
        return join(child)
    return html.escape(printable(str(child)))
