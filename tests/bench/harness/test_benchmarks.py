"""The pytest-benchmark suite: every operator of the registry, at real size on a GPU and small on a CPU.

    pytest -m benchmark                    times them, with pytest-benchmark's table, saving and comparing
    pytest                                 runs each once, so that the suite cannot rot

On a GPU pytest-benchmark's times hold a synchronisation and Python's launch; ``python -m bench operators`` gives device
time. On a CPU it is the operators' PyTorch path.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from bench.operators.check import randomised
from bench.operators.discover import all_cases
from bench.operators.measure import real_call
from swifti2v_kernels.common.case import Case

CUDA = torch.cuda.is_available()
CASES = [case for case in all_cases() if case.real is not None]


@pytest.mark.benchmark(group="operators")
@pytest.mark.parametrize(
    "case",
    # A thousand channels take seconds without a GPU.
    [pytest.param(c, marks=pytest.mark.slow if "C1024" in c.name and not CUDA else ()) for c in CASES],
    ids=lambda case: case.name,
)
def test_operator(case: Case, benchmark: Any) -> None:
    assert case.real is not None
    benchmark.extra_info |= {"shape": case.real.shape if CUDA else "small, PyTorch path", "flops": case.real.cost.flops}
    if CUDA:
        with real_call(case, torch.device("cuda")) as call:
            result = benchmark(lambda: (call(), torch.cuda.synchronize())[0])
    else:
        args, kwargs = randomised(case, torch.device("cpu"))
        with torch.no_grad():
            result = benchmark(case.operator, *args, **kwargs | {"backend": "torch"})
    results = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
    assert results
    # On a GPU residuals are updated in place thousands of times.
    assert CUDA or all(torch.isfinite(x.float()).all() for x in results)
