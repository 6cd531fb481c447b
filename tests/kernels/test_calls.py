"""The argument list of an operator is written down in few places."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "swifti2v_kernels"
#: A list names at least so many tensors of the public function's.
LEAST = 4
PUBLIC = "the public functions"


def lists(file: Path) -> Iterator[tuple[str, set[str]]]:
    """Yields signatures, classes and schemas of a file, each with the tensors in it; public functions are one."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            public = any("public_operator" in ast.unparse(decorator) for decorator in node.decorator_list)
            arguments = [*node.args.args, *node.args.kwonlyargs]
            if public:
                arguments = [a for a in arguments if re.search("Tensor|Rows|Rope|Source", ast.unparse(a.annotation))]
            yield PUBLIC if public else node.name, {a.arg.lower() for a in arguments}
        elif isinstance(node, ast.ClassDef):
            yield node.name, {ast.unparse(x.target) for x in node.body if isinstance(x, ast.AnnAssign)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("(Tensor"):
            yield "the schema", set(re.findall(r"\w+", node.value))


def tensors(file: Path) -> set[str]:
    """Returns the names of all tensors that the public functions of a file take."""
    return set().union(*(names for label, names in lists(file) if label == PUBLIC))


#: Operators are in two files, ``NAME.py`` and ``NAME_kernel.py``; attention is in more.
FILES = {
    file.stem: [file, *file.parent.glob(f"{file.stem}_kernel.py")]
    for family in ("conv", "linear", "norm", "window")
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
    assert PUBLIC in found
    assert len(found) <= 4, found
