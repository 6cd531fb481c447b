"""A pytest plugin that ends the session once a CUDA error has left the device unusable: all that follows would fail."""

from __future__ import annotations

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Asks the device after every test."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the device is lost after {nodeid}: {error}", returncode=3)
