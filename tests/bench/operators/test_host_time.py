"""The host's share of a call, as ``python -m bench operators`` prints it."""

from __future__ import annotations

import torch
from triton.runtime.jit import JITFunction

from bench.operators import host_time
from bench.operators.discover import all_cases
from bench.operators.host_time import host_seconds
from swifti2v_kernels import pretend_gpu


def test_the_host_s_time_of_a_call_ends_before_the_launch(monkeypatch) -> None:
    """The launcher is reached in every call, its kernel in none, and Triton launches again afterwards."""
    launches, run = [], JITFunction.run
    monkeypatch.setattr(host_time, "_nothing", lambda self, *args, **kwargs: launches.append(self.fn.__name__))
    (case,) = [case for case in all_cases() if case.name == "norm_modulate C 1536 bfloat16"]
    with pretend_gpu(90):
        seconds = host_seconds(case, torch.device("cpu"))
    assert launches == ["adaln_fwd_kernel"] * host_time.CALLS
    assert 1e-6 < seconds < 0.1
    assert JITFunction.run is run
