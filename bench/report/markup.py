"""The templates of the page and of charts: all text in them is escaped, control characters too, but for Markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from model.errors import printable

HERE = Path(__file__).parent


def shown(value: Any) -> Any:
    """Returns what stands for a value: markup as it is, nothing for None, and text without control characters."""
    return value if isinstance(value, Markup) else "" if value is None else printable(str(value))


def source(name: str) -> Markup:
    """Returns the text of a style or a script in this folder, which is put in as it is."""
    return Markup((HERE / name).read_text())


TEMPLATES = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, finalize=shown, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
TEMPLATES.globals["source"] = source


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """Returns one element of a chart or of a table's cell.

    Args:
        name: name of the element.
        children: text, which is escaped, or markup; None is nothing.
        attributes: ``class_`` is ``class`` and ``text_anchor`` is ``text-anchor``; None leaves one out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    start = "".join(f' {key}="{escape(shown(value))}"' for key, value in given.items())
    return Markup(f"<{name}{start}>{''.join(escape(shown(child)) for child in children)}</{name}>")
