"""Measures the VAE's implementations: each is checked against float32, then timed; everything that fails is a row."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench.harness.timing import limited, wall_seconds, without_tf32
from bench.operators.check import relative_error
from bench.records.outcome import FAILURES, failure
from bench.vae.providers import PROVIDERS, Provider, Runner, own_runner
from bench.vae.shapes import Shape
from model.errors import InputError
from model.machine.counted import TensorMemory
from model.machine.host import release
from model.vae.model import WHOLE

#: Relative L2 error against float32 above which exact tiles, or the whole frame, are wrong. bfloat16 rounds once a
#: layer with 2**-9, over some thirty layers.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-3}
#: Latent frames of the clip that is checked: the first, and one that has a past.
CHECKED = 2
#: Runs longer than so many seconds are not repeated.
LONG = 10.0
#: What must be reached at 2K: the time of diffusers' fastest setting that fits over ours, and our peak over that of its
#: tiles.
SPEED_TARGET, PEAK_TARGET = 2.0, 1 / 3


def clip_for(shape: Shape, part: str, blocks: int, device: torch.device) -> Tensor:
    """Makes the same clip of ``blocks`` latent frames for everybody: random latents, or a moving picture with edges."""
    rows, columns = shape.latent_size
    if part == "decode":
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, shape.config.z_dim, blocks, rows, columns, generator=generator).to(device)
    clip = torch.empty(1, 3, 1 + (blocks - 1) * shape.config.temporal_stride, shape.height, shape.width, device=device)
    y = torch.arange(shape.height, device=device).view(-1, 1) / 40
    x = torch.arange(shape.width, device=device) / 40
    for t in range(clip.shape[2]):
        waves = torch.sin(x + t / 8) * torch.cos(y), torch.sign(torch.sin(x * y / 30 - t / 8)), torch.sin(y + t / 4 + x)
        clip[0, :, t] = 0.8 * torch.stack(waves)
    return clip


def measure(
    shape: Shape,
    part: str,
    device: torch.device,
    *,
    providers: Sequence[Provider] = PROVIDERS,
    limit: int | None = None,
    repeats: int = 3,
    report: Callable[[dict[str, Any]], Any],
) -> None:
    """Reports one row for every implementation of one part on one shape; one model at a time is on the device.

    Args:
        limit: bytes that implementations in tiles of ours may take, held to by the allocator on CUDA; None for no
            limit.
        repeats: timed runs of each.
    """
    base: dict[str, Any] = {"version": shape.version, "part": part, "size": shape.name, "width": shape.width}
    base |= {"height": shape.height, "frames": shape.num_frames}
    # The defaults: bfloat16 is practically lossless to decode, and not to encode.
    dtype = torch.bfloat16 if part == "decode" and device.type == "cuda" else torch.float32
    expected, reason = reference(shape, part, device)
    for provider in providers:
        row = {**base, "provider": provider.name, "ours": provider.ours}
        row |= {"dtype": str(dtype).removeprefix("torch."), "limit_bytes": limit if provider.limited else None}
        row |= {} if expected is not None else {"note": f"not checked: {reason}"}
        # A clip that is encoded within a limit waits in host memory.
        place = torch.device("cpu") if provider.limited and part == "encode" else device
        try:
            runner = provider.load(shape, part, dtype, device, limit)
            tolerance = math.inf if provider.approximate else TOLERANCE[dtype]
            row |= _checked(runner, clip_for(shape, part, CHECKED, place), expected, tolerance)
            release(device)
            if row["status"] == "ok":
                clips = [clip_for(shape, part, blocks, place) for blocks in (CHECKED, shape.blocks)]
                row |= _timed(runner, *clips, device, row["limit_bytes"], repeats)
                row["frames_per_second"] = shape.num_frames / row["seconds"]
        # An InputError says that no plan keeps to the limit.
        except (InputError, *FAILURES) as error:
            row |= failure(error)
        clips = runner = None
        release(device)
        report(row)


def reference(shape: Shape, part: str, device: torch.device) -> tuple[Tensor | None, str]:
    """Returns the first latent frames in float32 on the CPU, by us untiled and by torch, or why there are none."""
    try:
        with without_tf32():
            runner = own_runner(shape, part, torch.float32, device, WHOLE)
            return runner.exact(clip_for(shape, part, CHECKED, device)).float().cpu(), ""
    except FAILURES as error:
        return None, failure(error)["reason"]
    finally:
        runner = None
        release(device)


def _checked(runner: Runner, clip: Tensor, expected: Tensor | None, tolerance: float) -> dict[str, Any]:
    """Returns the error of the first latent frames, and a plan's prediction."""
    # These are numbers, which take more than the finished frames that a plan is for.
    found = runner.exact(clip).float().cpu()
    row: dict[str, Any] = {"status": "ok", "error": None}
    if runner.planned is not None:
        row |= {"peak_bytes_predicted": runner.planned.peak.total, "plan": asdict(runner.planned.plan)}
    if expected is None:
        return row
    error = relative_error([found], [expected])
    row["error"] = error if math.isfinite(error) else None
    if not error < tolerance:
        row |= {"status": "wrong", "reason": f"error {error:.1e} against float32; not timed"}
    return row


