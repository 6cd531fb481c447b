"""The argument list of an operator is written down in few places."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "swifti2v_kernels"
#: Operators of two files, ``NAME.py`` and ``NAME_kernel.py``.
FAMILIES = ("conv", "linear", "norm", "window")
#: A list names at least so many tensors of the public function's.
LEAST = 4


def is_public(node: ast.FunctionDef) -> bool:
    return any("public_operator" in ast.unparse(decorator) for decorator in node.decorator_list)


def tensors(file: Path) -> set[str]:
    """Returns the names of all tensors that the public functions of a file take."""
    functions = [f for f in ast.parse(file.read_text()).body if isinstance(f, ast.FunctionDef) and is_public(f)]
    arguments = [a for f in functions for a in (*f.args.args, *f.args.kwonlyargs) if a.annotation is not None]
    return {a.arg for a in arguments if re.search("Tensor|Rows|Rope|Source", ast.unparse(a.annotation))}


def lists(file: Path) -> Iterator[tuple[str, set[str]]]:
    """Yields signatures, classes and schemas of a file, each with the names in it; public functions are one."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            names = {a.arg.lower() for a in (*node.args.args, *node.args.kwonlyargs)}
            yield "the public functions" if is_public(node) else node.name, names
        elif isinstance(node, ast.ClassDef):
            yield node.name, {ast.unparse(x.target) for x in node.body if isinstance(x, ast.AnnAssign)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("(Tensor"):
            yield "the schema", set(re.findall(r"\w+", node.value))


FILES = {
    file.stem: [file, *file.parent.glob(f"{file.stem}_kernel.py")]
    for family in FAMILIES
    for file in sorted((PACKAGE / family).glob("*.py"))
    if len(tensors(file)) >= LEAST
}
FILES["segment_attention"] = [
    PACKAGE / "attention" / f"{name}.py"
    for name in ("segment_attention", "arguments", "choice", "reference", "portable", "hopper")
]


@pytest.mark.parametrize("operator", FILES)
def test_an_argument_list_stands_at_most_four_times(operator: str) -> None:
    """The lists are those of the public functions, the call, the registered operator and the kernel."""
    names = tensors(FILES[operator][0])
    found = {label for file in FILES[operator] for label, named in lists(file) if len(names & named) >= LEAST}
    assert "the public functions" in found
    assert len(found) <= 4, found
