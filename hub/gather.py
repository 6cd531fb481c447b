"""Gathers the library as a kernel of the Hugging Face Hub: ``python hub/gather.py OUT``.

OUT then holds what kernel-builder builds from (``build.toml``, ``torch-ext``) and what ``kernels.get_local_kernel``
loads (``build/torch-cpu``, ``build/torch-cuda``). CSG and the integrations are left out, which are no operators and
need more than torch, Triton and einops; so are the benchmarks' cases and the package's command, which reads them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "swifti2v_kernels"
LEFT_OUT = ("csg", "integrations")
LEFT_OUT_FILES = ("case.py", "cases.py", "__main__.py")
ALLOWED = {"torch", "triton", "einops", *sys.stdlib_module_names}
NOTE = "Gathered for the Hugging Face Hub without CSG and the integrations, which the installed library has."


class GatherError(Exception):
    """The reason why nothing was gathered, in one line."""


def gather(out: Path, package: Path = PACKAGE) -> None:
    """Writes ``out``, a folder that is new or empty.

    Raises:
        GatherError: ``out`` is neither, or a file imports what a Hub kernel must not.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GatherError(f"OUT: expected a new or an empty folder, got {out}")
    # Python 3.10 has no parser of TOML; tomli is the same one and comes with pytest and kernels.
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    build = toml.loads((HERE / "build.toml").read_text())
    general, files = build["general"], library_files(package, build["torch-noarch"]["pyext"])
    module = general["name"].replace("-", "_")
    # `kernels` imports a build under its id, from which the operators' namespace follows. Builds that differ must not
    # share one: Python would take modules that the first has loaded for those of the second.
    content = hashlib.sha256(b"".join(name.encode() + data for name, data in files.items())).hexdigest()[:12]
    folders = {f"torch-ext/{module}": files}
    for backend in general["backends"]:
        metadata = {key: general[key] for key in ("name", "version", "license", "python-depends")}
        metadata |= {"id": f"_{module}_{backend}_{content}", "backend": {"type": backend}}
        folders[f"build/torch-{backend}"] = {**files, "metadata.json": json.dumps(metadata, indent=2).encode()}
    for folder, contents in folders.items():
        for name, data in contents.items():
            (out / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (out / folder / name).write_bytes(data)
    for source in (HERE / "build.toml", HERE / "CARD.md", HERE.parent / "LICENSE"):
        shutil.copyfile(source, out / source.name)


def library_files(package: Path, endings: list[str]) -> dict[str, bytes]:
    """Returns the contents of all files that are gathered, by their path within the package.

    Raises:
        GatherError: a file imports something that is not among them and not allowed.
    """
    files = {}
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package)
        if path.suffix[1:] not in endings or name.parts[0] in LEFT_OUT or name.name in LEFT_OUT_FILES:
            continue
        # The docstring of a family's ``__init__.py`` has a line for its cases.
        told = b"^cases? .*\n" if name.name == "__init__.py" else b"(?!)"
        files[name.as_posix()] = re.sub(told, b"", path.read_bytes(), flags=re.MULTILINE)
    files["__init__.py"] = shortened(files["__init__.py"].decode()).encode()
    for name in files:
        for node in ast.walk(ast.parse(files[name] if name.endswith(".py") else b"")):
            for missing in absent(name, node, files):
                raise GatherError(f"{name}:{node.lineno}: needs {missing}, which a Hub kernel does not have")
    return files


def absent(name: str, node: ast.AST, files: Mapping[str, bytes]) -> list[str]:
    """Returns what an import of the file ``name`` wants that is neither allowed nor among ``files``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] not in ALLOWED]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level == 0:
        return [node.module] if node.module.split(".")[0] not in ALLOWED else []
    folder = PurePosixPath(name).parents[node.level - 1]
    modules = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
    paths = [str(folder / module) for module in modules]
    return [path for path in paths if f"{path}.py" not in files and f"{path}/__init__.py" not in files]


def shortened(source: str) -> str:
    """Returns the package's ``__init__.py`` with the first line of its docstring, without the names left out."""
    lines, body = source.splitlines(keepends=True), ast.parse(source).body
    title = ast.get_docstring(ast.parse(source)).splitlines()[0]
    edits: dict[ast.stmt, str] = {body[0]: f'"""{title}\n\n{NOTE}\n"""\n'}
    gone = set()
    for node in body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LEFT_OUT:
            edits[node] = ""
            gone |= {alias.name for alias in node.names}
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = [f'    "{name}",\n' for name in ast.literal_eval(node.value) if name not in gone]
            edits[node] = "".join(["__all__ = [\n", *names, "]\n"])
    for node in sorted(edits, key=lambda node: -node.lineno):
        lines[node.lineno - 1 : node.end_lineno] = [edits[node]]
    return "".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code, 2 if it refuses."""
    parser = argparse.ArgumentParser(
        prog="python hub/gather.py",
        description="Gathers the operators, without CSG and the integrations, as a kernel of the Hugging Face Hub.",
        epilog="examples:\n  python hub/gather.py /tmp/swifti2v-kernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    out = parser.parse_args(arguments).out
    try:
        gather(out)
    except (GatherError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f'gathered; kernels.get_local_kernel(Path("{out}")) loads it')
    return 0


if __name__ == "__main__":
    sys.exit(main())
