"""End-to-end against CSG at sizes that take hours: measured on few layers, steps and latent frames, and scaled.

Every number says from what it was extrapolated. In the same run the extrapolation is held against a clip that is
measured whole. The baseline is the same DiT, on the same kernels, in one window of all blocks; since the paper's was
made of FlashAttention-2 code, a further row replaces its attention by that, timed at its own length.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.csg.setups import BASELINE_STEPS, Setup, Variant, variants
from bench.csg.vae_time import FRAMES, VAEClock, file_seconds, plan_vaes, segments
from bench.csg.window import WindowClock, WindowTime, plan_seconds
from bench.harness.timing import Timer, time_one
from bench.records.outcome import FAILURES, failure
from bench.records.write import Section, Table
from model.csg.sampler import SegmentPlan, Window, sample_latents
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT
from model.errors import InputError
from model.machine.host import release
from model.pipeline.encoders import empty_text
from model.sizes import size_multiple, stage_one_size
from model.weights.load import random_weights

STAGES = ("Stage I", "reference", "Stage II", "decode", "file")
TWO_STAGE = "two stages, CSG"
END_TO_END = f"end-to-end, {BASELINE_STEPS} steps, guidance"
END_TO_END_FEW = "end-to-end, {} steps"
FLASH_2 = f"{END_TO_END}, FlashAttention-2"
#: The paper's figures for 2560x1408, 81 frames, on an H800.
PAPER_SECONDS, PAPER_BASELINE_SECONDS = 111.0, 22_400.0
#: Queries of the FlashAttention-2 call that is timed.
FLASH_QUERIES = 14_080
VALIDATION_TARGET = 0.05


@dataclass
class Measurement:
    """The tables of one run; ``deadline`` is a monotonic time after which nothing more is begun."""

    section: Section
    device: torch.device
    dtype: torch.dtype
    timer: Timer
    deadline: float | None = None
    layers: tuple[int, int] = (1, 3)
    _known: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stage_metrics = ("seconds", "share", "peak_bytes")
        clip_metrics = (
            "total_seconds", "speedup", "attention_seconds", "linear_seconds", "other_seconds", "peak_bytes", "tokens",
        )  # fmt: skip
        identity = ("model", "size", "method")
        self.stages = self.section.table(
            "stages", "time by stage, one clip", identity=(*identity, "stage"), metrics=stage_metrics,
            note="Device time, but the file's, which is the CPU's. Peak memory: all that is allocated in the stage.",
        )  # fmt: skip
        self.clips = self.section.table(
            "clips", "end-to-end against two stages with CSG, one clip", identity=identity, metrics=clip_metrics,
            note=(
                "Device time without the file. Attention, linear and other are those of the DiT at the target size."
                f" Times faster: than {END_TO_END}, of the same model and size. Tokens: of the largest window."
            ),
        )  # fmt: skip
        self.ablations = self.section.table(
            "ablations", "Stage II by ways to cut the clip", identity=("model", "size", "variant"),
            metrics=("stage_two_seconds", "ratio", "tokens", "peak_bytes"),
            note="The paper's ablations, in time and memory. Ratio: over the paper's setting.",
        )  # fmt: skip
        self.validation = self.section.table(
            "validation", "extrapolated against measured whole", identity=("model", "size", "what"),
            metrics=("seconds", "whole_seconds", "difference"),
        )  # fmt: skip

    @property
    def late(self) -> bool:
        """True when the time is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def run(
        self, setups: Sequence[Setup], check: Setup, ablated: Setup | None, progress: Callable[[str], None],
        advance: Callable[[], object],
    ) -> None:  # fmt: skip
        """Measures every model at every size, ``check`` whole against its extrapolation, the ablations of ``ablated``.

        A run that is cut short has ratios and verdicts of what there is.

        The largest size comes first; of it CSG by the smallest model and end-to-end by the largest, since these are
        what the paper compares, and then the check.
        """
        tasks = []
        for size in dict.fromkeys(setup.size for setup in sorted(setups, key=lambda setup: -setup.width)):
            found = sorted((s for s in setups if s.size == size), key=lambda setup: setup.dit.dim)
            tasks += [(self._two_stage, found[0], TWO_STAGE), (self._end_to_end, found[-1], END_TO_END)]
            tasks += [(self._end_to_end, setup, END_TO_END) for setup in found[:-1]]
            tasks += [(self._two_stage, setup, TWO_STAGE) for setup in found[1:]]
        try:
            for i, (measure, setup, method) in enumerate(tasks):
                if i == 2:
                    self.validate(check, progress)
                    advance()
                key = {"model": setup.model, "size": setup.size, "method": method}
                self._attempt(self.clips, key, functools.partial(measure, setup, progress))
                advance()
            if len(tasks) <= 2:
                self.validate(check, progress)
                advance()
            if ablated is not None:
                self.ablation(ablated, progress)
                advance()
        finally:
            self._finish()

    def _two_stage(self, setup: Setup, progress: Callable[[str], None]) -> None:
        key = {"model": setup.model, "size": setup.size, "method": TWO_STAGE}
        rows: list[dict[str, Any]] = []

        def stage(name: str, seconds: float, peak: int | None, note: str) -> None:
            row = key | {"stage": name, "seconds": seconds, "peak_bytes": peak}
            rows.append(row | {"basis": "extrapolated", "basis_note": note} if note else row)

        progress(f"{setup.name}: Stage I")
        low = self._stage_one(setup)
        stage("Stage I", setup.steps * low.step_seconds, low.peak_bytes, f"{low.note}, 1 of {setup.steps} steps")
        progress(f"{setup.name}: Stage II")
        plan = SegmentPlan(setup.num_blocks)
        clock = self._clock(setup)
        total, times = plan_seconds(clock, plan, setup.steps)
        del clock
        release(self.device)
        note = f"{times[0][1].note}, 1 of {setup.steps} steps, {len(times)} of {len(plan)} windows"
        largest = max((found for _, found in times), key=lambda found: found.tokens)
        stage("Stage II", total, largest.peak_bytes, note)
        progress(f"{setup.name}: VAE")
        around, written, note_vae = self._around(setup)
        for name, (seconds, peak) in around.items():
            stage(name, seconds, peak, note_vae)
        device_seconds = sum(row["seconds"] for row in rows)
        if written is not None:
            stage("file", written, None, f"from {FRAMES[1]} of {setup.num_frames} frames")
        for row in sorted(rows, key=lambda row: STAGES.index(row["stage"])):
            self.stages.add(row | ({"share": row["seconds"] / device_seconds} if row["stage"] != "file" else {}))
        peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"]]
        self.clips.add(
            key
            | {"total_seconds": device_seconds, "peak_bytes": max(peaks, default=None), "tokens": largest.tokens}
            | _shared(total, times)
            | {"basis": "extrapolated", "basis_note": note}
        )

    def _around(self, setup: Setup) -> tuple[dict[str, tuple[float, int | None]], float | None, str]:
        """Returns reference and decode, the file, and a note; models whose VAE works in the same way share them."""
        plans = plan_vaes(setup, self.device, self.dtype)
        key = (setup.size, setup.num_frames, plans)
        if key not in self._known:
            clock = VAEClock(setup, plans, self.device)
            found = {"reference": clock.reference(), "decode": clock.decode()}
            note = clock.note
            del clock
            release(self.device)
            self._known[key] = found, file_seconds(setup), note
        return self._known[key]

    def _end_to_end(self, setup: Setup, progress: Callable[[str], None]) -> None:
        progress(f"{setup.name}: end-to-end")
        found = self._whole_window(setup)
        key = {"model": setup.model, "size": setup.size}
        forwards = {END_TO_END: 2 * BASELINE_STEPS, END_TO_END_FEW.format(setup.steps): setup.steps}
        for method, count in forwards.items():
            total = count * found.step_seconds
            note = f"{found.note}, 1 of {count} forwards"
            row = key | {"method": method, "total_seconds": total, "peak_bytes": found.peak_bytes}
            row |= {"tokens": found.tokens, "basis": "extrapolated", "basis_note": note}
            self.clips.add(row | {f"{part}_seconds": share * total for part, share in found.shares.items()})
        if self.device.type == "cuda" and found.shares:
            self._guard(self.clips, key | {"method": FLASH_2}, functools.partial(self._flash_two, setup, found))

    def _flash_two(self, setup: Setup, found: WindowTime) -> None:
        """Adds the baseline with torch's FlashAttention-2, timed on a part of the queries with all of the keys."""
        heads, head_dim = setup.dit.num_heads, setup.dit.head_dim
        queries = min(FLASH_QUERIES, found.tokens)
        q = torch.randn(1, heads, queries, head_dim, device=self.device, dtype=self.dtype)
        k, v = (torch.randn(1, heads, found.tokens, head_dim, device=self.device, dtype=self.dtype) for _ in range(2))

        def call() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v)

        # Self-attention is nearly all of the attention: cross-attention has 512 keys.
        count = 2 * BASELINE_STEPS
        attention = setup.dit.num_layers * time_one(self.timer, call).median * found.tokens / queries
        rest = found.step_seconds * (1 - found.shares["attention"])
        row = {"model": setup.model, "size": setup.size, "method": FLASH_2, "total_seconds": count * (rest + attention)}
        row |= {"attention_seconds": count * attention, "tokens": found.tokens, "basis": "extrapolated"}
        note = f"the row above, its attention replaced by torch's FlashAttention-2 on {queries:,} of its queries"
        self.clips.add(row | {"basis_note": note})

    def ablation(self, setup: Setup, progress: Callable[[str], None], chosen: Sequence[Variant] | None = None) -> None:
        """Measures Stage II with the clip cut in other ways."""
        clock = None
        for variant in chosen or variants(setup.num_blocks):
            key = {"model": setup.model, "size": setup.size, "variant": variant.name}
            progress(f"{setup.name}: {variant.name}")

            def measure(variant: Variant = variant, key: dict[str, Any] = key) -> None:
                nonlocal clock
                clock = clock or self._clock(setup)
                total, times = plan_seconds(clock, variant.plan, setup.steps, variant.mode, split=False)
                largest = max((found for _, found in times), key=lambda found: found.tokens)
                note = f"{largest.note}, 1 of {setup.steps} steps, {len(times)} of {len(variant.plan)} windows"
                row = key | {"stage_two_seconds": total, "tokens": largest.tokens, "peak_bytes": largest.peak_bytes}
                self.ablations.add(row | {"basis": "extrapolated", "basis_note": note})

            self._attempt(self.ablations, key, measure)
        first = self.ablations.rows[0]
        for row in self.ablations.rows:
            if first["status"] == row["status"] == "ok":
                row["ratio"] = row["stage_two_seconds"] / first["stage_two_seconds"]
        self.ablations.save()
        del clock
        release(self.device)

    def validate(self, setup: Setup, progress: Callable[[str], None]) -> None:
        """Measures a clip whole, and what few layers, steps and latent frames say of it."""
        key = {"model": setup.model, "size": setup.size}
        for what, measure in (("Stage II, CSG", self._whole_stage_two), ("decode", self._whole_decode)):
            progress(f"{setup.name}: {what}, whole")

            def one(what: str = what, measure: Callable[[Setup], tuple[float, float, str]] = measure) -> None:
                extrapolated, whole, note = measure(setup)
                row = key | {"what": what, "seconds": extrapolated, "whole_seconds": whole, "basis": "extrapolated"}
                self.validation.add(row | {"basis_note": note, "difference": abs(extrapolated / whole - 1)})

            self._attempt(self.validation, key | {"what": what}, one)

    def _whole_stage_two(self, setup: Setup) -> tuple[float, float, str]:
        plan = SegmentPlan(setup.num_blocks)
        clock = self._clock(setup)
        extrapolated, times = plan_seconds(clock, plan, setup.steps, split=False)
        del clock
        release(self.device)
        dit = random_weights(WanDiT, setup.dit, 0, dtype=self.dtype, device=self.device)
        rows, columns = setup.latent_size
        text = empty_text(setup.dit.text_dim).to(self.device)
        reference = torch.randn(1, setup.dit.out_channels, setup.num_blocks, rows, columns, device=self.device)

        def run() -> float:
            start = time.perf_counter()
            for segment in sample_latents(
                dit, reference.clone(), text, plan=plan, sigmas=flow_sigmas(setup.steps, 5.0), seed=0
            ):
                del segment
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        run()  # compiles
        return extrapolated, run(), f"{times[0][1].note}, 1 of {setup.steps} steps"

    def _whole_decode(self, setup: Setup) -> tuple[float, float, str]:
        clock = VAEClock(setup, plan_vaes(setup, self.device, self.dtype), self.device)
        extrapolated, _ = clock.decode()
        rows, columns = setup.latent_size
        latents = torch.randn(1, setup.vae.z_dim, setup.num_blocks, rows, columns, device=self.device)
        start = time.perf_counter()
        with torch.no_grad():
            for frames in clock.vae.decode_frames(segments(latents), clock.plans.decode.plan):
                del frames
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return extrapolated, time.perf_counter() - start, clock.note

    def _stage_one(self, setup: Setup) -> WindowTime:
        """Measures one step of Stage I's DiT on all blocks at its size."""
        width, height = stage_one_size(setup.width, setup.height, size_multiple(setup.vae, setup.stage_one))
        stride = setup.vae.spatial_stride
        size = height // stride, width // stride
        clock = WindowClock(setup.stage_one, size, setup.num_blocks, self.device, self.dtype, layers=self.layers)
        blocks = tuple(range(setup.num_blocks))
        found = clock.measure(Window(blocks[:1], blocks[1:]), split=False)
        del clock
        release(self.device)
        return found

    def _whole_window(self, setup: Setup) -> WindowTime:
        blocks = tuple(range(setup.num_blocks))
        # The step of a large window takes long, and its layers are alike: two of them.
        clock = self._clock(setup, layers=(1, 2))
        found = clock.measure(Window(blocks[:1], blocks[1:]))
        del clock
        release(self.device)
        return found

    def _clock(self, setup: Setup, layers: tuple[int, int] | None = None) -> WindowClock:
        return WindowClock.of(setup, self.device, self.dtype, layers=layers or self.layers)

    def _attempt(self, table: Table, key: dict[str, Any], measure: Callable[[], None]) -> None:
        """Calls ``measure`` unless the time is over; adds a row that says why nothing was measured."""
        if self.late:
            table.add(key | {"status": "not reached", "reason": "the time given was over"})
            return
        self._guard(table, key, measure)

    def _guard(self, table: Table, key: dict[str, Any], measure: Callable[[], None]) -> None:
        """Calls ``measure``, however late it is; adds a row that says why it failed."""
        try:
            measure()
        except (InputError, *FAILURES) as error:
            if not any(all(row[name] == value for name, value in key.items()) for row in table.rows):
                table.add(key | failure(error))
        finally:
            release(self.device)

    def _finish(self) -> None:
        """Adds ratios, the paper's figures, and the verdicts."""
        rows = [row for row in self.clips.rows if row["status"] == "ok"]
        base = {(r["model"], r["size"]): r["total_seconds"] for r in rows if r["method"] == END_TO_END}
        for row in rows:
            reference = base.get((row["model"], row["size"]))
            if reference:
                row["speedup"] = reference / row["total_seconds"]
        paper = {"model": "SwiftI2V (paper, H800)", "size": "2K", "basis": "reported", "basis_note": "arXiv 2605.06356"}
        self.clips.add(paper | {"method": TWO_STAGE, "total_seconds": PAPER_SECONDS,
                                "speedup": PAPER_BASELINE_SECONDS / PAPER_SECONDS})  # fmt: skip
        self.clips.add(paper | {"method": "CineScale, end-to-end", "total_seconds": PAPER_BASELINE_SECONDS})
        self.section.verdicts(verdicts(rows, self.validation.rows))


