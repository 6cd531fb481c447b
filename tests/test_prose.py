"""Prose of the code: docstrings stand alone, and one word has one meaning."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("swifti2v_kernels", "model", "bench", "hub", "examples")
FOLDERS = (*PRODUCT, "tests")

#: A docstring that begins so goes on from the name above it, and says nothing without it.
FRAGMENT = re.compile(
    r"(Of|As|By|From|With|For|In|On|At|Against|Within|Behind|Beside|Beyond|Under|Around|Between|Over|To|And|Or|But|Also"
    r"|Whether|What|Which|Who|Why|How|Where|When|So|That|Those|Its|Both|Without|After|Before|Because|If|Than|Then|Such"
    r"|Not)\b"
)
#: A function does something: its docstring begins with a verb, or with what looks like one.
VERB = re.compile(
    r"(?!(Bytes|Seconds|Rows|Columns|Frames|Tokens|Tiles|Tensors|Weights|Blocks|Layers|Latents|Operations|Times|Parts"
    r"|Names|Keys|Values|Queries|Numbers|Files|Entries|Elements|Channels|Modules|Tables|Arguments|Slices|Kernels"
    r"|Operators|Inputs|Results|Ours|This|Various|Others|Less|Always|Perhaps|Texts|Pixels|Shapes|Sizes|Steps)\b)"
    r"[A-Z][a-z-]*s\b"
)
#: Words with a better one: what they are in this project, and what to write instead.
WORDS = {
    r"\bbehind\b": "before or after in time; else 'after', 'from ... on', 'hidden by'",
    r"--storage\b": "--quantize",
    r"--products\b": "--matmul",
}


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any("property" in name or "fixture" in name for name in names)


def docstrings(path: Path) -> Iterator[tuple[int, str, bool, str]]:
    """Yields line, name, whether it is a function's, and text of every docstring in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _is_property(node)
                yield getattr(node, "lineno", 1), getattr(node, "name", path.stem), function, text


def faults(text: str, function: bool) -> Iterator[str]:
    """Yields what is wrong with a docstring; ``function``: it is that of a function of the product."""
    summary = text.split("\n\n")[0]
    words = summary.split()
    if FRAGMENT.match(summary):
        yield f"begins with {words[0]!r}, which needs something before it"
    if len(words) < 3:
        yield "is too short to be understood without the name"
    if not re.search(r"[.:?!][`)\"']*$", summary):
        yield "has a summary that does not end with a full stop"
    if function and not VERB.match(summary):
        yield f"begins with {words[0]!r} instead of a verb such as 'Returns' or 'Writes'"


def offenders(path: Path) -> Iterator[str]:
    """Yields a line for each fault of a file."""
    place = path.relative_to(ROOT)
    product = place.parts[0] in PRODUCT
    for line, name, function, text in docstrings(path):
        for fault in faults(text, function and product):
            yield f"{place}:{line}: {name}: the docstring {fault}: {text.splitlines()[0]}"
    if path == Path(__file__).resolve():
        return
    for line, code in enumerate(path.read_text().splitlines(), start=1):
        for word, better in WORDS.items():
            if re.search(word, code):
                yield f"{place}:{line}: {re.search(word, code)[0]!r}, which should be {better}: {code.strip()}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_stand_alone_and_words_have_one_meaning(folder: str) -> None:
    """Every docstring below a folder is a sentence without its name, and no word is used that has a better one."""
    found = [line for path in sorted((ROOT / folder).rglob("*.py")) for line in offenders(path)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Of all.", "begins with 'Of'"),
        ("Copies.", "too short"),
        ("Seconds of one pass.", "instead of a verb"),
        ("Returns the seconds of a pass", "full stop"),
    ],
)
def test_the_lint_finds_a_fragment(text: str, fault: str) -> None:
    """The commonest fragments are found, so that the test above can fail."""
    assert any(fault in found for found in faults(text, function=True))
    assert not list(faults("Returns the seconds of a pass over all layers.", function=True))
