"""The library imports only what it may, the wheel holds all that it needs, and the README keeps its promises."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import swifti2v_kernels
from tests.support.import_graph import graph, imported, modules, parsed

ROOT = Path(__file__).parent.parent
ALLOWED = {"torch", "triton", "einops", "numpy"}


#: Packages of hosts, which an integration imports when it is used.
HOSTS = {"diffusers", "comfy", "folder_paths", "wan"}


def imports(folder: str, everywhere: bool = True) -> set[str]:
    """Returns the top-level packages that the Python files of a folder import."""
    found = set()
    for module, file in modules(ROOT, folder).items():
        found |= {base.split(".")[0] for base, _, _ in imported(file, module, everywhere)}
    return found - set(sys.stdlib_module_names)


def test_data_flows_one_way():
    assert imports("swifti2v_kernels", everywhere=False) <= ALLOWED | {"swifti2v_kernels"}
    assert imports("swifti2v_kernels") <= ALLOWED | {"swifti2v_kernels"} | HOSTS
    assert "bench" not in imports("model")
    assert imports("model", everywhere=False) <= ALLOWED | {"model", "swifti2v_kernels"}
    # pytest: of the plugin for hardware tests, which pytest alone loads. torch brings jinja2 and markupsafe along.
    others = {"model", "swifti2v_kernels", "pytest", "jinja2", "markupsafe"}
    assert imports("bench", everywhere=False) <= ALLOWED | {"bench"} | others


@pytest.mark.parametrize("package", ["swifti2v_kernels", "model", "bench"])
def test_no_imports_go_in_circles(package):
    """No module imports itself in a circle, counting imports inside functions and for type checking."""
    edges = graph(ROOT, package)
    order = list(TopologicalSorter(edges).static_order())  # raises CycleError, which names the circle
    assert set(order) == set(edges)
    assert sum(map(len, edges.values())) > len(edges)


def test_rooms_of_the_model_import_only_rooms_before_them():
    """Modules import only rooms before theirs in the order of ``model/__init__.py``; commands are on top."""
    listed = re.findall(
        r"^    ([a-z]+(?:, [a-z]+)*)  ", ast.get_docstring(ast.parse((ROOT / "model/__init__.py").read_text())), re.M
    )
    order = ["errors", *(room for line in listed for room in line.split(", ")), "generate", "plan", "inspect"]
    rooms = {module.split(".")[1] for module in modules(ROOT, "model") if "." in module}
    assert sorted(order) == sorted(rooms)
    for module, targets in graph(ROOT, "model").items():
        for target in targets if "." in module else ():
            here, there = module.split(".")[1], target.split(".")[1]
            assert order.index(there) <= order.index(here), f"{module} imports {target}"


def test_the_library_imports_itself_by_relative_imports_alone():
    """The library's imports of itself are relative: a copy under another name (``hub/``) runs its own code.

    ``model`` and ``bench`` import by absolute names.
    """
    for module, file in modules(ROOT, "swifti2v_kernels").items():
        # ComfyUI loads that one file by its path.
        if module != "swifti2v_kernels.integrations.comfyui":
            absolute = {base.split(".")[0] for base, _, level in imported(file, module) if level == 0}
            assert "swifti2v_kernels" not in absolute, f"{file}: imports the library by an absolute name"
        assert "swifti2v::" not in re.sub(r"``.*?``", "", file.read_text()), f"{file}: a name outside registration.py"
    for module, file in (modules(ROOT, "model") | modules(ROOT, "bench")).items():
        assert all(level == 0 for _, _, level in imported(file, module)), f"{file}: relative import"


def test_model_uses_only_public_names_of_the_library():
    """Neither ``model`` nor ``bench`` imports a private name; ``bench`` alone reads the operators' own files."""
    for folder in ("model", "bench"):
        for module, file in modules(ROOT, folder).items():
            for base, name, _ in imported(file, module):
                if base.split(".")[0] == "swifti2v_kernels" and name is not None:
                    assert not name.startswith("_"), file
                    # The table of cards is everybody's.
                    if folder == "model" and "cards" not in (name, base.rpartition(".")[2]):
                        assert base == "swifti2v_kernels", file
                        assert name in swifti2v_kernels.__all__, file


