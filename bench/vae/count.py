"""Counts what can be said of the VAE without a GPU: bytes moved, operations, and the bytes that fused forms save.

The counts are made on ``meta`` tensors of the real sizes, for one settled latent frame, operator by operator: every
operator reads its operands once and writes its results once, and no cache helps (``bench/dit/count.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.dit.count import CudaOperators, Traffic
from bench.records.outcome import Unavailable
from bench.vae.layers import Layer, Recorder, settle
from bench.vae.providers import diffusers_model
from bench.vae.shapes import Shape
from model.errors import require
from model.memory.vae_plan import META, SETTLED, plan_vae

ITEMSIZE = 2
#: The table's names for what is fused.
FORMS = {
    "history": "history and borders read in place, not concatenated",
    "residual": "residual added by the convolution's store",
    "norm": "the next norm and SiLU computed by the convolution's store",
    "upsample": "frames not enlarged before the convolution",
    "frames": "clamped, rounded and placed by the last store",
}


def saved_bytes(layer: Layer) -> dict[str, int]:
    """Returns, by fused form of one call, the bytes that the leanest separate operators would move more.

    The separate operators are one copy that concatenates history and pads at once; one operator that adds; one that
    norms and activates; one that enlarges; and one that clamps, scales and rounds.
    """
    frame = ITEMSIZE * layer.height * layer.width * layer.channels
    result = ITEMSIZE * layer.result_pixels * layer.columns
    saved = {}
    if layer.past:
        # Written and read again; the frames themselves are read in either case.
        saved["history"] = 2 * frame * (layer.frames + layer.past) - frame * layer.past
    if layer.residual:
        saved["residual"] = 2 * result
    if layer.norm:
        # The sum is read again, and written if nobody else wants it.
        saved["norm"] = result if layer.keep_sum else 2 * result
    if layer.operator == "upsample_conv2d":
        # Read once, written and read at four times the size, instead of read once.
        saved["upsample"] = 8 * frame * layer.frames
    if layer.operator == "frames_out":
        saved["frames"] = 2 * result
    return saved


def count_own(shape: Shape, part: str) -> dict[str, Any]:
    """Returns bytes and operations of one settled latent frame by our VAE, and the bytes saved by form."""
    before = 0
    with FlopCounterMode(display=False) as flops, Traffic() as traffic, CudaOperators(traffic), Recorder() as recorder:

        def settled() -> None:
            nonlocal before
            before = flops.get_total_flops()
            traffic.bytes.clear()
            recorder.calls.clear()

        settle(shape, part, settled)
    saved: Counter[str] = Counter()
    for layer, calls in recorder.calls.items():
        for form, moved in saved_bytes(layer).items():
            saved[form] += calls * moved
    counted = {"bytes": sum(traffic.bytes.values()), "saved": dict(saved)}
    return counted | {"flops": flops.get_total_flops() - before}


def count_diffusers(shape: Shape, part: str) -> dict[str, Any] | None:
    """Returns the bytes and operations of one settled latent frame by diffusers, eager; None if it is not installed."""
    try:
        model = diffusers_model(shape, torch.bfloat16, META)
    except Unavailable:
        return None
    counts = [_diffusers_clip(model, shape, part, blocks) for blocks in (SETTLED - 1, SETTLED)]
    return {name: counts[1][name] - counts[0][name] for name in counts[0]}


def _diffusers_clip(model: Any, shape: Shape, part: str, blocks: int) -> dict[str, int]:
    rows, columns = shape.latent_size
    if part == "decode":
        size = (1, shape.config.z_dim, blocks, rows, columns)
    else:
        size = (1, 3, 1 + shape.config.temporal_stride * (blocks - 1), shape.height, shape.width)
    clip = torch.empty(size, dtype=torch.bfloat16, device=META)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Traffic() as traffic, CudaOperators(traffic):
        model.decode(clip) if part == "decode" else model.encode(clip)
    return {"bytes": sum(traffic.bytes.values()), "flops": flops.get_total_flops()}


def count_rows(shapes: Sequence[Shape], parts: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """Returns one row for every version, size and part: counts, and predicted peaks, untiled and within the limit."""
    rows = []
    wanted = [(shape, part) for shape in {(s.version, s.name): s for s in shapes}.values() for part in parts]
    for shape, part in require("tqdm", "bench").tqdm(wanted, "counting", leave=False, dynamic_ncols=True, disable=None):
        row: dict[str, Any] = {"version": shape.version, "size": shape.name, "part": part}
        row |= {"width": shape.width, "height": shape.height}
        row |= {"own": count_own(shape, part), "diffusers": count_diffusers(shape, part)}
        rows.append(row | {"plans": plans(shape, part, limit)})
    return rows


def plans(shape: Shape, part: str, limit: int) -> dict[str, Any]:
    """Predicts peaks in the dtypes that are the default: bfloat16 to decode, float32 to encode."""
    found = {}
    dtype = torch.bfloat16 if part == "decode" else torch.float32
    for name, most in (("untiled", None), ("limited", limit)):
        planned = plan_vae(shape.config, part, shape.width, shape.height, dtype=dtype, limit=most)
        found[name] = {
            "peak_bytes_predicted": planned.peak.total,
            "rows": planned.plan.rows,
            "columns": planned.plan.columns,
            "frames": planned.plan.frames,
            "park": planned.plan.park,
            "redundancy": planned.redundancy,
        }
    return found
