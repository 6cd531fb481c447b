"""Differences between a stored run and the job it is to go on as: those that forbid it, and those that do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.errors import one_line

#: Sections of a job in which a difference means that the rest of the run has other bits, not that it is another run.
INEXACT = ("software", "machine")
#: Sections that are kept for the reader and not compared, such as the command as it was given.
UNCOMPARED = ("arguments",)


@dataclass(frozen=True)
class Changes:
    """The differences between a stored job and another, a line each: ``request.seed: 7 in the stored run, now 8``.

    A run cannot go on as this job if there are any in ``forbidding``. With those in ``inexact`` it can, but what is
    still to come is not the same bit for bit as it would have been.
    """

    forbidding: tuple[str, ...]
    inexact: tuple[str, ...]


def changes_between(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Returns the differences between two jobs, each a dictionary of sections as JSON has them."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for section in sorted(stored.keys() | now.keys()):
        if section not in UNCOMPARED:
            found[section in INEXACT] += _differences(one_line(section), stored.get(section, {}), now.get(section, {}))
    return Changes(tuple(found[False]), tuple(found[True]))


def _differences(where: str, stored: Any, now: Any) -> list[str]:
    if isinstance(stored, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(stored.keys() | now.keys()):
            name = f"{where}.{one_line(key)}"
            if key not in now:
                lines.append(f"{name}: {_shown(stored[key])} in the stored run, not given now")
            elif key not in stored:
                lines.append(f"{name}: not in the stored run, now {_shown(now[key])}")
            else:
                lines += _differences(name, stored[key], now[key])
        return lines
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        pairs = enumerate(zip(stored, now, strict=True))
        return [line for index, pair in pairs for line in _differences(f"{where}[{index}]", *pair)]
    # JSON tells 1 from 1.0 and from true, Python's == does not.
    if json.dumps(stored) == json.dumps(now):
        return []
    return [f"{where}: {_shown(stored)} in the stored run, now {_shown(now)}"]


def _shown(value: Any) -> str:
    text = one_line(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
