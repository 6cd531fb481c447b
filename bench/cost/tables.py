"""Rows to print: flat dictionaries, one table a function. Nothing is formatted or printed here."""

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
    """What tables are about unless told otherwise: the presets for GPUs, and the 14B end to end, by name."""
    found = {name: Configuration.for_preset(name) for name, preset in PRESETS.items() if preset.width == 2560}
    return {**found, "14B end to end": baseline()}


def calibration_rows() -> list[Row]:
    """Known times, their predictions and the ratio of the two."""
    return [{**asdict(case), "ratio": case.ratio} for case in calibration()]


def consistent_rows(found: Iterable[Consistent]) -> list[Row]:
    """Of :func:`bench.cost.paper.consistent`."""
    return [{**asdict(c), "encode_dtype": str(c.encode_dtype).removeprefix("torch.")} for c in found]
