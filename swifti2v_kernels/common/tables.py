"""Measured choices, kept as data: ``configs/*.json``, written by the benchmarks on real hardware and by nothing else.

An entry of ``configs/attention.json``:

    {"capability": 90, "card": "...", "dtype": "bfloat16", "head_dim": 128, "tokens": 70400,
     "seconds": {"swifti2v": ..., "sdpa-cudnn": ...}, "provenance": {...}}

and of ``configs/conv3d.json``, whose pixels are those of all frames:

    {"capability": 90, "card": "...", "dtype": "bfloat16", "kernel": [3, 3, 3], "channels": [96, 96],
     "pixels": 7208960, "seconds": {"swifti2v": ..., "cudnn": ...}, "provenance": {...}}
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from .registration import PACKAGE
from .tracing import constant_when_traced


# Constant for one process: under torch.compile, which cannot trace it, it is read once, at trace time.
@functools.cache
@constant_when_traced
def load_table(name: str) -> list[dict[str, Any]]:
    """Returns the entries of ``configs/<name>.json``."""
    text = resources.files(PACKAGE).joinpath("configs", f"{name}.json").read_text()
    return json.loads(text)["entries"]


def fastest(name: str, match: Mapping[str, Any], size: str, value: int) -> tuple[str | None, str]:
    """Returns the name of the fastest measured backend, None without a measurement, and where it was measured.

    Args:
        name: the table's name.
        match: fields that must be equal.
        size: the field whose value is the nearest, by ratio, to ``value`` in the measurement that counts.
    """
    # Plain loops and divisions, which torch.compile can trace for a size that varies.
    entry, nearest, value = None, 0.0, max(value, 1)
    for e in load_table(name):
        if all(e[key] == given for key, given in match.items()):
            near = min(e[size] / value, value / e[size])
            if entry is None or near > nearest:
                entry, nearest = e, near
    if entry is None:
        *first, last = match
        return None, f"no measurement for this {', '.join(first)} and {last}"
    best = min(entry["seconds"], key=entry["seconds"].get)
    return best, f"fastest as measured on {entry['card']} at {entry[size]} {size}"
