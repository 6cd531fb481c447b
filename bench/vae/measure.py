"""Measures the VAE's implementations: each is checked against float32, then timed; everything that fails is a row."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.timing import limited, summary, without_tf32
from bench.operators.check import relative_error
from bench.records.outcome import FAILURES, Unavailable, failure
from bench.vae.providers import PROVIDERS, Provider, Runner, diffusers_runner, own_runner
from bench.vae.shapes import Shape
from model.errors import InputError, require
from model.io.durable import replacing
from model.machine.counted import TensorMemory
from model.machine.measure import is_out_of_memory
from model.vae.model import WHOLE

#: Relative L2 error against float32 above which exact tiles, or the whole frame, are wrong. bfloat16 rounds once a
#: layer with 2**-9, over some thirty layers.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-3}
#: Latent frames of the clip that is checked: the first, and one that has a past.
CHECKED = 2
#: Runs longer than so many seconds are not repeated.
LONG = 10.0
#: What must be reached at 2K: the time of diffusers' fastest setting that fits over ours; our peak over that of its
#: tiles; and how far, relatively, the seam measure may be from the untiled decode's.
SPEED_TARGET, PEAK_TARGET, SEAM_TARGET = 2.0, 1 / 3, 1e-3


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


def seam(frames: Tensor, borders: tuple[Sequence[int], Sequence[int]]) -> float:
    """Returns the mean step across the borders of tiles, over that between all other neighbouring rows and columns.

    Args:
        frames: ``[B, C, F, H, W]``.
        borders: rows and columns at which a tile begins.
    """
    across, inside = [], []
    for axis, starts in zip((3, 4), borders, strict=True):
        steps = frames.float().diff(dim=axis).abs().mean(dim=tuple(i for i in range(5) if i != axis)).cpu()
        at = torch.zeros(len(steps), dtype=torch.bool)
        at[[start - 1 for start in starts if 0 < start <= len(steps)]] = True
        across.append(steps[at])
        inside.append(steps[~at])
    return (torch.cat(across).mean() / torch.cat(inside).mean()).item()


def measure(
    shape: Shape,
    part: str,
    device: torch.device,
    *,
    providers: Sequence[Provider] = PROVIDERS,
    limit: int | None = None,
    repeats: int = 3,
    folder: Path | None = None,
    report: Callable[[dict[str, Any]], Any],
) -> None:
    """Reports one row for every implementation of one part on one shape.

    A first run of each, alone on the device, gives its peak; then all that were right take turns. Rows are reported
    when all are there, also when the measurement is cut short.

    Args:
        limit: bytes that implementations in tiles of ours may take, held to by the allocator on CUDA; None for no
            limit.
        repeats: timed runs of each.
        folder: for a picture of what tiles change; None for none.
    """
    base: dict[str, Any] = {"version": shape.version, "part": part, "size": shape.name, "width": shape.width}
    base |= {"height": shape.height, "frames": shape.num_frames}
    # The defaults: bfloat16 is practically lossless to decode, and not to encode.
    dtype = torch.bfloat16 if part == "decode" and device.type == "cuda" else torch.float32
    expected, source = reference(shape, part, device)
    pictures: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, _Run] = {}
    try:
        for provider in providers:
            row = {**base, "provider": provider.name, "ours": provider.ours}
            row |= {"dtype": str(dtype).removeprefix("torch."), "limit_bytes": limit if provider.limited else None}
            if expected is None:
                row["note"] = f"checked against {source}"
            rows[provider.name] = row
            try:
                runner = provider.load(shape, part, dtype, device, limit)
                # The check returns numbers, which take more than the finished frames that a plan is for.
                row |= _checked(runner, provider, shape, part, dtype, expected, device, pictures)
                release(device)
                if row["status"] == "ok":
                    run = _Run(runner, provider, shape, part, device, row["limit_bytes"])
                    row["peak_bytes"] = run.first()
                    row |= {"seconds": run.cold, "runs": 1}
                    runs[provider.name] = run
            # An InputError says that no plan keeps to the limit.
            except (InputError, *FAILURES) as error:
                row |= failure(error)
            runner = run = None
            release(device)
        _take_turns(rows, runs, repeats, device)
    finally:
        # A run that is cut short has its rows too.
        for row in rows.values():
            if row.get("status") == "ok" and "seconds" in row:
                row["frames_per_second"] = shape.num_frames / row["seconds"]
            report({"status": "not reached", "reason": "interrupted", **row})
    if folder is not None and expected is not None and pictures:
        name = f"{shape.version}-{shape.width}x{shape.height}"
        save_differences(expected[0, :, -1], pictures, folder / f"difference-{name}.png")


def save_differences(untiled: Tensor, tiled: Mapping[str, Tensor], path: Path) -> None:
    """Saves a frame ``[3, H, W]`` in -1..1 and, to its right, where each of its tiled versions differs from it.

    Brightness is the difference's logarithm: black is 1e-8 and less, white is 1 and more.
    """
    levels = [(frame - untiled).abs().mean(dim=0).clamp(1e-8, 1).log10() / 8 + 1 for frame in tiled.values()]
    pixels = torch.cat([(untiled.clamp(-1, 1) + 1) / 2, *(level.expand(3, -1, -1) for level in levels)], dim=2)
    image = require("PIL.Image", "bench").fromarray((255 * pixels).byte().permute(1, 2, 0).numpy())
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def _take_turns(rows: dict[str, dict[str, Any]], runs: dict[str, _Run], repeats: int, device: torch.device) -> None:
    """Measures the times of all, round by round; what takes long has been timed in its first run."""
    for _ in range(repeats):
        for name, run in runs.items():
            if rows[name]["status"] != "ok" or run.cold > LONG:
                continue
            try:
                run.again()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                rows[name]["warning"] = "its first run alone: with the weights of the others it does not fit"
            release(device)
            timing = summary(run.seconds or [run.cold])
            ends = {"seconds_low": min(run.seconds), "seconds_high": max(run.seconds)} if timing.runs > 1 else {}
            rows[name] |= {"seconds": timing.median, "runs": timing.runs, **ends}


def reference(shape: Shape, part: str, device: torch.device) -> tuple[Tensor | None, str]:
    """Returns the first latent frames in float32 on the CPU, by diffusers untiled or else by us, and the source."""
    clip, reasons = clip_for(shape, part, CHECKED, device), []
    for name, load in (
        ("diffusers, float32", lambda: diffusers_runner(shape, part, torch.float32, device, False)),
        ("swifti2v by torch, float32", lambda: own_runner(shape, part, torch.float32, device, WHOLE)),
    ):
        try:
            with without_tf32():
                return load().exact(clip).float().cpu(), name
        except Unavailable as reason:
            reasons.append(f"{name}: {reason}")
        except FAILURES as error:
            reasons.append(f"{name}: {failure(error)['reason']}")
        finally:
            release(device)
    return None, f"nothing ({'; '.join(reasons)})"


def _checked(
    runner: Runner,
    provider: Provider,
    shape: Shape,
    part: str,
    dtype: torch.dtype,
    expected: Tensor | None,
    device: torch.device,
    pictures: dict[str, Tensor],
) -> dict[str, Any]:
    """Returns the error and the seam of the first latent frames, and a plan's prediction."""
    found = runner.exact(clip_for(shape, part, CHECKED, provider.clip_device(part, device))).float().cpu()
    row: dict[str, Any] = {"status": "ok", "error": None, "seam": None, "seam_untiled": None}
    if runner.planned is not None:
        row["peak_bytes_predicted"] = runner.planned.peak.total
        row["plan"] = asdict(runner.planned.plan)
    if expected is None:
        return row
    error = relative_error([found], [expected])
    row["error"] = error if math.isfinite(error) else None
    tiled = any(runner.borders)
    if part == "decode" and tiled:
        row["seam"], row["seam_untiled"] = seam(found, runner.borders), seam(expected, runner.borders)
        pictures[provider.name] = found[0, :, -1]
    approximate = tiled and not provider.ours
    if not approximate and not error < TOLERANCE[dtype]:
        return {**row, "status": "wrong", "reason": f"error {error:.1e} against float32; not timed"}
    return row


