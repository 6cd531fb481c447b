"""A pytest plugin: after a CUDA error that leaves the device unusable, the session ends instead of failing all that
follows."""

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
