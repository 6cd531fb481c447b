"""The library as a kernel of the Hugging Face Hub: gathered by hub/gather.py and loaded by ``kernels``."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import swifti2v_kernels
from hub.gather import GatherError, gather, main

ROOT = Path(__file__).resolve().parents[2]
PROCESS = Path(__file__).with_name("hub_process.py")
PACKAGE = ROOT / "swifti2v_kernels"
#: float32 against float64.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, gathered once."""
    out = tmp_path_factory.mktemp("hub")
    gather(out)
    return out


def changed_package(folder: Path, name: str, text: str) -> Path:
    """Returns a copy of the package with ``text`` at the end of one of its files."""
    copy = shutil.copytree(PACKAGE, folder / "swifti2v_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / name).open("a") as file:
        file.write(text)
    return copy


def loaded(backend: str, *folders: Path, installed: bool = False) -> list[dict[str, Any]]:
    """Returns what a process without the library, or with it after them, says of each copy that it loads.

    Without it, it has no numpy either, but for Triton's interpreter, which is written in it.
    """
    pytest.importorskip("kernels", reason="loads kernels of the Hugging Face Hub: pip install kernels")
    environment = {**os.environ, "TRITON_INTERPRET": "01"[backend == "triton"], "HF_HUB_OFFLINE": "1"}
    blocked = [] if installed else ["swifti2v_kernels", *(["numpy"] if backend == "torch" else [])]
    # Isolated: neither the folder it starts in nor PYTHONPATH is looked into.
    command = [sys.executable, "-I", PROCESS, backend, ",".join(blocked), str(ROOT) if installed else "-", *folders]
    result = subprocess.run(command, env=environment, cwd=folders[0], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    copies = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(copy["error"] < TOLERANCE and copy["measurements"] > 0 for copy in copies)
    return copies


def identifiers(folder: Path) -> set[str]:
    return {json.loads(path.read_text())["id"] for path in folder.glob("build/*/metadata.json")}


def test_gathered_is_the_library_without_what_is_left_out(gathered: Path) -> None:
    """Each build holds all files of the library but CSG, integrations, cases and the command."""
    assert {path.name for path in gathered.iterdir()} == {"build.toml", "CARD.md", "LICENSE", "torch-ext", "build"}
    builds = [gathered / "torch-ext" / "swifti2v_kernels", *sorted((gathered / "build").iterdir())]
    assert [build.name for build in builds[1:]] == ["torch-cpu", "torch-cuda"]
    wanted = {
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".json", ".typed")
        and path.name not in ("case.py", "cases.py", "__main__.py")
        and path.relative_to(PACKAGE).parts[0] not in ("csg", "integrations")
    }
    for build in builds:
        found = {path.relative_to(build) for path in build.rglob("*") if path.is_file()}
        assert found - {Path("metadata.json")} == wanted
    assert len(identifiers(gathered)) == 2


def test_gathered_init_names_what_is_there(gathered: Path) -> None:
    text = (gathered / "torch-ext" / "swifti2v_kernels" / "__init__.py").read_text()
    tree = ast.parse(text)
    names = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    public = next(ast.literal_eval(node.value) for node in tree.body if ast.unparse(node).startswith("__all__"))
    assert names | {"__version__"} == set(public)
    left_out = set(swifti2v_kernels.__all__) - set(public)
    assert left_out >= {"SegmentPlan", "sample_segments"}


def test_operators_are_named_as_kernel_builder_wants() -> None:
    """The first argument of torch.library's functions is a call of the function that kernel-builder looks for."""
    sources = [file.read_text() for file in PACKAGE.rglob("*.py")]
    named = [text for source in sources for text in re.findall(r"torch\.library\.\w+\(\s*(\w+)", source)]
    assert set(named) == {"add_op_namespace_prefix"}


def test_card_names_every_function(gathered: Path) -> None:
    card, public = (gathered / "CARD.md").read_text(), vars(swifti2v_kernels)
    functions = {name for name in swifti2v_kernels.__all__ if name.islower() and not name.startswith("_")}
    assert {name for name in functions if f"`{name}`" not in card and ".csg." not in public[name].__module__} == set()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loads_and_computes_alone(backend: str, gathered: Path) -> None:
    (copy,) = loaded(backend, gathered)
    assert copy["name"] in identifiers(gathered)
    assert copy["registered"] == [copy["name"]]
    # The PyTorch path calls no operator of its own.
    assert copy["called"] == ([copy["name"]] if backend == "triton" else [])


@pytest.mark.slow
def test_versions_and_the_library_in_one_process(gathered: Path, tmp_path: Path) -> None:
    """Each version is loaded under its own name beside the library; two that are the same are one."""
    gather(tmp_path / "other", changed_package(tmp_path, "__init__.py", '\n__version__ = "another"\n'))
    same = shutil.copytree(gathered, tmp_path / "same")
    first, other, again, library = loaded("triton", gathered, tmp_path / "other", same, installed=True)
    assert first["name"] != other["name"]
    assert (first["version"], other["version"]) == (swifti2v_kernels.__version__, "another")
    for copy in (first, other):
        assert copy["registered"] == copy["called"] == [copy["name"]]
    assert (again["registered"], again["called"]) == ([], [first["name"]])
    assert (library["name"], library["registered"], library["called"]) == (
        "swifti2v_kernels",
        ["swifti2v"],
        ["swifti2v"],
    )
    assert library["file"] == str(PACKAGE / "__init__.py")
    assert first["error"] == library["error"]


def test_refuses_a_folder_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: OUT: expected a new or an empty folder, got {tmp_path}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("def late():\n    from numpy import array\n", "numpy"),
        ("from ..csg.plan import Window\n", "csg/plan"),
        ("from .case import Case\n", "common/case"),
    ],
)
def test_refuses_a_file_that_needs_more(text: str, needed: str, tmp_path: Path) -> None:
    package = changed_package(tmp_path, "common/checks.py", text)
    with pytest.raises(GatherError, match=rf"^common/checks\.py:\d+: needs {re.escape(needed)}, which") as error:
        gather(tmp_path / "out", package)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
