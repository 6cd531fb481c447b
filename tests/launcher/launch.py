"""Launches cases of every operator through Triton's real launcher, on a CUDA driver that runs nothing.

    python -m tests.launcher.launch CAPABILITY TEXT [TEXT ...]

Compile-only tests stop before the launcher, which differs between Triton releases: 3.6 compiles a kernel with a tuple
of descriptors, but cannot launch it. Here the arguments go all the way to ``cuLaunchKernelEx``. Run by
tests/test_processes.py, since the stub must be the process's libcuda from its start.
"""

from __future__ import annotations

import sys
import warnings

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from bench.operators.discover import all_cases
from swifti2v_kernels.common.target import pretend_gpu


class StubDriver(nvidia.CudaDriver):
    """Triton's CUDA driver, told about the device that torch does not have."""

    def __init__(self, capability: int) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device=None: 0
        self.get_device_capability = lambda device=0: divmod(capability, 10)


def main(capability: int, texts: list[str]) -> None:
    """Prints one line for every case whose name contains a text, between the stub's own."""
    warnings.simplefilter("ignore")
    driver.set_active(StubDriver(capability))
    with pretend_gpu(capability):
        for case in all_cases():
            if case.least_capability <= capability and any(text in case.name for text in texts):
                print("case", case.name, flush=True)
                case.run(torch.device("cpu"))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
