"""The exact rows that attention is held against, and the entries of the package's table that its times give.

The whole result in float64 would take hours: a few rows of queries are compared. With several sources the others must
concatenate, which is timed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swifti2v_kernels.common.case import Arguments, Case

#: Relative L2 error against float64 above which an implementation is wrong: bfloat16 rounds p and the output once, with
#: at most 2**-8 each.
TOLERANCE = 8e-3
#: Rows of queries that are compared.
CHECKED = 64


def by_rows(case: Case, inputs: Arguments) -> tuple[list[Tensor], float, Callable[[Any], list[Tensor]]]:
    """Returns exact rows of a call's result, the error that is allowed, and how to take these rows of a result."""
    q, sources = inputs[0]
    rows = torch.linspace(0, q.shape[1] - 1, min(CHECKED, q.shape[1]), device=q.device).long()
    return [exact_rows(q, sources, rows)], TOLERANCE, lambda out: [out[:, rows].double()]


def exact_rows(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """Returns attention of the given query rows ``[1, n, H, D]`` in float64, head by head."""
    heads = []
    for h in range(q.shape[2]):
        k, v = (torch.cat([pair[i][0, :, h] for pair in sources]).double() for i in range(2))
        weights = (q[0, rows, h].double() @ k.T * q.shape[3] ** -0.5).softmax(-1)
        heads.append(weights @ v)
    return torch.stack(heads, dim=1).unsqueeze(0)


def described(case: Case) -> dict[str, Any]:
    """Returns a call's heads and lengths; others than ours concatenate several sources, whose bytes are named."""
    assert case.real is not None
    (q, sources), _ = case.real.inputs(torch.device("meta"))
    copied = sum(x.numel() * x.itemsize for pair in sources for x in pair) if len(sources) > 1 else 0
    return {
        "heads": q.shape[2], "head_dim": q.shape[3], "queries": q.shape[1], "keys": [k.shape[1] for k, _ in sources],
        "copied_bytes": copied,
    }  # fmt: skip


def table_entries(environment: dict[str, Any], rows: Sequence[dict[str, Any]], shapes: Sequence[Case]) -> list[Any]:
    """Returns entries of ``configs/attention.json`` from the dense single-source measurements among the rows."""
    major, minor = environment["gpu"]["capability"]
    entries = []
    for shape in shapes:
        call = described(shape)
        mine = [r for r in rows if r["shape"] == shape.name and r["status"] == "ok" and r["exact"]]
        times = {r["provider"]: r["seconds"] for r in mine if r["provider"] in ("swifti2v", "sdpa-cudnn", "sdpa-flash")}
        if len(call["keys"]) == 1 and "swifti2v" in times and len(times) > 1:
            key = {"capability": 10 * major + minor, "dtype": "bfloat16", "head_dim": call["head_dim"]}
            key["tokens"] = call["keys"][0]
            entries.append({**key, "card": environment["device"], "seconds": times})
    return entries
