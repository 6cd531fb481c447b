"""Plots, drawn from the rows of a result and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.records.metrics import byte_scale
from model.csg.sampler import SegmentPlan
from model.errors import printable, require
from model.io.durable import replacing

COLOURS = {"end_to_end": "#c0392b", "bidirectional": "#1f6fb2", "causal": "#2e8b57"}
LABELS = {"end_to_end": "end-to-end", "bidirectional": "CSG, bidirectional", "causal": "CSG, causal"}


def plot_rows(rows: Sequence[dict[str, Any]], settings: dict[str, Any], device: str, folder: Path) -> list[Path]:
    """Draws time and peak memory of Stage II against clip length; returns the files ``time.png`` and ``memory.png``."""
    rows = [row for row in rows if row["status"] == "ok"]
    scale, unit = byte_scale(row["peak_bytes"] for row in rows)
    title = f"{shown(device)}\n{shown(settings['model'])}, {settings['width']}x{settings['height']},"
    title += f" {settings['steps']} steps,"
    title += f" {settings['dtype']}"
    figures = (("time", "Stage II, seconds", "stage_two_seconds", 1), ("memory", f"Stage II, peak memory, {unit}",
               "peak_bytes", scale))  # fmt: skip
    return [_plot(rows, title, folder / f"{name}.png", label, value, by) for name, label, value, by in figures]


def _plot(rows: Sequence[dict[str, Any]], title: str, path: Path, label: str, value: str, scale: float) -> Path:
    axes, figure = _axes((6.4, 4.2))
    for mode, colour in COLOURS.items():
        mine = sorted((row for row in rows if row["mode"] == LABELS[mode]), key=lambda row: row["frames"])
        if not mine:
            continue
        x, y = [row["frames"] for row in mine], [row[value] / scale for row in mine]
        axes.plot(x, y, "o-", color=colour, label=LABELS[mode], linewidth=1.8, markersize=4)
        if f"{value}_low" in mine[0]:
            low, high = ([row[f"{value}_{end}"] / scale for row in mine] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("clip length, frames")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save(figure, path)


def plot_attention(rows: Sequence[dict[str, Any]], matmul: float, device: str, path: Path) -> Path:
    """Draws TFLOP/s of every implementation on every shape, with the matmul's as a line."""
    rows = [row for row in rows if row["status"] == "ok"]
    axes, figure = _axes((8.4, _bars_height(rows, "shape")))
    _bars(axes, rows, "shape", "tflops")
    axes.axvline(matmul, color="#c0392b", linewidth=1, label="bf16 matmul, same run")
    axes.set_xlim(0, 1.25 * max([matmul, *(row["tflops"] for row in rows)]))
    axes.set_xlabel("TFLOP/s")
    axes.set_title(f"{shown(device)}, attention in bfloat16", fontsize=9)
    axes.legend(frameon=False, fontsize=7)
    return save(figure, path)


def plot_operators(rows: Sequence[dict[str, Any]], device: str, path: Path) -> Path:
    """Draws the fraction of the copy's bandwidth that every implementation of every operator reaches."""
    rows = [{**row, "group": f"{row['op']}\n{row['shape']}"} for row in rows if row["status"] == "ok"]
    axes, figure = _axes((8.4, _bars_height(rows, "group")))
    _bars(axes, rows, "group", "fraction_of_copy")
    axes.axvline(1.0, color="#c0392b", linewidth=1, label="copy, same run")
    axes.set_xlim(0, 1.25 * max([1.0, *(row["fraction_of_copy"] for row in rows)]))
    axes.set_xlabel("least traffic over time, as a fraction of a copy's bandwidth")
    axes.set_title(f"{shown(device)}, operators of the DiT in bfloat16", fontsize=9)
    axes.legend(frameon=False, fontsize=7)
    return save(figure, path)


def plot_layers(rows: Sequence[dict[str, Any]], device: str, path: Path) -> Path:
    """Draws time and peak of activations of every implementation of a layer, side by side."""
    rows = [
        {
            **row,
            "group": f"{row['shape']}\ntimestep: {row['timesteps']}",
            "milliseconds": row["seconds"] * 1e3,
            "gigabytes": row["peak_bytes"] / 1e9,
        }
        for row in rows
        if row["status"] == "ok"
    ]
    title = f"{shown(device)}, one layer of the DiT in bfloat16"
    return _side_by_side(rows, {"milliseconds": "milliseconds", "gigabytes": "activations, peak, GB"}, title, path)


def plot_vae(rows: list[dict[str, Any]], device: str, path: Path) -> Path:
    """Draws time and peak memory of every implementation of one part of the VAE, side by side."""
    scale, unit = byte_scale(row["peak_bytes"] for row in rows)
    drawn = [
        {
            **row,
            "group": f"{row['version']}, {row['size']}\n{row['frames']} frames",
            "memory": row["peak_bytes"] / scale,
            "exact": row["ours"] or row["seam"] is None,
        }
        for row in rows
    ]
    title = f"{shown(device)}, Wan VAE, {rows[0]['part']}"
    return _side_by_side(drawn, {"seconds": "seconds", "memory": f"peak memory, {unit}"}, title, path)


