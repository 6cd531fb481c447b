"""The tests that need a process of their own: Triton decides at its first import what it is; and interruptions."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import model

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


@pytest.fixture(scope="module")
def launched(stub_driver: Path) -> Callable[[int], tuple[list[list[str]], list[list[str]]]]:
    """Launches and descriptors that reached the driver on a GPU, after a check that each case launched once."""

    @functools.cache
    def run_on(capability: int) -> tuple[list[list[str]], list[list[str]]]:
        driver = str(stub_driver)
        command = ["-m", "tests.launcher.launch", str(capability), *LAUNCHED[capability]]
        lines = [line.split() for line in run(command, LD_LIBRARY_PATH=driver, TRITON_LIBCUDA_PATH=driver).splitlines()]
        launches = [line[1:] for line in lines if line[0] == "launch"]
        assert len(launches) == len([line for line in lines if line[0] == "case"]) > len(LAUNCHED[capability])
        return launches, [line[1:] for line in lines if line[0] == "descriptor"]

    return run_on


def of_attention(name: str) -> bool:
    return "attention" in name or "hopper" in name


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", LAUNCHED)
def test_attention_goes_through_the_real_launcher(capability: int, launched: Any) -> None:
    """Attention gets as far as ``cuLaunchKernelEx``, with valid tensor maps on 9.0."""
    launches, descriptors = launched(capability)
    launches = [line for line in launches if of_attention(line[0])]
    assert len(launches) == (6 if capability == 89 else 11)
    for _, x, heads, batch, threads in launches:
        assert 1 <= int(x) <= 20
        assert (int(heads), int(batch)) in ((2, 2), (3, 2))
        assert int(threads) in (128, 256, 384)
    assert bool(descriptors) == (capability == 90)
    assert all(line == ["ok"] for line in descriptors)


@pytest.mark.slow
@needs_compiler
def test_the_fused_operators_go_through_the_real_launcher(launched: Any) -> None:
    launches = [line for line in launched(89)[0] if not of_attention(line[0])]
    assert len(launches) > 4
    for name, x, *_, threads in launches:
        assert "fwd_kernel" in name
        assert int(x) >= 1
        assert int(threads) % 32 == 0


@pytest.mark.slow
@needs_compiler
def test_the_convolutions_go_through_the_real_launcher(launched: Any) -> None:
    """Convolutions are launched with the tuples of strides of their views, and on 9.0 with a limit of registers."""
    launches = [line for line in launched(90)[0] if not of_attention(line[0])]
    kernels = {"causal_conv3d_fwd_kernel", "upsample_conv2d_fwd_kernel", "frames_out_fwd_kernel"}
    assert {name for name, *_ in launches} == kernels | {"rms_norm_silu_fwd_kernel"}
    for name, x, frames, batch, threads in launches:
        assert int(x) >= 1
        assert (int(frames), int(batch)) == ((4, 1) if name.startswith("causal") else (2, 1))
        assert int(threads) == (128 if name.startswith("rms") else 256)


#: Commands that end by themselves, with the options for it.
COMMANDS = {
    "model.generate": ["photo.jpg"], "model.plan": ["--preset", "tiny"], "model.inspect": ["nowhere"],
    "bench": ["csg", "--modes", "none"], "swifti2v_kernels": ["--device", "cpu"],
}  # fmt: skip
needs_maps = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process imports is read in /proc")


def interrupted(name: str, delay: float, *, ignoring: bool = False) -> tuple[int, str]:
    """Returns exit code and errors of a command that is interrupted so many seconds after it began to import torch.

    Args:
        name: one of :data:`COMMANDS`.
        delay: seconds from the first of torch's libraries on.
        ignoring: whether the command is started with interruptions ignored, as by nohup.
    """
    listening = signal.SIG_IGN if ignoring else signal.SIG_DFL
    process = subprocess.Popen(
        [sys.executable, "-m", name, *COMMANDS[name]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, listening),
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@needs_maps
@pytest.mark.parametrize("name", ["model.plan", "bench", "swifti2v_kernels"])
def test_an_interruption_while_torch_is_imported_is_one_line(name: str) -> None:
    """A command that is interrupted before its work has begun prints one word and ends with 130."""
    assert interrupted(name, 0.1) == (130, "interrupted\n")


@needs_maps
@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_an_interruption_at_any_moment_is_one_line(name: str) -> None:
    """Whenever it comes, an interruption gives one word and 130, unless the command has ended by itself before."""
    for step, delay in enumerate((0, 0.3, 0.8, 1.6, 3)):
        code, errors = interrupted(name, delay)
        # -SIGINT: Python has put away everything, its handlers too.
        if code not in (130, -signal.SIGINT):
            break
        assert errors.endswith("interrupted\n") or code != 130, (step, code, errors)
        assert "Traceback" not in errors, (step, code, errors)
        assert errors.count("\n") <= 2, (step, code, errors)
    assert step >= 1


@needs_maps
@pytest.mark.slow
def test_an_interruption_that_the_parent_process_ignores_stays_ignored() -> None:
    """A command that was started with interruptions ignored goes on, and its own exit code is 2 here."""
    code, errors = interrupted("bench", 0.1, ignoring=True)
    assert code == 2
    assert errors.startswith("error: argument --modes")


def test_a_program_that_imports_the_packages_handles_interruptions_itself() -> None:
    """The packages' names are imported when they are asked for, and signals are a command's affair alone."""
    program = "import signal, sys, bench, model; assert 'torch' not in sys.modules"
    run(["-c", f"{program}; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"])
    assert set(model.__all__) <= set(dir(model))
    assert all(getattr(model, name).__name__ == name for name in model.__all__)
