"""Results of ``python -m bench dit`` for people: Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.dit_block import COMPILED
from bench.dit_split import GROUPS
from model.errors import require
from model.measure import format_bytes


def format_result(result: dict[str, Any]) -> str:
    """Operators, layers, and the figures to be reached."""
    rows = result["rows"]
    copy, matmul = result["copy_bytes_per_second"] / 1e9, result["matmul_tflops"]
    pieces = [
        _ops([row for row in rows if row["part"] == "op"]),
        _blocks([row for row in rows if row["part"] == "block"]),
        _targets(result["targets"]),
        f"Measured on {result['environment']['device']}, bf16; in the same run: copy {copy:,.0f} GB/s (read and"
        f" written), matrix product {matmul:.0f} TFLOP/s. GB/s are the operator's least traffic over its time; extra"
        " memory is what a call allocates, its results included.",
    ]
    return "\n\n".join(piece for piece in pieces if piece)


def _ops(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        head = [row["shape"], row["op"], row["provider"]]
        if row["status"] != "ok":
            cells.append([*head, *[""] * 8, _reason(row)])
            continue
        cells.append([
            *head, f"{row['seconds'] * 1e3:.3f}", f"{row['seconds_20'] * 1e3:.3f} - {row['seconds_80'] * 1e3:.3f}",
            f"{row['bytes_per_second'] / 1e9:,.0f}", f"{row['fraction_of_copy']:.2f}", f"{row['tflops']:.1f}",
            f"{row['fraction_of_matmul']:.2f}", f"{row['error']:.1e}", format_bytes(row["peak_bytes"]), row["note"],
        ])  # fmt: skip
    headers = ["shape", "operator", "implementation", "ms", "20 - 80 %", "GB/s", "of copy", "TFLOP/s", "of matmul"]
    return _table(cells, [*headers, "error", "extra memory", "note"])


def _blocks(rows: Sequence[dict[str, Any]]) -> str:
    groups = [group for group in GROUPS if any(group in row.get("split", {}) for row in rows)]
    cells = []
    for row in rows:
        head = [row["shape"], f"{row['tokens']:,}", row["timesteps"], row["provider"]]
        if row["status"] != "ok":
            cells.append([*head, *[""] * (5 + len(groups)), _reason(row)])
            continue
        split = [f"{1e3 * row['split'][group]:.2f}" if group in row["split"] else "" for group in groups]
        cells.append([
            *head, f"{row['seconds'] * 1e3:.2f}", f"{row['seconds_20'] * 1e3:.2f} - {row['seconds_80'] * 1e3:.2f}",
            f"{row['tflops']:.0f}", f"{row['error']:.1e}", format_bytes(row["peak_bytes"]), *split, "",
        ])  # fmt: skip
    headers = ["shape", "tokens", "timestep", "layer", "ms", "20 - 80 %", "TFLOP/s", "error", "activations, peak"]
    table = _table(cells, [*headers, *(f"{group}, ms" for group in groups), "note"])
    if not table:
        return ""
    return (
        f"{table}\n\nText keys and values are made once a clip by ours and in every call by diffusers. One timestep is"
        " diffusers' best case; per block, it is given modulation per token (not counted as activation)."
    )


def _targets(targets: Sequence[dict[str, Any]]) -> str:
    cells = []
    for target in targets:
        wanted = "" if target["wanted"] is None else f"{target['wanted']:.2f}"
        verdict = {None: "", True: "met", False: "MISSED"}[target["met"]]
        cells.append([target["what"], target["shape"], f"{target['value']:.2f} {target['unit']}", wanted, verdict])
    return _table(cells, ["figure", "shape", "measured", "wanted", ""])


def format_counted_ops(rows: Sequence[dict[str, Any]]) -> str:
    """Least traffic, FLOPs, and what plain PyTorch moves."""
    cells = [
        [
            row["shape"], row["op"], f"{row['flops'] / 1e9:.1f}", f"{row['bytes'] / 2**20:,.0f}",
            f"{row['eager_bytes_predicted'] / 2**20:,.0f}", f"{row['eager_bytes_predicted'] / row['bytes']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    headers = ["shape", "operator", "GFLOP", "least traffic, MiB", "eager, predicted, MiB", "ratio"]
    return _table(cells, headers)


def format_counted_blocks(rows: Sequence[dict[str, Any]]) -> str:
    """Predicted peaks and traffic of a layer."""
    cells = []
    for row in rows:
        peak, traffic = row["peak_bytes_predicted"], row["bytes_predicted"]
        same = [r for r in rows if (r["shape"], r["timesteps"]) == (row["shape"], row["timesteps"])]
        compiled = next((r["peak_bytes_predicted"] for r in same if r["provider"] == COMPILED), None)
        ratio = f"{peak / compiled:.2f}" if peak and compiled else ""
        counted = ["not counted", "", ""] if peak is None else [format_bytes(peak), f"{row['copies']:.2f}", ratio]
        moved = ["", ""]
        if traffic is not None:
            small = sum(n for group, n in traffic.items() if group != "linear" and "attention" not in group)
            moved = [f"{small / 2**30:.1f}", f"{traffic.get('linear', 0) / 2**30:.1f}"]
        tflop = f"{row['flops'] / 1e12:.1f}"
        cells.append([row["shape"], f"{row['tokens']:,}", row["timesteps"], row["provider"], tflop, *counted, *moved])
    headers = [
        "shape",
        "tokens",
        "timestep",
        "layer",
        "TFLOP",
        "activations, peak",
        "in residual streams",
        "of compiled",
    ]
    return _table(cells, [*headers, "norms etc. move, GiB", "products move, GiB"])


def _reason(row: dict[str, Any]) -> str:
    return f"{row['status']}: {row['reason'][:80]}"


def _table(cells: list[list[str]], headers: list[str]) -> str:
    tabulate = require("tabulate", "bench").tabulate
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True) if cells else ""
