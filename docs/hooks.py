"""Hooks of mkdocs that make one text right in two places: as Markdown in the repository, and as a page of the site.

Pages link to source files by relative paths, as a forge wants it. The site does not hold those files: where
``repo_url`` is set in mkdocs.yml such a link leads there, and otherwise it becomes the file's path. A target that does
not exist is a warning, which ``mkdocs build --strict`` turns into a failure.

A fence may carry a second word after its language, by which tests find it. On the site "before" and "after" become the
block's title, and other words go.

Docstrings name objects by roles (``:func:`x```), which Markdown does not know: they become links to the object's
reference, where a page has it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

log = logging.getLogger("mkdocs.hooks.links")

# The first alternatives are text in which nothing is a link.
_LINK = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}).*?(?:^(?P=indent)(?P=fence)[ ]*$|\Z)"
    r"|<!--.*?-->"
    r"|(?P<link>!?\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\))"
    r"|(?P<ticks>`+)[^`].*?(?P=ticks)",
    re.DOTALL | re.MULTILINE,
)
_SECOND_WORD = re.compile(r"^( *(?:`{3,}|~{3,})\w+) +([\w-]+) *$", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?([\w.]+)</code>")

# Short cells of a table: site.css keeps them on one line, and a wide table scrolls.
_FIGURE = re.compile(r"<td>(?=[^<]*\d[^<]*</td>)(?=[^<]{1,36}<)")


class Link(NamedTuple):
    """A link or an image of a Markdown text: what it shows, where it leads, and its line."""

    text: str
    target: str
    line: int


def links(markdown: str) -> Iterator[Link]:
    """Yields the links and images of a Markdown text, without what stands in code and in comments."""
    for match in _LINK.finditer(markdown):
        if match["link"]:
            yield Link(match["text"], match["target"], markdown.count("\n", 0, match.start()) + 1)


def outside(target: str, page: Path) -> Path | None:
    """Returns the file or folder that a link leads to, or None where the site holds the target itself.

    Args:
        target: the link's address.
        page: the page's file, in docs/.
    """
    path = target.partition("#")[0]
    if not path or "://" in target or target.startswith("mailto:"):
        return None
    found = Path(os.path.normpath(page.parent / path))
    return None if found.is_relative_to(DOCS) and found.is_file() and found.suffix in (".md", ".png", ".svg") else found


def with_source_links(markdown: str, page: Path, repo_url: str | None) -> tuple[str, list[str]]:
    """Returns the text with its links to source files as a site has them, and the targets that do not exist."""
    missing: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        found = outside(match["target"], page) if match["link"] else None
        if found is None:
            return match[0]
        if not found.exists() or not found.is_relative_to(ROOT):
            missing.append(match["target"])
            return match[0]
        path = found.relative_to(ROOT).as_posix()
        if repo_url:
            kind = "tree" if found.is_dir() else "blob"
            anchor = match["target"].partition("#")[1:]
            return f"[{match['text']}]({repo_url.rstrip('/')}/{kind}/main/{path}{''.join(anchor)})"
        name = match["text"].strip("`")
        return f"`{path}`" if path.endswith(name.rstrip("/")) else f"{match['text']} (`{path}`)"

    return _LINK.sub(replaced, markdown), missing


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Gives a page's text the links of the site; a hook that mkdocs calls."""
    text, missing = with_source_links(markdown, DOCS / page.file.src_uri, config.repo_url)
    for target in missing:
        log.warning("%s: the link to %s leads to nothing in the repository", page.file.src_uri, target)
    return _SECOND_WORD.sub(lambda m: m[1] + (f' title="{m[2]}"' if m[2] in ("before", "after") else ""), text)


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Gives a page the links that its docstrings' roles stand for, and unbroken figures; a hook that mkdocs calls."""

    def linked(match: re.Match[str]) -> str:
        path = match[1] if "." in match[1] else f"swifti2v_kernels.{match[1]}"
        return f'<autoref identifier="{path}" optional><code>{path.rpartition(".")[2]}</code></autoref>'

    return _FIGURE.sub('<td class="figure">', _ROLE.sub(linked, html))
