"""Compiling a library's kernels for any NVIDIA GPU, through its own public functions, on a machine without one.

    with compiled_for(90) as kernels:
        segment_attention(q, [(k, v)], backend="triton")     # CPU tensors; nothing is launched
    kernels[0].binary, kernels[0].shared_bytes

Every launch inside the body compiles its kernel for the capability, specialised on the real arguments, and records it.
The launchers, their configurations, host descriptors and Gluon kernels are thus the ones that run on hardware.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from swifti2v_kernels.common.target import TARGETS, interpreting, pretend_gpu


@dataclass(frozen=True)
class CompiledKernel:
    """The kernel of one launch: ``constants`` are its compile-time arguments; ``error`` is None if it compiled."""

    name: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    error: str | None
    binary: bytes = b""
    #: The architecture of the binary, as PTX names it.
    arch: str = ""
    #: Types of the run-time arguments by name, as Triton writes them; tuples are nested.
    signature: dict[str, Any] = field(default_factory=dict)
    shared_bytes: int = 0
    #: All warps of a program, those of specialised partitions included.
    total_warps: int = 0
    ptx: str = ""


def _driver(capability: int) -> SimpleNamespace:
    """Returns a driver that answers what Triton asks before a launch."""
    from triton.backends.compiler import GPUTarget

    card = TARGETS[capability]
    properties = {"max_shared_mem": card.limits.shared_per_block, "multiprocessor_count": card.sms}
    properties |= {"max_num_regs": 65536, "warpSize": 32}
    return SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        set_current_device=lambda device: None,
        get_current_stream=lambda device=None: 0,
        get_device_capability=lambda device=0: divmod(capability, 10),
        is_active=lambda: True,
    )


def quiet_exit() -> None:
    """Silences stderr when the process ends.

    Triton 3.9 prints a page about leaked objects there if the process has compiled Gluon; it means nothing.
    """
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))


@contextmanager
def compiled_for(capability: int, compile: bool = True) -> Iterator[list[CompiledKernel]]:
    """Makes launches in the body compile for a card and run nothing; yields the list of kernels that they fill.

    Args:
        capability: the card's capability, two digits.
        compile: whether launches compile; False leaves the list empty, for tests of what a launcher itself decides.

    Raises:
        RuntimeError: the process interprets kernels (``TRITON_INTERPRET=1``), so nothing can be compiled in it.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1: kernels cannot be compiled in an interpreting process")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels: list[CompiledKernel] = []
    stock_run, touched = JITFunction.run, set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if not compile:
            return None
        touched.add(self)
        constants = {k: v for k, v in options.items() if k in self.arg_names}
        given = (self.__name__, constants, options.get("num_warps", 4), options.get("num_stages", 3))
        try:
            kernel = stock_run(self, *args, grid=grid, warmup=True, **options)
        except Exception as failure:  # whatever the compiler throws is a finding, reported with its case
            kernels.append(CompiledKernel(*given, f"{type(failure).__name__}: {failure}"))
            return None
        ptx, warps = kernel.asm["ptx"], re.search(r'ttg\.total-num-warps"? = (\d+)', kernel.asm["ttgir"])
        arch = ptx.split(".target ", 1)[1].split(",")[0].split()[0]
        kernels.append(CompiledKernel(
            *given, None, kernel.asm["cubin"], arch, dict(kernel.src.signature), kernel.metadata.shared,
            int(warps[1]) if warps else kernel.metadata.num_warps, ptx,
        ))  # fmt: skip
        return kernel

    stock_driver = getattr(driver, "_active", None)
    driver.set_active(_driver(capability))
    try:
        with pretend_gpu(capability), patch.object(JITFunction, "run", run):
            yield kernels
    finally:
        driver._active = stock_driver  # reset_active() would look for a GPU
        for function in touched:
            function.device_caches.clear()  # they hold kernels of the pretended device
