"""Results of ``python -m bench vae`` for people: Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.vae_count import FORMS
from bench.vae_layers import CUDNN
from model.errors import require
from model.measure import format_bytes


def format_result(result: dict[str, Any]) -> str:
    """Whole clips, layers, and the figures to be reached."""
    device = result["environment"]["device"]
    pieces = [format_clips(result["rows"]), format_layers(result["layers"]), format_targets(result["targets"])]
    note = f"Measured on {device}. Peak memory includes the weights and not the clip that is given."
    if any(row.get("seam") is not None for row in result["rows"]):
        note += " Seam: mean step across the borders of tiles over the mean step elsewhere; in brackets untiled."
    if any(row["error"] is not None and not row["ours"] for row in result["rows"] if row["status"] == "ok"):
        note += " Weights are random: how much diffusers' tiles change says little about trained ones."
    if result["matmul_tflops"] is not None:
        note += f" bf16 matrix product in the same run: {result['matmul_tflops']:.0f} TFLOP/s."
    return "\n\n".join([piece for piece in pieces if piece] + [note])


def format_clips(rows: Sequence[dict[str, Any]]) -> str:
    """One line for every implementation of every clip."""
    cells = []
    for row in rows:
        head = [row["version"], row["part"], f"{row['size']} ({row['width']}x{row['height']})", str(row["frames"])]
        head += [row["provider"], row["dtype"]]
        if row["status"] != "ok":
            cells.append([*head, *[""] * 6, f"{row['status']}: {row['reason'][:80]}"])
            continue
        predicted, error, found = row.get("peak_bytes_predicted"), row["error"], row["seam"]
        notes = [] if row["limit"] is None else [f"limit {format_bytes(row['limit'])}"]
        if error is None:
            notes.append(f"checked against {row['checked_against']}")
        cells.append([
            *head, f"{row['seconds']:.3f}", f"{row['frames_per_second']:.1f}", format_bytes(row["peak_bytes"]),
            "" if predicted is None else format_bytes(predicted), "" if error is None else f"{error:.1e}",
            "" if found is None else f"{found:.4f} ({row['seam_untiled']:.4f})", "; ".join(notes),
        ])  # fmt: skip
    headers = ["VAE", "part", "size", "frames", "implementation", "dtype", "s", "frames/s", "peak", "peak, predicted"]
    return _table(cells, [*headers, "error", "seam", "note"])


def format_layers(rows: Sequence[dict[str, Any]]) -> str:
    """One line for every layer, with the faster implementation."""
    cells = []
    for row in rows:
        head = [row["where"], row["layer"], row["dtype"], str(row["calls"])]
        if row["status"] != "ok":
            cells.append([*head, *[""] * 6, f"{row['status']}: {row['reason'][:80]}"])
            continue
        seconds, tflops, share = row["seconds"], row["tflops"], row["fraction_of_matmul"]
        cells.append([
            *head, *(f"{1e3 * seconds[name]:.3f}" for name in ("swifti2v", CUDNN)),
            *(f"{tflops[name]:.0f}" for name in ("swifti2v", CUDNN)), f"{share['swifti2v']:.2f}",
            f"{row['errors']['swifti2v']:.1e}", min(seconds, key=seconds.get),
        ])  # fmt: skip
    headers = ["first in", "layer", "dtype", "calls", "ours, ms", "cuDNN, ms", "ours, TFLOP/s", "cuDNN, TFLOP/s"]
    return _table(cells, [*headers, "ours of matmul", "error", "faster"])


def format_targets(targets: Sequence[dict[str, Any]]) -> str:
    """The figures to be reached."""
    cells = []
    for target in targets:
        value = f"{target['value']:.3g} {target['unit']}".strip()
        cells.append(
            [target["what"], target["shape"], value, f"{target['wanted']:.3g}", "met" if target["met"] else "MISSED"]
        )
    return _table(cells, ["figure", "clip", "measured", "wanted", ""])


def format_counts(rows: Sequence[dict[str, Any]]) -> str:
    """Traffic and operations of a settled latent frame, diffusers' against ours."""
    cells = []
    for row in rows:
        own, other = row["own"], row["diffusers"]
        apart = own["bytes"] + sum(own["saved"].values())
        theirs = ["not installed", "", ""]
        if other is not None:
            theirs = [f"{other['bytes'] / 2**30:.1f}", f"{other['bytes'] / own['bytes']:.1f}"]
            theirs.append(f"{other['flops'] / 1e12:.1f}")
        cells.append([
            row["version"], row["part"], row["size"], theirs[0], f"{apart / 2**30:.1f}", f"{own['bytes'] / 2**30:.1f}",
            *theirs[1:], f"{own['flops'] / 1e12:.1f}",
        ])  # fmt: skip
    headers = ["VAE", "part", "size", "diffusers, GiB", "ours unfused, GiB", "ours, GiB", "diffusers over ours"]
    return _table(cells, [*headers, "diffusers, TFLOP", "ours, TFLOP"])


def format_savings(rows: Sequence[dict[str, Any]]) -> str:
    """What each fused form saves of a settled latent frame's traffic."""
    cells = [
        [text, *(f"{row['own']['saved'].get(form, 0) / 2**30:.1f}" for row in rows)] for form, text in FORMS.items()
    ]
    return _table(cells, ["saves, GiB", *(f"{row['version']} {row['part']} {row['size']}" for row in rows)])


def format_plans(rows: Sequence[dict[str, Any]], limit: int) -> str:
    """Predicted peaks."""
    cells = []
    for row in rows:
        untiled, plan = row["plans"]["untiled"], row["plans"]["limited"]
        cells.append([
            row["version"], row["part"], f"{row['size']} ({row['width']}x{row['height']})",
            format_bytes(untiled["peak_bytes_predicted"]), format_bytes(plan["peak_bytes_predicted"]),
            f"{plan['rows']} x {plan['columns']}{', parked' * plan['park']}", f"{plan['redundancy']:.2f}",
        ])  # fmt: skip
    headers = ["VAE", "part", "size", "untiled", f"within {format_bytes(limit)}", "tiles", "work of untiled"]
    return _table(cells, headers)


def _table(cells: list[list[str]], headers: list[str]) -> str:
    tabulate = require("tabulate", "bench").tabulate
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True) if cells else ""