def _shared(total: float, times: Sequence[tuple[int, WindowTime]]) -> dict[str, float]:
    """Returns Stage II's seconds by attention, linear and other, of all windows."""
    weights = [count * found.step_seconds for count, found in times]
    shared: dict[str, float] = {}
    for weight, (_, found) in zip(weights, times, strict=True):
        for part, share in found.shares.items():
            shared[f"{part}_seconds"] = shared.get(f"{part}_seconds", 0.0) + share * total * weight / sum(weights)
    return shared


def verdicts(clips: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the ratios of the largest model end-to-end over smaller ones in two stages, and how scaling holds."""
    found: list[dict[str, Any]] = []
    at = {(r["model"], r["size"], r["method"]): r["total_seconds"] for r in clips}
    sizes = list(dict.fromkeys(row["size"] for row in clips))
    for size in sizes:
        for method in (END_TO_END, FLASH_2):
            for model in ("1.3b", "5b"):
                base, ours = at.get(("14b", size, method)), at.get((model, size, TWO_STAGE))
                if base and ours:
                    what = f"14b {method} over {model} {TWO_STAGE}"
                    ratio, wanted = base / ours, 404.0 if size == "2K" else None
                    found.append({"what": what, "shape": size, "unit": "x", "value": ratio, "wanted": wanted,
                                  "met": None if wanted is None else ratio >= wanted,
                                  "basis": "extrapolated"})  # fmt: skip
    for row in validation:
        if row["status"] == "ok":
            what, value = f"extrapolation of {row['what']}, deviation", row["difference"]
            found.append({"what": what, "shape": f"{row['model']}, {row['size']}", "unit": "", "value": value,
                          "wanted": VALIDATION_TARGET, "met": value <= VALIDATION_TARGET})  # fmt: skip
    return found


def short(setup: Setup) -> Setup:
    """Returns the setup with fewer frames, for a first look."""
    return replace(setup, num_frames=min(setup.num_frames, 33))
