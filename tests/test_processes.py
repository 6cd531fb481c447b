"""The tests that need a process of their own: Triton decides at its first import what it is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: The cases, by a part of their names, that are launched on a GPU of a capability: every kernel in each form of its
#: arguments, and not every case, since each must be compiled.
LAUNCHED = {
    89: (
        *(f"attention d128 {form}" for form in ("lse", "2 sources", "5 sources", "causal", "block window")),
        *("norm_modulate C", "gated_residual C", "qk_norm_rope 12", "qk_norm_rope 24"),
        *("embed_window c1536", "project_step c1536"),
    ),
    90: (
        *("attention d128", "causal_conv3d C96 residual norm", "upsample_conv2d C192 to C96 norm", "frames_out C96"),
        "rms_norm_silu C384",
    ),
}
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def run(command: list[str], **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    for skipped in (line for line in result.stdout.splitlines() if line.startswith("SKIPPED")):
        # Printed among this process's warnings: what a passed test has printed is not.
        warnings.warn(f"in a process of its own: {skipped}", stacklevel=2)
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ttsem") is None,
    reason="the sanitizer is optional: pip install --no-deps --ignore-requires-python ttsem==0.1.0",
)
def test_kernels_under_the_sanitizer() -> None:
    """No kernel reads or writes out of bounds, and none races: tests/sanitizer passes under the sanitizer."""
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


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="Triton's launcher is C: needs cc, gcc or clang")


def launched(stub_driver: Path, capability: int) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the launches and descriptors that reached the driver on a GPU; each case has launched once."""
    driver = str(stub_driver)
    command = ["-m", "tests.launcher.launch", str(capability), *LAUNCHED[capability]]
    lines = [line.split() for line in run(command, LD_LIBRARY_PATH=driver, TRITON_LIBCUDA_PATH=driver).splitlines()]
    launches = [line[1:] for line in lines if line[0] == "launch"]
    assert len(launches) == len([line for line in lines if line[0] == "case"]) > len(LAUNCHED[capability])
    return launches, [line[1:] for line in lines if line[0] == "descriptor"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", LAUNCHED)
def test_kernels_go_through_the_real_launcher(capability: int, stub_driver: Path) -> None:
    """Kernels get as far as ``cuLaunchKernelEx``, attention on 9.0 with valid tensor maps.

    Convolutions are launched with the tuples of strides of their views, and on 9.0 with a limit of registers.
    """
    launches, descriptors = launched(stub_driver, capability)
    attention = [line for line in launches if "attention" in line[0] or "hopper" in line[0]]
    assert len(attention) == (6 if capability == 89 else 11)
    for name, x, y, batch, threads in launches:
        assert "fwd_kernel" in name or "hopper" in name
        assert int(x) >= 1
        assert int(threads) % 32 == 0
        if "attention" in name or "hopper" in name:
            assert int(x) <= 20
            assert int(threads) in (128, 256, 384)
            assert (int(y), int(batch)) in ((2, 2), (3, 2))  # heads
        elif capability == 90:
            assert (int(y), int(batch)) == (4 if name.startswith("causal") else 2, 1)  # frames
            assert int(threads) == (128 if name.startswith("rms") else 256)
    assert bool(descriptors) == (capability == 90)
    assert all(line == ["ok"] for line in descriptors)
    convolutions = {"causal_conv3d", "upsample_conv2d", "frames_out", "rms_norm_silu"}
    others = {line[0].removesuffix("_fwd_kernel") for line in launches if line not in attention}
    assert others == convolutions if capability == 90 else len(others) > 2
