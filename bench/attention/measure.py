"""The exact rows that attention is held against, and the entries of the package's table that its times give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swifti2v_kernels import segment_attention
from swifti2v_kernels.common.case import Arguments, Case

#: Relative L2 error against float64 above which an implementation is wrong: bfloat16 rounds p and the output once, with
#: at most 2**-8 each.
TOLERANCE = 8e-3
#: Rows of queries that are compared: the whole result in float64 would take hours.
CHECKED = 64


def by_rows(case: Case, inputs: Arguments) -> tuple[list[Tensor], float, Callable[[Any], list[Tensor]]]:
    """Returns exact rows of a call's result, the error that is allowed, and how to take these rows of a result."""
    q, sources = inputs[0]
    rows = torch.linspace(0, q.shape[1] - 1, min(CHECKED, q.shape[1]), device=q.device).long()
    return [exact_rows(q, sources, rows)], TOLERANCE, lambda out: [out[:, rows].double()]


def exact_rows(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """Returns attention of the given query rows ``[1, n, H, D]`` in float64, by the operator's PyTorch path."""
    return segment_attention(q[:, rows].double(), [(k.double(), v.double()) for k, v in sources], backend="torch")


def copied_bytes(case: Case) -> int:
    """Returns the bytes that others than ours must concatenate for a call in 16 bits: those of several sources."""
    assert case.real is not None
    (_, sources), _ = case.real.inputs(torch.device("meta"))
    return sum(x.nbytes for pair in sources for x in pair) if len(sources) > 1 else 0


def table_entries(environment: dict[str, Any], rows: Sequence[dict[str, Any]], shapes: Sequence[Case]) -> list[Any]:
    """Returns entries of ``configs/attention.json`` from the dense single-source measurements among the rows."""
    major, minor = environment["gpu"]["capability"]
    entries = []
    for shape in shapes:
        assert shape.real is not None
        (q, sources), _ = shape.real.inputs(torch.device("meta"))
        mine = [r for r in rows if r["shape"] == shape.name and r["status"] == "ok" and r["exact"]]
        times = {r["provider"]: r["seconds"] for r in mine if r["provider"] in ("swifti2v", "sdpa-cudnn", "sdpa-flash")}
        if len(sources) == 1 and "swifti2v" in times and len(times) > 1:
            key = {"capability": 10 * major + minor, "dtype": "bfloat16", "head_dim": q.shape[3]}
            key["tokens"] = sources[0][0].shape[1]
            entries.append({**key, "card": environment["device"], "seconds": times})
    return entries
