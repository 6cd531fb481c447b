"""The configurations that kernels are launched with: measured on the card's kind where there is a measurement, else
made by a heuristic that the kernel's file documents.

Measured ones are entries of ``configs/tuned.json``, written by ``python -m bench tune`` on real hardware:

    {"capability": 90, "kernel": "adaln", "key": {"block_c": 2048, ...}, "config": {"block_m": 8, "num_warps": 2},
     "gain": 1.07, "card": "...", "provenance": {...}}

An entry counts for launches of the same kernel, capability and key. Every kernel's configuration is a dataclass whose
``SPACE`` lists the values that are worth trying for its fields.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from .tables import load_table

Config = TypeVar("Config")

_forced: dict[str, Mapping[str, Any]] = {}
_seen: list[tuple[str, int, dict[str, Any], Any]] | None = None


def configured(kernel: str, capability: int | None, heuristic: Config, **key: int | str) -> Config:
    """Returns the configuration of one launch.

    Args:
        kernel: its name in the table.
        capability: two digits; None for the interpreter, which takes the heuristic.
        heuristic: what is used without a measurement.
        key: the class of shapes that the launch belongs to.
    """
    if capability is None:
        return heuristic
    if _seen is not None:
        _seen.append((kernel, capability, key, heuristic))
    fields = _forced[kernel] if kernel in _forced else _measured(kernel, capability, tuple(key.items()))
    return heuristic if fields is None else replace(heuristic, **fields)


@functools.lru_cache(maxsize=4096)
def _measured(kernel: str, capability: int, key: tuple[tuple[str, int | str], ...]) -> Mapping[str, Any] | None:
    wanted = dict(key)
    for entry in load_table("tuned"):
        if (entry["kernel"], entry["capability"]) == (kernel, capability) and entry["key"] == wanted:
            return entry["config"]
    return None


@contextmanager
def force_config(kernel: str, **fields: Any) -> Iterator[None]:
    """Makes launches of ``kernel`` take these fields in place of the heuristic's while the block runs, for tuners."""
    before = dict(_forced)
    _forced[kernel] = fields
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def seen_configs() -> Iterator[list[tuple[str, int, dict[str, Any], Any]]]:
    """Yields a list to which every launch within the block adds its (kernel, capability, key, heuristic)."""
    global _seen
    before, _seen = _seen, []
    try:
        yield _seen
    finally:
        _seen = before
