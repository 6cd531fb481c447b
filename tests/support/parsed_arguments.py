"""Counts the places of a package's sources where there are parsed arguments of a command."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from tests.support.import_graph import modules, parsed


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
