"""Rows of tables as flat dictionaries, one table a function; nothing is formatted or printed here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from bench.cost.calibration import calibration
from bench.cost.paper import Consistent, baseline
from model.config import PRESETS
from model.memory.cost.configuration import Configuration

Row = dict[str, Any]


def headline() -> dict[str, Configuration]:
    """Returns the configurations of tables by default, by name: the presets for GPUs, and the 14B end to end."""
    found = {name: Configuration.for_preset(name) for name, preset in PRESETS.items() if preset.width == 2560}
    return {**found, "14B end to end": baseline()}


def calibration_rows() -> list[Row]:
    """Returns rows with known times, their predictions and the ratio of the two."""
    return [{**asdict(case), "ratio": case.ratio} for case in calibration()]


def consistent_rows(found: Iterable[Consistent]) -> list[Row]:
    """Returns rows of the configurations that :func:`bench.cost.paper.consistent` has found."""
    return [{**asdict(c), "encode_dtype": str(c.encode_dtype).removeprefix("torch.")} for c in found]
