"""The GPU that a launch is for: its compute capability, and what each capability that the library ships for offers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from .tracing import constant_when_traced


@dataclass(frozen=True)
class Target:
    """The GPUs of one compute capability; the card named is the one that the rates and the peak belong to.

    Rates are per streaming multiprocessor (SM) and clock. Shared memory is what one program may ask for, in bytes.
    Sources: CUDA programming guide (limits and throughput tables), vendor data sheets (clocks, bandwidth).
    """

    capability: int
    card: str
    sms: int
    clock_ghz: float
    bandwidth_tb_s: float
    shared_per_block: int
    shared_per_sm: int
    max_warps_per_sm: int
    #: Fused multiply-adds of dense bf16 matmuls with float32 sums; GeForce cards run these at half rate.
    bf16_fma: int
    #: Opcodes of the tensor-core instructions that a bf16 matmul must show in the compiled code.
    mma_opcodes: tuple[str, ...]

    @property
    def bf16_tflops(self) -> float:
        """The dense bf16 peak in TFLOP/s, two operations a multiply-add."""
        return 2 * self.bf16_fma * self.sms * self.clock_ghz / 1000


_KIB = 1024
TARGETS = {
    target.capability: target
    for target in (
        Target(80, "A100 SXM", 108, 1.41, 2.04, 163 * _KIB, 164 * _KIB, 64, 1024, ("HMMA",)),
        Target(86, "RTX 3090", 82, 1.695, 0.936, 99 * _KIB, 100 * _KIB, 48, 256, ("HMMA",)),
        Target(89, "RTX 4090", 128, 2.52, 1.008, 99 * _KIB, 100 * _KIB, 48, 256, ("HMMA",)),
        Target(90, "H200 SXM", 132, 1.83, 4.8, 227 * _KIB, 228 * _KIB, 64, 2048, ("HGMMA",)),
        Target(100, "B200", 148, 1.85, 8.0, 227 * _KIB, 228 * _KIB, 64, 4096, ("UTCHMMA", "UTCMMA")),
        Target(120, "RTX 5090", 170, 2.407, 1.792, 99 * _KIB, 100 * _KIB, 48, 256, ("HMMA",)),
    )
}

_pretended: int | None = None


@contextmanager
def pretend_gpu(capability: int) -> Iterator[None]:
    """Makes calls with CPU or ``meta`` tensors choose as on a GPU of this capability while the block runs.

    With ``meta`` tensors nothing runs: planners see which operators would, and what they return. Launches on CPU
    tensors are for compilers' reports, which catch them.

    Args:
        capability: the compute capability as two digits, 90 for 9.0.

    Examples:
        >>> q = torch.empty(1, 512, 8, 128, dtype=torch.bfloat16, device="meta")
        >>> with pretend_gpu(80):
        ...     print(explain(segment_attention, q, [(q, q)]))
        triton: portable (capability 8.0)
    """
    global _pretended
    before, _pretended = _pretended, capability
    try:
        yield
    finally:
        _pretended = before


def interpreting() -> bool:
    """Returns whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability_of(device: torch.device) -> int | None:
    """Returns the compute capability that a launch on ``device`` is for, as two digits (90 for 9.0).

    For the interpreter that is None.

    Raises:
        ValueError: kernels cannot run on this device; the message says what would let them.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if interpreting():
        return None
    if _pretended is not None:
        return _pretended
    raise ValueError(f"device: Triton kernels need a CUDA device (or TRITON_INTERPRET=1), got {device}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one while the block runs, since Triton launches there and not by the tensors.

    Where kernels are interpreted, it also repairs the interpreter before the first of them.
    """
    if interpreting():
        from .interpreter import repair_interpreter

        repair_interpreter()
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def for_gpu(device: torch.device) -> bool:
    """Returns whether a call with tensors on ``device`` is one on a GPU, or stands for one (:func:`pretend_gpu`)."""
    return device.type == "cuda" or (_pretended is not None and not interpreting())


# Constant for a device: under torch.compile it is read once, at trace time.
@constant_when_traced
def device_obstacle(device: torch.device) -> str | None:
    """Returns why no kernel of this library runs on ``device``, or None if they do."""
    if device.type != "cuda":
        if interpreting():
            from .interpreter import version_obstacle

            return version_obstacle()
        if _pretended is not None:
            return None
        return f"kernels need an NVIDIA GPU or TRITON_INTERPRET=1, got {device}"
    if torch.version.hip is not None:
        return "kernels are for NVIDIA GPUs, this is an AMD one"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = capability_of(device)
    if capability is not None and capability < 80:
        return f"kernels exist for compute capability 8.0 and newer, this device has {capability / 10:.1f}"
    return None
