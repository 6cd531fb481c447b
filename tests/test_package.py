"""The house: what the library may import, what the wheel holds, and what the README promises."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swifti2v_kernels

ROOT = Path(__file__).parent.parent
ALLOWED = {"torch", "triton", "einops", "numpy"}


#: Hosts that an integration imports when it is used.
HOSTS = {"diffusers", "comfy", "folder_paths", "wan"}


def imports(folder: str, everywhere: bool = True) -> set[str]:
    """Top-level packages that the Python files of a folder import."""
    found = set()
    for file in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree) if everywhere else tree.body:
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def test_data_flows_one_way():
    assert imports("swifti2v_kernels", everywhere=False) <= ALLOWED | {"swifti2v_kernels"}
    assert imports("swifti2v_kernels") <= ALLOWED | {"swifti2v_kernels"} | HOSTS
    assert "bench" not in imports("model")
    assert imports("model", everywhere=False) <= ALLOWED | {"model", "swifti2v_kernels"}
    # pytest: of the plugin for hardware tests, which pytest alone loads.
    assert imports("bench", everywhere=False) <= ALLOWED | {"bench", "model", "swifti2v_kernels", "pytest"}


def test_model_uses_only_public_names_of_the_library():
    """``bench`` also reads the operators' own files (cases, costs, launchers), but nothing private."""
    import swifti2v_kernels

    for file in [*(ROOT / "model").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("swifti2v_kernels"):
                names = {alias.name for alias in node.names}
                assert not any(name.startswith("_") for name in names), file
                if file.parent.name == "model":
                    assert node.module == "swifti2v_kernels", file
                    assert names <= set(swifti2v_kernels.__all__), file


def test_library_imports_nothing_else_at_run_time():
    code = (
        "import sys, swifti2v_kernels; print(*(m for m in ('model', 'bench', 'diffusers', 'PIL') if m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_every_public_name_is_documented():
    for folder in ("swifti2v_kernels", "model", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            assert file.name == "__init__.py" or ast.get_docstring(tree), file
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{file}: {node.name}"


@pytest.mark.parametrize(
    "module",
    [
        "attention",
        "attention_merge",
        "causal_conv3d",
        "common.dispatch",
        "csg",
        "embed_window",
        "frames_out",
        "project_step",
        "rms_norm_silu",
        "rope",
        "upsample_conv2d",
    ],
)
def test_examples_in_docstrings_run(module):
    names = {name: getattr(swifti2v_kernels, name) for name in swifti2v_kernels.__all__} | {"torch": torch}
    result = doctest.testmod(importlib.import_module(f"swifti2v_kernels.{module}"), extraglobs=names)
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
        *("integrations/wan.py", "integrations/diffusers/wan.py", "integrations/comfyui/nodes.py"),
    ):
        assert f"swifti2v_kernels/{file}" in sources


@pytest.mark.parametrize("command", ["model.generate", "model.inspect", "model.plan", "model.vae_plan", "bench"])
def test_commands_start_without_a_warning(command):
    arguments = [sys.executable, "-W", "error::RuntimeWarning", "-m", command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


@pytest.mark.parametrize("kind", ["run", "test"])
def test_readme_has_one_command_that_runs_and_one_that_tests(kind):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(rf"<!-- command: {kind} -->\n```bash\n(.*?)```", text, re.S)
    assert len(blocks) == 1
    assert "pip install -e" in blocks[0]
    assert ("python -m bench" if kind == "run" else "pytest") in blocks[0]


def test_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_what_an_operator_writes_has_no_default():
    """torch up to 2.11 leaves out arguments that equal their defaults and then looks for what was written among them:
    such a call ends in an IndexError. Whatever torch the tests run under, the schema shows it."""
    written = set()
    for module in pkgutil.iter_modules(swifti2v_kernels.__path__):
        if not module.name.endswith("_hopper"):
            importlib.import_module(f"swifti2v_kernels.{module.name}")
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("swifti2v::"):
            continue
        schema = getattr(torch.ops.swifti2v, name.removeprefix("swifti2v::")).default._schema
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.add(name)
                assert not argument.has_default_value(), (name, argument.name)
    assert len(written) >= 5