def plot_differences(untiled: Tensor, tiled: dict[str, Tensor], title: str, path: Path) -> Path:
    """Draws a frame and where its tiled versions differ from it, all on one logarithmic scale.

    Args:
        untiled: the frame ``[3, H, W]`` in -1..1, decoded whole.
        tiled: the same frame decoded in tiles, by the names of the tilings.
    """
    height, width = untiled.shape[1:]
    figure = require("matplotlib.figure", "bench").Figure(
        figsize=(4.5 * (1 + len(tiled)) + 1, 4.5 * height / width + 0.8), dpi=150, layout="constrained"
    )
    first, *others = figure.subplots(1, 1 + len(tiled))
    first.imshow(((untiled.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy())
    first.set_title("untiled, float32, random weights", fontsize=8)
    scale = require("matplotlib.colors", "bench").LogNorm(1e-8, 1.0)
    image = None
    for axes, (name, frame) in zip(others, tiled.items(), strict=True):
        # A logarithm has no zero: what does not differ takes the lowest colour.
        difference = (frame - untiled).abs().mean(dim=0).clamp_min(1e-8)
        image = axes.imshow(difference.numpy(), norm=scale, cmap="inferno", interpolation="nearest")
        axes.set_title(f"{name}: mean difference {difference.mean():.1e}", fontsize=8)
    for axes in (first, *others):
        axes.axis("off")
    if image is not None:
        figure.colorbar(image, ax=others, label="|tiled - untiled|, of 2", shrink=0.8)
    figure.suptitle(title, fontsize=9)
    return save(figure, path)


def _side_by_side(rows: list[dict[str, Any]], values: dict[str, str], title: str, path: Path) -> Path:
    """Draws bars of two values of the same rows, which share their groups."""
    figure = require("matplotlib.figure", "bench").Figure(
        figsize=(10, _bars_height(rows, "group")), dpi=150, layout="constrained"
    )
    for axes, (value, label) in zip(figure.subplots(1, 2, sharey=True), values.items(), strict=True):
        _bars(axes, rows, "group", value)
        axes.set_xlim(0, 1.5 * max(1e-9, *(row[value] for row in rows)))
        axes.set_xlabel(label)
    # The axis is shared, and each half has turned it over.
    axes.invert_yaxis()
    figure.suptitle(title, fontsize=9)
    return save(figure, path)


def _bars_height(rows: list[dict[str, Any]], group: str) -> float:
    """Returns the inches that :func:`_bars` needs."""
    return 0.22 * len(rows) + 0.2 * len({row[group] for row in rows}) + 1.5


def _bars(axes: Any, rows: list[dict[str, Any]], group: str, value: str) -> None:
    """Draws one bar a row, groups from top to bottom; ours in blue, the first of them darkest, inexact in yellow."""
    first = next((row["provider"] for row in rows), None)
    line, ticks = 0.0, {}
    for name in dict.fromkeys(row[group] for row in rows):
        mine = [row for row in rows if row[group] == name]
        ticks[name] = line + (len(mine) - 1) / 2
        for row in mine:
            colour = "#1f6fb2" if row["ours"] else "#b0b0b0" if row.get("exact", True) else "#e0a020"
            axes.barh(line, row[value], 0.85, color=colour, alpha=1.0 if row["provider"] == first else 0.75)
            axes.text(row[value], line, f" {shown(row['provider'])}", va="center", fontsize=7)
            line += 1
        line += 0.8
    axes.set_yticks(list(ticks.values()), [shown(name) for name in ticks], fontsize=7)
    axes.invert_yaxis()


def plot_plan(plan: SegmentPlan, path: Path) -> Path:
    """Draws which blocks every window of a plan holds: one line a segment."""
    axes, figure = _axes((8.4, 0.34 * len(plan) + 1.5))
    kinds = {"anchor (input image)": "#e0a020", "neighbour": "#8fb8de", "noisy": "#1f6fb2"}
    for line, window in enumerate(plan):
        for block in range(plan.num_blocks):
            axes.add_patch(_square(block, line, "#f2f2f2"))
        for block in window.conditioning:
            axes.add_patch(_square(block, line, kinds["anchor (input image)" if block == 0 else "neighbour"]))
        for block in window.noisy:
            axes.add_patch(_square(block, line, kinds["noisy"]))
    axes.set_xlim(-0.5, plan.num_blocks - 0.5)
    axes.set_ylim(len(plan) - 0.5, -0.5)
    axes.set_yticks(range(len(plan)), [str(i + 1) for i in range(len(plan))])
    axes.set_xticks(range(plan.num_blocks))
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("block (latent frame) of the clip")
    axes.set_ylabel("segment")
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [_square(0, 0, colour) for colour in kinds.values()]
    axes.legend(handles, kinds, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)
    return save(figure, path)


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    # Figure without pyplot: no display is looked for, and no global state stays.
    figure = require("matplotlib.figure", "bench").Figure(figsize=size, dpi=150, layout="constrained")
    return figure.subplots(), figure


def _square(x: float, y: float, colour: str) -> Any:
    patches = require("matplotlib.patches", "bench")
    return patches.Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, facecolor=colour, linewidth=0)


def shown(text: str) -> str:
    """Returns text that a plot shows as it is: matplotlib would take what stands between dollars for a formula."""
    return printable(text).replace("$", r"\$")


def save(figure: Any, path: Path) -> Path:
    """Writes a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
