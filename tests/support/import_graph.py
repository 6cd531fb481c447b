"""The graph of imports of a package, lazy ones and those for type checking too, and its places of parsed arguments."""

from __future__ import annotations

import ast
import functools
from collections import Counter
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


def places(root: Path, package: str) -> Counter[str]:
    """Returns for each module of a package in how many places there is an ``argparse.Namespace``.

    A place is a call of ``parse_args``, a parameter that is annotated so, and every use of such a parameter or of a
    variable that such a call is assigned to: what reads an attribute and what hands it on, also in inner functions.
    """
    found: Counter[str] = Counter()
    for module, file in modules(root, package).items():
        functions = [node for node in ast.walk(parsed(file)) if isinstance(node, ast.FunctionDef)]
        inner = {below for node in functions for below in ast.walk(node) if below is not node}
        for function in functions:
            if function not in inner:
                nodes = list(ast.walk(function))
                held = {node.arg for node in nodes if isinstance(node, ast.arg) and _is_namespace(node)}
                held |= {ast.unparse(n.targets[0]) for n in nodes if isinstance(n, ast.Assign) and _parses(n.value)}
                names = [
                    n.id if isinstance(n, ast.Name) else n.arg for n in nodes if isinstance(n, (ast.Name, ast.arg))
                ]
                found[module] += sum(name in held for name in names) + sum(map(_parses, nodes))
    return +found


def _is_namespace(argument: ast.arg) -> bool:
    return argument.annotation is not None and "Namespace" in ast.unparse(argument.annotation)


def _parses(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("parse_args", "parse_known_args")
