"""What benchmarks of calls share: their time, their memory, what the machine can do, and what a failure is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from model.errors import InputError
from model.measure import is_out_of_memory

Result = TypeVar("Result")
#: Median, 20th and 80th percentile of a call, in seconds.
Timer = Callable[[Callable[[], Any]], tuple[float, float, float]]


def cuda_timer(milliseconds: int) -> Timer:
    """Times calls for about ``milliseconds`` each; L2 is flushed before every call."""
    from triton.testing import do_bench

    def time(call: Callable[[], Any]) -> tuple[float, float, float]:
        times = do_bench(call, warmup=milliseconds // 5, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
        return times[0] / 1e3, times[1] / 1e3, times[2] / 1e3

    return time


def matmul_tflops(device: torch.device, timer: Timer, size: int = 8192) -> float:
    """A square bf16 product on this machine, in TFLOP/s."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timer(lambda: a @ b)[0] / 1e12


def copy_bandwidth(device: torch.device, timer: Timer, nbytes: int = 2**30) -> float:
    """A copy of ``nbytes`` on the device itself: bytes read and written, a second."""
    source, target = (torch.zeros(nbytes, device=device, dtype=torch.uint8) for _ in range(2))
    return 2 * nbytes / timer(lambda: target.copy_(source))[0]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 convolutions in the body are float32. (``torch.backends.cudnn.flags`` would switch cuDNN off as well.)"""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def peak_of(call: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """The call's result and the most bytes allocated during it beyond those before it; 0 where no count is kept."""
    if device.type != "cuda":
        return call(), 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def failure(error: BaseException) -> dict[str, str]:
    """Status and reason of a row that could not be measured."""
    status = "out of memory" if is_out_of_memory(error) else "failed"
    return {"status": status, "reason": (str(error) or type(error).__name__).splitlines()[0][:300]}


def make_folder(folder: Path) -> None:
    """Makes the results folder.

    Raises:
        InputError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot make the directory {folder}: {error.strerror}") from error
