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


def launched(driver: Path, capability: int, *texts: str) -> tuple[list[list[str]], list[list[str]]]:
    """Returns launches and descriptors that reached the driver, after a check that each case launched once."""
    out = run(
        ["-m", "tests.launcher.launch", str(capability), *texts],
        LD_LIBRARY_PATH=str(driver),
        TRITON_LIBCUDA_PATH=str(driver),
    )
    lines = [line.split() for line in out.splitlines()]
    launches = [line[1:] for line in lines if line[0] == "launch"]
    assert len(launches) == len([line for line in lines if line[0] == "case"]) > len(texts)
    return launches, [line[1:] for line in lines if line[0] == "descriptor"]


@needs_compiler
@pytest.mark.parametrize("capability", [89, 90])
def test_kernels_go_through_the_real_launcher(capability: int, stub_driver: Path) -> None:
    """Attention gets as far as ``cuLaunchKernelEx``, with valid tensor maps on 9.0."""
    launches, descriptors = launched(stub_driver, capability, "attention d128")
    assert len(launches) > 8
    for _, x, heads, batch, threads in launches:
        assert 1 <= int(x) <= 20
        assert (int(heads), int(batch)) in ((2, 2), (3, 2))
        assert int(threads) in (128, 256, 384)
    assert bool(descriptors) == (capability == 90)
    assert all(line == ["ok"] for line in descriptors)


@needs_compiler
def test_the_fused_operators_go_through_the_real_launcher(stub_driver: Path) -> None:
    launches, descriptors = launched(stub_driver, 89, "modulate", "residual", "qk_norm_rope", "embed", "project")
    assert not descriptors
    for name, x, *_, threads in launches:
        assert "fwd_kernel" in name
        assert int(x) >= 1
        assert int(threads) % 32 == 0


@needs_compiler
def test_the_convolutions_go_through_the_real_launcher(stub_driver: Path) -> None:
    """Convolutions are launched with the tuples of strides of their views, and on 9.0 with a limit of registers."""
    names = ("causal_conv3d C96 residual norm", "upsample_conv2d C192 to C96 norm", "frames_out C96")
    launches, descriptors = launched(stub_driver, 90, *names, "rms_norm_silu C384")
    assert not descriptors
    kernels = {"causal_conv3d_fwd_kernel", "upsample_conv2d_fwd_kernel", "frames_out_fwd_kernel"}
    assert {name for name, *_ in launches} == kernels | {"rms_norm_silu_fwd_kernel"}
    for name, x, frames, batch, threads in launches:
        assert int(x) >= 1
        assert (int(frames), int(batch)) == ((4, 1) if name.startswith("causal") else (2, 1))
        assert int(threads) == (128 if name.startswith("rms") else 256)
