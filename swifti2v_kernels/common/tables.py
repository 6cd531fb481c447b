"""Measured choices, kept as data: ``configs/*.json``, written by the benchmarks on real hardware and by nothing else.

An entry of ``configs/attention.json``:

    {"capability": 90, "card": "...", "dtype": "bfloat16", "head_dim": 128, "tokens": 70400,
     "seconds": {"swifti2v": ..., "sdpa-cudnn": ...}, "environment": {...}}
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import Any

import torch


@functools.cache
def load_table(name: str) -> list[dict[str, Any]]:
    """Entries of ``configs/<name>.json``."""
    text = resources.files("swifti2v_kernels").joinpath("configs", f"{name}.json").read_text()
    return json.loads(text)["entries"]


def nearest_entry(
    name: str, capability: int | None, dtype: torch.dtype, head_dim: int, tokens: int
) -> dict[str, Any] | None:
    """The measurement on this capability, dtype and head_dim whose number of tokens is nearest by ratio."""
    key = (capability, str(dtype).removeprefix("torch."), head_dim)
    entries = [e for e in load_table(name) if (e["capability"], e["dtype"], e["head_dim"]) == key]
    return min(entries, key=lambda e: abs(math.log(e["tokens"] / max(tokens, 1))), default=None)


def fastest_backend(
    name: str, capability: int | None, dtype: torch.dtype, head_dim: int, tokens: int
) -> tuple[str | None, str]:
    """Name of the fastest measured backend and where it was measured; None without a measurement."""
    entry = nearest_entry(name, capability, dtype, head_dim, tokens)
    if entry is None:
        return None, "no measurement for this capability, dtype and head_dim"
    best = min(entry["seconds"], key=entry["seconds"].get)
    return best, f"fastest as measured on {entry['card']} at {entry['tokens']} tokens"
