"""Plots of memory over time and against the clip's length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.memory.clip import ClipRun
from bench.records.plot import COLOURS, LABELS, save
from model.errors import require

MB, GB = 10**6, 10**9


def plot_timelines(runs: Sequence[ClipRun], path: Path) -> Path:
    """Plots the allocated bytes of every run over time, with its stages, segments and limit, and returns the path."""
    figure = require("matplotlib.figure", "bench").Figure(figsize=(9.6, 3.4 * len(runs)), dpi=150, layout="constrained")
    for axes, run in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        points = run.course.thinned()
        scale, unit = (GB, "GB") if run.course.peak() > GB else (MB, "MB")
        axes.fill_between(
            [t for t, _ in points], [b / scale for _, b in points], step="post", color="#1f6fb2", alpha=0.35
        )
        axes.plot(
            [t for t, _ in points], [b / scale for _, b in points], drawstyle="steps-post", color="#1f6fb2", lw=0.8
        )
        top = max(run.course.peak(), run.setup.limit or 0) / scale
        if run.setup.limit:
            axes.axhline(run.setup.limit / scale, color="#c0392b", lw=1, label="limit")
            axes.legend(frameon=False, fontsize=7, loc="upper right")
        shown = ""
        for seconds, label in run.course.marks:
            # Segments and decoding alternate; each is named where it is first met.
            kind = label.split(" ")[0] if label.startswith("decode") else label
            if kind != shown and not (label == "decode" and shown.startswith("Stage II")):
                axes.axvline(seconds, color="#888888", lw=0.6)
                axes.text(seconds, 1.02 * top, f" {label}", rotation=55, fontsize=6, va="bottom", ha="left")
                shown = kind
        axes.set_ylim(0, 1.05 * top)
        axes.set_ylabel(f"allocated, {unit}")
        counted = run.total_seconds is None
        axes.set_xlabel("allocations and frees (counted, not run)" if counted else "seconds")
        limit = "" if run.setup.limit is None else f", within {run.setup.limit_told}"
        failed = "" if run.status == "ok" else f": {run.status}"
        axes.set_title(f"{run.setup.name}{limit}{failed}", fontsize=9, pad=42, loc="left")
    return save(figure, path)


def plot_lengths(rows: Sequence[dict[str, Any]], title: str, path: Path) -> Path:
    """Plots peaks against the clip's length by mode, predicted ones as a dashed line, and returns the path."""
    figure = require("matplotlib.figure", "bench").Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for basis, style in (("predicted", "--"), ("measured", "o-")):
        for mode in dict.fromkeys(row["mode"] for row in rows):
            mine = [r for r in rows if (r["mode"], r["basis_of_peak"]) == (mode, basis) and r.get("peak_bytes")]
            if mine:
                label = f"{LABELS[mode]}, {'predicted' if basis == 'predicted' else mine[0]['basis']}"
                x, y = [row["frames"] for row in mine], [row["peak_bytes"] / GB for row in mine]
                axes.plot(x, y, style, color=COLOURS[mode], label=label, lw=1.6, markersize=4)
    axes.set_xlabel("clip length, frames")
    axes.set_ylabel("Stage II, peak, GB")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return save(figure, path)