def _timed(
    runner: Runner, short: Tensor, clip: Tensor, device: torch.device, limit: int | None, repeats: int
) -> dict[str, Any]:
    """Returns the seconds of whole clips, pieces being dropped as they come, and the peak of the first one in bytes.

    The peak is counted beyond the clips that are given and, on CUDA, beyond what was there before the model.
    """
    weights = sum(w.nbytes for w in runner.weights if w.is_cuda)

    def seconds(clip: Tensor) -> float:
        release(device)
        room = None if limit is None or device.type != "cuda" else limit + torch.cuda.memory_reserved() - weights
        with limited(device, room):
            # A piece is dropped as it comes.
            return wall_seconds(lambda: deque(runner.run(clip), maxlen=0), device)

    if device.type == "cuda":
        seconds(short)  # compiles what the check did not need
        given = torch.cuda.memory_allocated() - weights
        torch.cuda.reset_peak_memory_stats()
        runs = [seconds(clip)]
        peak = torch.cuda.max_memory_allocated() - given
    else:
        with TensorMemory([*runner.weights, clip]) as memory:
            seconds(clip)  # counting costs time: this run has none
        runs, peak = [seconds(clip)], memory.peak - clip.nbytes
    if runs[0] <= LONG:
        runs = [seconds(clip) for _ in range(repeats)]
    ends = {"seconds_low": min(runs), "seconds_high": max(runs)} if len(runs) > 1 else {}
    return {"seconds": statistics.median(runs), "runs": len(runs), "peak_bytes": peak, **ends}


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns verdicts on the figures to be reached: every decode of ours at 2K against diffusers'."""
    verdicts: list[dict[str, Any]] = []
    decodes = [row for row in rows if row["part"] == "decode" and row["size"] == "2K" and row["status"] == "ok"]
    for version, frames in dict.fromkeys((row["version"], row["frames"]) for row in decodes):
        mine = {row["provider"]: row for row in decodes if (row["version"], row["frames"]) == (version, frames)}
        tiles, ours = mine.get("swifti2v, tiles"), [row["seconds"] for row in mine.values() if row["ours"]]
        theirs = [row["seconds"] for row in mine.values() if not row["ours"]]
        found = []
        if theirs and ours:
            speed = min(theirs) / min(ours)
            found.append(("diffusers' fastest over ours, time", speed, "x", SPEED_TARGET, speed >= SPEED_TARGET))
        if tiles and "diffusers, tiles" in mine:
            share = tiles["peak_bytes"] / mine["diffusers, tiles"]["peak_bytes"]
            found.append(
                ("ours in tiles over diffusers' in tiles, peak", share, "x", PEAK_TARGET, share <= PEAK_TARGET)
            )
        if tiles and tiles["limit_bytes"]:
            share = tiles["peak_bytes"] / tiles["limit_bytes"]
            found.append(("ours in tiles over the limit, peak", share, "x", 1.0, share <= 1))
        names = ("what", "value", "unit", "wanted", "met")
        at = {"shape": f"{version}, 2K, {frames} frames"}
        verdicts += [at | dict(zip(names, verdict, strict=True)) for verdict in found]
    return verdicts
