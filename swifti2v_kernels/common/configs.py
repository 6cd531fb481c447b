"""Measured choices, kept as data: ``configs/*.json``, written by the benchmarks on real hardware and by nothing else.

Entries of ``configs/attention.json`` and of ``configs/conv3d.json``, whose pixels are those of all frames, say which
backend is the fastest:

    {"capability": 90, "card": "...", "dtype": "bfloat16", "head_dim": 128, "tokens": 70400,
     "seconds": {"swifti2v": ..., "sdpa-cudnn": ...}, "provenance": {...}}
    {"capability": 90, "card": "...", "dtype": "bfloat16", "kernel": [3, 3, 3], "channels": [96, 96],
     "pixels": 7208960, "seconds": {"swifti2v": ..., "cudnn": ...}, "provenance": {...}}

Those of ``configs/tuned.json``, written by ``python -m bench tune``, count for launches of the same kernel, capability
and key, in place of a heuristic that the kernel's file documents:

    {"capability": 90, "kernel": "adaln", "key": {"block_c": 2048, ...}, "config": {"block_m": 8, "num_warps": 2},
     "gain": 1.07, "card": "...", "provenance": {...}}

Every kernel's configuration is a dataclass whose ``SPACE`` lists the values that are worth trying for its fields, and
whose ``heuristic`` is launched where nothing was measured: the compile report checks each for spills. A capability of
None is the interpreter's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from typing import Any, TypeVar

from .registration import PACKAGE
from .target import constant_when_traced

Config = TypeVar("Config")

_forced: dict[str, Mapping[str, Any]] = {}
_seen: list[tuple[str, int, dict[str, Any], Any]] | None = None


# Constant for one process: under torch.compile, which cannot trace it, it is read once, at trace time.
@functools.cache
@constant_when_traced
def load_table(name: str) -> list[dict[str, Any]]:
    """Returns the entries of ``configs/<name>.json``."""
    text = resources.files(PACKAGE).joinpath("configs", f"{name}.json").read_text()
    return json.loads(text)["entries"]


def fastest(name: str, match: Mapping[str, Any], size: str, value: int) -> tuple[str | None, str]:
    """Returns the name of the fastest measured backend, None without a measurement, and where it was measured.

    Of the table's entries that ``match``, the one counts whose field ``size`` is the nearest, by ratio, to ``value``.
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


def configured(kernel: str, capability: int | None, heuristic: Config, **key: int | str) -> Config:
    """Returns the configuration of one launch, by the ``key`` of its class of shapes."""
    if capability is None:
        return heuristic
    if _seen is not None:
        _seen.append((kernel, capability, key, heuristic))
    fields = _forced[kernel] if kernel in _forced else _measured(kernel, capability, tuple(key.items()))
    return heuristic if fields is None else replace(heuristic, **fields)


@functools.lru_cache(maxsize=4096)
def _measured(kernel: str, capability: int, key: tuple[tuple[str, int | str], ...]) -> Mapping[str, Any] | None:
    wanted = kernel, capability, dict(key)
    found = (e["config"] for e in load_table("tuned") if (e["kernel"], e["capability"], e["key"]) == wanted)
    return next(found, None)


@contextmanager
def force_config(kernel: str, **fields: Any) -> Iterator[None]:
    """Makes launches of ``kernel`` take these fields in place of the heuristic's while the block runs, for tuners."""
    _forced[kernel] = fields
    try:
        yield
    finally:
        del _forced[kernel]


@contextmanager
def seen_configs() -> Iterator[list[tuple[str, int, dict[str, Any], Any]]]:
    """Yields a list to which every launch within the block adds its (kernel, capability, key, heuristic)."""
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None
