"""The pages on architecture and contributing: every name that they cite is there, and what they say of files is so."""

from __future__ import annotations

import ast
import functools
import keyword
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import bench
from bench.__main__ import main
from bench.harness.registry import benchmarks
from tests.support.added_module import added_module
from tests.support.import_graph import places

ROOT = Path(__file__).parent.parent
CODE = ("swifti2v_kernels", "model", "bench", "tests", "hub", "examples")
PAGES = ["architecture", "contributing"]
#: Words in code spans that are neither files nor names of this repository.
ELSEWHERE = {
    "NAME", "CC", "DIR", "PHOTO", "GB", "MB", "slow", "gpu", "ttsem", "opcheck", "benchmark", "before", "after", "auto",
    "torch", "triton", "einops", "numpy", "torch.compile", "WanTransformerBlock",
}  # fmt: skip
#: Lines that a file may have more or fewer than the reading order says.
DRIFT = 40


def text_of(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text()


def prose(page: str) -> str:
    """Returns the page without its blocks of code, and links as what they show."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def rows(page: str) -> Iterator[list[str]]:
    """Yields the cells of every row of the page's tables."""
    for line in prose(page).splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def is_name(span: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", span) is not None and not keyword.iskeyword(span)


@functools.cache
def defined(path: Path) -> frozenset[str]:
    """Returns the functions, classes, methods and values of a file, as ``name`` and as ``Class.name``."""
    found: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            names: list[str] = []
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.append(node.name)
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                names += [leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name)] if target else []
            found.update(prefix + name for name in names)
            found.update(names)
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{node.name}.")

    walk(ast.parse(path.read_text()).body, "")
    return frozenset(found)


@functools.cache
def known() -> frozenset[str]:
    """Returns all names that the repository's code defines, and those of its modules and folders."""
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    names = {name for path in files for name in defined(path)} | {path.stem for path in files}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return frozenset(names | modules | {path.parent.name for path in files})


def test_files_to_begin_with_are_in_the_folder_of_their_row() -> None:
    for cells in rows("architecture"):
        folder, *others = (spans(cells[0]) or [""])[0], *cells[1:]
        if folder.endswith("/") and (last := spans(others[-1])):
            assert all((ROOT / folder / name).is_file() for name in last if "." in name and "/" not in name), cells


@pytest.mark.parametrize("page", PAGES)
def test_every_name_is_defined(page: str) -> None:
    """A name that stands beside a file in a table is defined in that file, any other somewhere in the repository."""
    names = {span for span in spans(prose(page)) if is_name(span) and not span.endswith((".py", ".json", ".yml"))}
    unknown = names - known() - ELSEWHERE
    assert not unknown
    checked = 0
    for cells in rows(page):
        for file, names_in_it in pairwise(cells):
            if re.fullmatch(r"`[\w./]+\.py`", file) and re.fullmatch(r"`[\w.]+`(, `[\w.]+`)*", names_in_it):
                cited = set(spans(names_in_it))
                assert cited - defined(ROOT / file.strip("`")) == set(), file
                checked += len(cited)
    assert checked >= {"architecture": 60, "contributing": 6}[page]


def test_every_room_is_on_the_map() -> None:
    folders = [path.parent for package in CODE[:3] for path in (ROOT / package).rglob("__init__.py")]
    cited = set(spans(prose("architecture")))
    assert {f"{folder.relative_to(ROOT)}/" for folder in folders} <= cited


def test_the_reading_order_says_how_long_files_are() -> None:
    told = {cells[0].strip("`"): int(cells[1]) for cells in rows("architecture") if cells[1:2] and cells[1].isdigit()}
    assert len(told) >= 10
    for file, lines in told.items():
        assert abs(len((ROOT / file).read_text().splitlines()) - lines) <= DRIFT, file


def test_parsed_arguments_stand_in_few_places_of_the_model() -> None:
    """Commands hand on what argparse made as frozen settings: it stands in at most 60 places of at most 15 files."""
    found = places(ROOT, "model")
    assert 1 <= found["model.generate"] <= 2  # it is found where it is
    assert found.total() <= 60, found
    assert len(found) <= 15, found


def test_the_example_of_a_benchmark_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = re.findall(r"```python benchmark\n(.*?)```", text_of("contributing"), re.DOTALL)
    with added_module(bench, tmp_path / "more", "command.py", text, benchmarks):
        assert main(["warmth", "--rooms", "3", "--device", "cpu", "--out", str(tmp_path / "results")]) == 0
    out = capsys.readouterr().out
    assert "warmth of rooms" in out
    assert out.count("1.500") == 3