def test_library_imports_nothing_else_at_run_time():
    """The library imports no host, nothing of the product besides, and not torch's compiler, which takes longer."""
    others = "model", "bench", "diffusers", "PIL", "torch._dynamo"
    code = f"import sys, swifti2v_kernels; print(*(m for m in {others} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


PLANS = """
import sys
from dataclasses import replace
from model.machine.cards import chosen_gpu
from model.plan import PlanSettings, build_parser, main, plan_memory, request_of

for options in ("--preset tiny", "--preset tiny-vae22", "--preset tiny --dtype float32"):
    main([*options.split(), "--vram", "8GB"])
settings = PlanSettings(**vars(build_parser().parse_args(["--dtype", "float32", "--vram", "8GB"])))
plan_memory(replace(request_of(settings), vram=None, capability=None, gpu=chosen_gpu(None, 0)))
print("imported:", *({"sympy", "torch._dynamo"} & sys.modules.keys()))
"""


def test_plans_need_no_compiler():
    """Plans, for a CPU too, are made without sympy and torch's compiler: importing them takes longer than a plan."""
    result = subprocess.run([sys.executable, "-c", PLANS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "imported:"


def test_every_public_name_is_documented():
    for folder in ("swifti2v_kernels", "model", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = parsed(file)
            assert file.name == "__init__.py" or ast.get_docstring(tree), file
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{file}: {node.name}"


EXAMPLES = [
    module
    for package in ("swifti2v_kernels", "model")
    for module, file in modules(ROOT, package).items()
    if ">>> " in file.read_text() and "integrations" not in module  # which need a host
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_run(module):
    names = {name: getattr(swifti2v_kernels, name) for name in swifti2v_kernels.__all__} | {"torch": torch}
    result = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def test_metadata_of_the_package(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    info = next(tmp_path.glob("*.egg-info"))
    assert (info / "top_level.txt").read_text().split() == ["swifti2v_kernels"]
    sections = re.split(r"^\[(.*)\]$", "[]\n" + (info / "requires.txt").read_text(), flags=re.M)[1:]
    named = dict(zip(sections[::2], sections[1::2], strict=True))
    required = "".join(text for name, text in named.items() if not name or name.startswith(":"))
    assert set(re.findall(r"^([a-z]+)", required, re.M)) == ALLOWED
    assert {"generate", "text", "bench", "test", "all"} <= set(named)
    sources = (info / "SOURCES.txt").read_text()
    for file in (
        *("py.typed", "common/target.py", "configs/attention.json", "configs/conv3d.json"),
        *("integrations/wan/dit.py", "integrations/diffusers/cross.py", "integrations/comfyui/vae.py"),
        *(f"{family}/cases.py" for family in ("attention", "conv", "linear", "norm", "window")),
    ):
        assert f"swifti2v_kernels/{file}" in sources


@pytest.mark.parametrize("module", ["swifti2v_kernels", "model.generate", "model.inspect", "model.plan", "bench"])
def test_commands_start_without_a_warning(module):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:" in done.stdout


@pytest.mark.parametrize("kind", ["run", "test"])
def test_readme_has_one_command_that_runs_and_one_that_tests(kind):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(rf"<!-- command: {kind} -->\n```bash\n(.*?)```", text, re.S)
    assert len(blocks) == 1
    assert "pip install -e" in blocks[0]
    assert ("python -m bench" if kind == "run" else "pytest") in blocks[0]


def test_what_an_operator_writes_has_no_default():
    """No schema has a default for an argument that is written to.

    torch up to 2.11 leaves out arguments that equal their defaults and then looks for those written to among the rest:
    such a call ends in an IndexError. Whatever torch the tests run under, the schema shows it.
    """
    written = set()
    for name in filter(re.compile("swifti2v::").match, torch._C._dispatch_get_all_op_names()):
        for argument in getattr(torch.ops.swifti2v, name.removeprefix("swifti2v::")).default._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.add(name)
                assert not argument.has_default_value(), (name, argument.name)
    assert len(written) >= 5