class _Run:
    """Whole clips through one implementation, pieces being dropped as they come."""

    def __init__(
        self, runner: Runner, provider: Provider, shape: Shape, part: str, device: torch.device, limit: int | None
    ):
        self.runner, self.device, self.limit = runner, device, limit
        self.seconds: list[float] = []
        self.cold = 0.0
        self._shape, self._part, self._place = shape, part, provider.clip_device(part, device)

    def _clip(self, blocks: int | None = None) -> Tensor:
        return clip_for(self._shape, self._part, blocks or self._shape.blocks, self._place)

    def first(self) -> int:
        """Runs once, timed as ``cold``; returns the peak in bytes.

        The peak is counted beyond the clip that is given and, on CUDA, beyond what was there before the model.
        """
        clip = self._clip()
        if self.device.type != "cuda":
            with TensorMemory([*self.runner.weights, clip]) as memory:
                self._pass(clip)  # counting costs time: this run has none
            self.cold = self._pass(clip)
            return memory.peak - clip.nbytes
        self._pass(self._clip(CHECKED))  # compiles what the check did not need
        weights = sum(w.nbytes for w in self.runner.weights if w.is_cuda)
        given = torch.cuda.memory_allocated() - weights
        torch.cuda.reset_peak_memory_stats()
        self.again(clip)
        self.cold = self.seconds.pop()
        return torch.cuda.max_memory_allocated() - given

    def again(self, clip: Tensor | None = None) -> None:
        """Runs once more and keeps the time; the limit is beside what others hold."""
        clip = self._clip() if clip is None else clip
        limit = self.limit
        if limit is not None and self.device.type == "cuda":
            weights = sum(w.nbytes for w in self.runner.weights if w.is_cuda)
            release(self.device)
            limit += torch.cuda.memory_reserved() - weights
        with limited(self.device, limit):
            self.seconds.append(self._pass(clip))

    def _pass(self, clip: Tensor) -> float:
        start = time.perf_counter()
        for piece in self.runner.run(clip):
            del piece
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def release(device: torch.device) -> None:
    """Frees the memory of models that are no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns verdicts on the figures to be reached: every decode of ours at 2K against diffusers'."""
    verdicts = []
    decodes = [row for row in rows if row["part"] == "decode" and row["size"] == "2K" and row["status"] == "ok"]
    for key in dict.fromkeys((row["version"], row["frames"]) for row in decodes):
        mine = {row["provider"]: row for row in decodes if (row["version"], row["frames"]) == key}
        ours, tiles = mine.get("swifti2v"), mine.get("swifti2v, tiles")
        theirs = [row for name, row in mine.items() if not row["ours"]]
        at = f"{key[0]}, 2K, {key[1]} frames"

        def verdict(what: str, value: float, unit: str, wanted: float, met: bool, at: str = at) -> None:
            verdicts.append({"what": what, "shape": at, "value": value, "unit": unit, "wanted": wanted, "met": met})

        if theirs and (ours or tiles):
            speed = min(r["seconds"] for r in theirs) / min(r["seconds"] for r in (ours, tiles) if r)
            verdict("diffusers' fastest over ours, time", speed, "x", SPEED_TARGET, speed >= SPEED_TARGET)
        if tiles and "diffusers, tiles" in mine:
            share = tiles["peak_bytes"] / mine["diffusers, tiles"]["peak_bytes"]
            verdict("ours in tiles over diffusers' in tiles, peak", share, "x", PEAK_TARGET, share <= PEAK_TARGET)
        if tiles and tiles["seam"] is not None:
            change = abs(tiles["seam"] / tiles["seam_untiled"] - 1)
            verdict("seams in tiles against untiled, change", change, "", SEAM_TARGET, change <= SEAM_TARGET)
        if tiles and tiles["limit_bytes"]:
            share = tiles["peak_bytes"] / tiles["limit_bytes"]
            verdict("ours in tiles over the limit, peak", share, "x", 1.0, share <= 1)
    return verdicts
