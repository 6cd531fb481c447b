"""The quantities that benchmarks report: their names, units and directions, and how people read them.

A table of a result file names its metrics with this metadata beside them, so that a report or a comparison needs
nothing but the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from model.machine.measure import format_bytes


@dataclass(frozen=True)
class Metric:
    """A quantity: ``better`` is ``lower``, ``higher`` or empty where neither is; ``unit`` says how it is written."""

    label: str
    unit: str
    better: str = ""


METRICS: dict[str, Metric] = {
    "seconds": Metric("time", "s", "lower"),
    "launch_seconds": Metric("host time to issue", "s", "lower"),
    "host_seconds": Metric("host time of a call", "s", "lower"),
    "whole_seconds": Metric("measured whole", "s", "lower"),
    "total_seconds": Metric("whole clip", "s", "lower"),
    "stage_one_seconds": Metric("Stage I", "s", "lower"),
    "reference_seconds": Metric("reference", "s", "lower"),
    "stage_two_seconds": Metric("Stage II", "s", "lower"),
    "attention_seconds": Metric("attention", "s", "lower"),
    "linear_seconds": Metric("linear", "s", "lower"),
    "other_seconds": Metric("other", "s", "lower"),
    "decode_seconds": Metric("decode", "s", "lower"),
    "file_seconds": Metric("file", "s", "lower"),
    "frames_per_second": Metric("frames/s", "1/s", "higher"),
    "flops": Metric("operations", "FLOP"),
    "bytes": Metric("least traffic", "bytes"),
    "tflops": Metric("TFLOP/s", "TFLOP/s", "higher"),
    "fraction_of_matmul": Metric("of matmul", "fraction", "higher"),
    "bytes_per_second": Metric("GB/s", "B/s", "higher"),
    "fraction_of_copy": Metric("of copy", "fraction", "higher"),
    "error": Metric("error", "error"),
    "largest_error": Metric("largest error", "error"),
    "error_ratio": Metric("x bf16", "ratio", "lower"),
    "largest_activation": Metric("largest activation", "ratio"),
    "limit": Metric("allowed", "error"),
    "peak_bytes": Metric("peak memory", "bytes", "lower"),
    "peak_bytes_predicted": Metric("peak, predicted", "bytes"),
    "limit_bytes": Metric("limit", "bytes"),
    "reserved_bytes": Metric("reserved", "bytes", "lower"),
    "process_bytes": Metric("process (NVML)", "bytes", "lower"),
    "held_bytes": Metric("held", "bytes"),
    "energy_joules": Metric("energy", "J", "lower"),
    "speedup": Metric("times faster", "ratio", "higher"),
    "memory_ratio": Metric("times less memory", "ratio", "higher"),
    "ratio": Metric("ratio", "ratio"),
    "streams": Metric("in residual streams", "ratio"),
    "eager_bytes": Metric("eager PyTorch moves", "bytes"),
    "eager_flops": Metric("eager, operations", "FLOP"),
    "unfused_bytes": Metric("ours unfused", "bytes"),
    "linear_bytes": Metric("linear layers move", "bytes"),
    "other_bytes": Metric("norms etc. move", "bytes"),
    "gain": Metric("gain", "ratio", "higher"),
    "best_seconds": Metric("best", "s", "lower"),
    "errors": Metric("errors", "count", "lower"),
    "tried": Metric("tried", "count"),
    "dropped": Metric("dropped", "count"),
    "entries": Metric("entries", "count"),
    "difference": Metric("difference", "error"),
    "deviation": Metric("deviation", "fraction"),
    "flop_ratio": Metric("ratio of operations", "ratio"),
    "time_ratio": Metric("ratio of predicted time", "ratio"),
    "baseline_seconds": Metric("baseline", "s", "lower"),
    "predicted_seconds": Metric("predicted", "s"),
    "attention_flops": Metric("attention", "FLOP"),
    "linear_flops": Metric("linear", "FLOP"),
    "convolution_flops": Metric("convolutions", "FLOP"),
    "share": Metric("share", "fraction"),
    "tokens": Metric("tokens", "count"),
    "frames": Metric("frames", "count"),
    "seam": Metric("seam", "seam"),
    "seam_untiled": Metric("seam, untiled", "seam"),
    "redundancy": Metric("work of untiled", "ratio"),
    "registers": Metric("registers", "count", "lower"),
    "spills": Metric("spills", "count", "lower"),
    "shared_bytes": Metric("shared memory", "bytes"),
    "programs_per_sm": Metric("programs/SM", "count"),
    "bound_fraction": Metric("predicted bound, of peak", "fraction", "higher"),
    "copied_bytes": Metric("concatenated", "bytes", "lower"),
}

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
#: A column of bytes whose least value is less than so much of its unit has a unit in each cell.
_LEAST_OF_UNIT = 1e-3


def is_number(value: Any) -> bool:
    """Returns whether a value of a result file is a number; JSON's true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def time_scale(values: Iterable[float | None]) -> tuple[float, str]:
    """Returns the unit in which a column of seconds reads best: its size in seconds, and its name."""
    present = sorted(v for v in values if v)
    middle = present[len(present) // 2] if present else 1.0
    return next(((scale, name) for scale, name in _TIMES if middle >= scale), _TIMES[-1])


def byte_scale(values: Iterable[float | None]) -> tuple[float, str]:
    """Returns the unit for the largest of some numbers of bytes: its size in bytes, and its name (GB is 10^9 bytes)."""
    largest = max((v for v in values if v), default=1e9)
    return next(((scale, name) for scale, name in _BYTES if largest >= scale), _BYTES[-1])


def column_scale(values: Iterable[Any], unit: str) -> tuple[float | None, str]:
    """Returns the unit that a column has in common: its size and its name; None and nothing where cells have their own.

    Args:
        values: of the column; None and text are passed over.
        unit: of the metric, as in :class:`Metric`.
    """
    present = [v for v in values if v and is_number(v)]
    if unit == "s":
        return time_scale(present)
    if unit != "bytes" or not present:
        return None, ""
    scale, name = byte_scale(present)
    return (scale, name) if min(present) >= _LEAST_OF_UNIT * scale else (None, "")


def format_value(value: Any, unit: str, scale: float | None = None) -> str:
    """Returns a metric for people; empty for None.

    Args:
        value: of the metric.
        unit: as in :class:`Metric`.
        scale: of :func:`column_scale`, for seconds and bytes; by default seconds, and bytes with their unit.
    """
    if value is None:
        return ""
    if not is_number(value):
        return str(value)
    if math.isnan(value):
        return "NaN"
    if unit == "s":
        return significant(value / (scale or 1.0))
    if unit == "bytes":
        return _format_bytes(value, scale)
    if unit == "B/s":
        return f"{value / 1e9:,.0f}"
    if unit == "FLOP":
        factor, name = (1e15, "PFLOP") if value >= 1e15 else (1e12, "TFLOP") if value >= 1e12 else (1e9, "GFLOP")
        return f"{value / factor:,.1f} {name}"
    if unit == "error":
        return f"{value:.1e}"
    if unit == "seam":
        return f"{value:.4f}"
    if unit in ("fraction", "ratio"):
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    if unit in ("TFLOP/s", "J"):
        return f"{value:,.0f}" if value >= 10 else significant(value)
    if unit == "count":
        return f"{value:,}"
    return significant(value)


def _format_bytes(value: float, scale: float | None) -> str:
    if scale is None:
        return format_bytes(value) if value >= 1e6 or not value else f"{_format_bytes(value, 1e3)} kB"
    digits = 2 if scale == 1e9 else 1
    # What would be rounded to nothing keeps two digits.
    return f"{value / scale:.2g}" if 0 < value / scale < 5 * 10**-digits else f"{value / scale:,.{digits}f}"


def significant(value: float) -> str:
    """Returns a number with four digits, and no exponent where none is needed."""
    if value == 0:
        return "0"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits <= 6 else f"{value:.3e}"


def column_label(name: str, metric: Mapping[str, Any], scale_name: str = "") -> str:
    """Returns a column's head: its label, and the unit of :func:`column_scale` where the column has one."""
    label = str(metric["label"] or name)
    return f"{label}, {scale_name}" if scale_name else label
