"""The tests that need a process of their own: Triton decides at its first import what it is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def run(command: list[str], **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kernels_in_the_interpreter() -> None:
    """tests/interpreter: numbers of every kernel over awkward shapes, on the CPU."""
    out = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreter"], TRITON_INTERPRET="1")
    assert " passed" in out


@pytest.mark.skipif(
    importlib.util.find_spec("ttsem") is None,
    reason="the sanitizer is optional: pip install --no-deps --ignore-requires-python ttsem==0.1.0",
)
def test_kernels_under_the_sanitizer() -> None:
    """tests/sanitizer: out-of-bounds accesses and races."""
    out = run(["-m", "ttsem.sanitize", "pytest", "-q", "-p", "no:cacheprovider", "tests/sanitizer"])
    assert " passed" in out


@pytest.fixture(scope="module")
def stub_driver(tmp_path_factory) -> Path:
    """The folder of a libcuda.so.1 that runs nothing."""
    import triton.backends.nvidia

    folder = tmp_path_factory.mktemp("cuda")
    headers = Path(triton.backends.nvidia.__file__).parent / "include"
    source = ROOT / "tests" / "launcher" / "cuda_stub.c"
    command = [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}", source]
    subprocess.run([*command, "-o", folder / "libcuda.so.1"], check=True)
    return folder


@pytest.mark.skipif(COMPILER is None, reason="Triton's launcher is C: needs cc, gcc or clang")
@pytest.mark.parametrize("capability", [89, 90])
def test_kernels_go_through_the_real_launcher(capability: int, stub_driver: Path, tmp_path: Path) -> None:
    """Up to ``cuLaunchKernelEx``, with valid tensor maps on 9.0."""
    out = run(
        ["-m", "tests.launcher.launch", str(capability), "d128"],
        LD_LIBRARY_PATH=str(stub_driver),
        TRITON_LIBCUDA_PATH=str(stub_driver),
    )
    lines = [line.split() for line in out.splitlines()]
    cases = [line[1:] for line in lines if line[0] == "case"]
    launches = [line[1:] for line in lines if line[0] == "launch"]
    descriptors = [line[1:] for line in lines if line[0] == "descriptor"]
    assert len(launches) == len(cases) > 8
    for _, x, heads, batch, threads in launches:
        assert 1 <= int(x) <= 20
        assert (int(heads), int(batch)) in ((2, 2), (3, 2))
        assert int(threads) in (128, 256, 384)
    assert bool(descriptors) == (capability == 90)
    assert all(line == ["ok"] for line in descriptors)
