"""``python -m swifti2v_kernels``: versions, the device, and which kernels serve it or why not, for a bug report."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__, explain
from .common.case import all_cases
from .common.dispatch import ENVIRONMENT_VARIABLE

EXAMPLES = """\
examples:
  python -m swifti2v_kernels                           the first GPU, or the CPU
  CUDA_VISIBLE_DEVICES=1 python -m swifti2v_kernels    another one
"""
#: Environment variables that decide how calls are computed.
VARIABLES = (ENVIRONMENT_VARIABLE, "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
KERNELS = "kernels, by the named calls of each operator at small sizes:"


def version(package: str) -> str:
    """Returns the version of ``package``, which is asked itself, since wheels of Triton have several names."""
    try:
        return importlib.import_module(package).__version__
    except ImportError as error:
        return f"cannot be imported: {error}"


def describe_device(device: torch.device) -> str:
    """Returns name, compute capability and memory of a CUDA device, or the processor's name."""
    if device.type != "cuda":
        return f"{device}: {platform.processor() or platform.machine()}"
    found = torch.cuda.get_device_properties(device)
    memory = f"{found.total_memory / 1e9:.1f} GB"
    return f"{device}: {found.name}, compute capability {found.major}.{found.minor}, {memory}"


def describe_kernels(device: torch.device) -> list[str]:
    """Returns what computes the named calls of every operator on ``device`` under ``backend="auto"``, as lines."""
    found: dict[str, Counter[str]] = {}
    for case in all_cases():
        try:
            arguments, keywords = case.inputs(device)
            choice = str(explain(case.operator, *arguments, **{**keywords, "backend": "auto"}))
        except (ValueError, RuntimeError) as error:
            # The report is there to show what is wrong, so an error is a line of it.
            choice = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        found.setdefault(case.operator.__name__, Counter())[choice] += 1
    width = max(map(len, found))
    return [
        f"  {name:<{width}}  {count} of {choices.total()} calls: {choice}"
        for name, choices in found.items()
        for choice, count in choices.most_common()
    ]


def report(device: torch.device) -> str:
    """Returns the whole text that the command prints."""
    cudnn = torch.backends.cudnn.version()
    values = {
        "swifti2v_kernels": f"{__version__}, {Path(__file__).parent}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        **{package: version(package) for package in ("torch", "triton", "einops", "numpy")},
        "torch built for": f"CUDA {torch.version.cuda}, cuDNN {cudnn}, ROCm {torch.version.hip}",
        "device": describe_device(device),
        "environment": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
        or "nothing set",
    }
    lines = [f"{name + ':':<18}{value}" for name, value in values.items()]
    return "\n".join([*lines, KERNELS, *describe_kernels(device)])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m swifti2v_kernels",
        description="Versions, the device, and which kernels serve it or why not: paste it into a bug report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _, others = parser.parse_known_args(argv)
    if others:
        parser.exit(2, f"error: expected no arguments, got {others[0][:80]!r}\n")
    print(report(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
