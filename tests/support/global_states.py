"""The global state of torch that a program may have set before it calls an operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unusual_state() -> Iterator[None]:
    """Sets another default dtype and device, autocast, deterministic algorithms and inference mode, all at once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        # What is made without a device has no values.
        with torch.device("meta"), torch.autocast("cpu", torch.float16), torch.inference_mode():
            yield
    finally:
        torch.set_default_dtype(before)
        torch.use_deterministic_algorithms(False)
