"""The graph of imports, read from the sources: lazy imports and those for type checking count too."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path


def imported(file: Path, module: str, everywhere: bool = True) -> Iterator[tuple[str, str | None, int]]:
    """Yields (module, name in it or None, number of leading dots) of every import in a file, dots resolved.

    Args:
        file: the source.
        module: its dotted name.
        everywhere: whether to look inside functions, classes and conditions too.
    """
    tree = parsed(file)
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((base, alias.name, node.level) for alias in node.names)


@functools.cache
def parsed(file: Path) -> ast.Module:
    """Returns the syntax tree of a file, which is parsed once."""
    return ast.parse(file.read_text())


def modules(root: Path, package: str) -> dict[str, Path]:
    """Returns the files of a package by dotted name."""
    names = {}
    for file in (root / package).rglob("*.py"):
        names[".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = file
    return names


def graph(root: Path, package: str) -> dict[str, set[str]]:
    """Returns the modules of a package that each of them imports, by module."""
    known = modules(root, package)
    edges: dict[str, set[str]] = {}
    for module, file in known.items():
        found = {f"{base}.{name}" if f"{base}.{name}" in known else base for base, name, _ in imported(file, module)}
        edges[module] = (found & known.keys()) - {module}
    return edges
