"""The quantities that benchmarks report: their names, units and directions, and how people read them.

A table of a result file names its metrics with this metadata beside them, so that a report or a comparison needs
nothing but the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A quantity: ``better`` is ``lower``, ``higher`` or empty where neither is; ``unit`` says how it is written."""

    label: str
    unit: str
    better: str = ""


def _metrics(unit: str, better: str = "", **labels: str) -> dict[str, Metric]:
    """Returns metrics of one unit and direction, by name and label."""
    return {name: Metric(label, unit, better) for name, label in labels.items()}


METRICS: dict[str, Metric] = {
    **_metrics("s", "lower",
        seconds="time", launch_seconds="host time to issue", host_seconds="host time of a call",
        whole_seconds="measured whole", total_seconds="whole clip", stage_one_seconds="Stage I",
        reference_seconds="reference", stage_two_seconds="Stage II", attention_seconds="attention",
        linear_seconds="linear", other_seconds="other", decode_seconds="decode", file_seconds="file",
        best_seconds="best"),
    **_metrics("1/s", "higher", frames_per_second="frames/s"),
    **_metrics("FLOP",
        flops="operations", attention_flops="attention", linear_flops="linear", convolution_flops="convolutions"),
    **_metrics("bytes",
        bytes="least traffic", peak_bytes_predicted="peak, predicted", limit_bytes="limit", held_bytes="held",
        shared_bytes="shared memory"),
    **_metrics("TFLOP/s", "higher", tflops="TFLOP/s"),
    **_metrics("fraction", "higher",
        fraction_of_matmul="of matmul", fraction_of_copy="of copy", bound_fraction="predicted bound, of peak"),
    **_metrics("B/s", "higher", bytes_per_second="GB/s"),
    **_metrics("error",
        error="error", largest_error="largest error", limit="allowed", difference="difference"),
    **_metrics("ratio", "lower", error_ratio="x bf16"),
    **_metrics("ratio",
        largest_activation="largest activation", ratio="ratio"),
    **_metrics("bytes", "lower",
        peak_bytes="peak memory", reserved_bytes="reserved", process_bytes="process (NVML)",
        copied_bytes="concatenated"),
    **_metrics("J", "lower", energy_joules="energy"),
    **_metrics("ratio", "higher",
        speedup="times faster", memory_ratio="times less memory", gain="gain"),
    **_metrics("count", "lower",
        errors="errors", registers="registers", spills="spills"),
    **_metrics("count",
        tried="tried", dropped="dropped", entries="entries", tokens="tokens", frames="frames",
        programs_per_sm="programs/SM"),
    **_metrics("s", predicted_seconds="predicted"),
    **_metrics("fraction", share="share"),
}  # fmt: skip

#: Units of columns: size and name; GB is 10^9 bytes.
_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
}


def is_number(value: Any) -> bool:
    """Returns whether a value of a result file is a number; JSON's true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def column_scale(values: Iterable[Any], unit: str) -> tuple[float | None, str]:
    """Returns the unit in which a column reads best: its size and its name; None and nothing where there is none.

    Args:
        values: of the column: seconds go by most of them, bytes by the largest; None, 0 and text are passed over.
        unit: of the metric, as in :class:`Metric`.
    """
    present = sorted(value for value in values if value and is_number(value))
    if unit not in _SCALES or not present:
        return None, ""
    value = present[-1] if unit == "bytes" else present[len(present) // 2]
    return next((scale for scale in _SCALES[unit] if value >= scale[0]), _SCALES[unit][-1])


def format_value(value: Any, unit: str, scale: float | None = None) -> str:
    """Returns a metric for people; empty for None.

    Args:
        value: of the metric.
        unit: as in :class:`Metric`.
        scale: of :func:`column_scale`, for seconds and bytes; by default seconds, and bytes with their unit.
    """
    if value is None or not is_number(value):
        return "" if value is None else str(value)
    if math.isnan(value):
        return "NaN"
    if unit == "s":
        return significant(value / (scale or 1.0))
    if unit == "bytes" and scale is None:
        scale, name = column_scale([value or 1.0], unit)
        return f"{format_value(value, unit, scale)} {name}"
    if unit == "bytes":
        digits = 2 if scale == 1e9 else 1
        # What would be rounded to nothing keeps two digits.
        return f"{value / scale:.2g}" if 0 < value / scale < 5 * 10**-digits else f"{value / scale:,.{digits}f}"
    if unit == "B/s":
        return f"{value / 1e9:,.0f}"
    if unit == "FLOP":
        factor, name = (1e15, "PFLOP") if value >= 1e15 else (1e12, "TFLOP") if value >= 1e12 else (1e9, "GFLOP")
        return f"{value / factor:,.1f} {name}"
    if unit in ("fraction", "ratio"):
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    if unit in ("TFLOP/s", "J") and value >= 10:
        return f"{value:,.0f}"
    form = {"error": ".1e", "seam": ".4f", "count": ","}.get(unit)
    return significant(value) if form is None else format(value, form)


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
