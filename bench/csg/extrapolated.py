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
from bench.csg.vae_time import VAEClock, plan_vaes
from bench.csg.window import WindowClock, WindowTime, plan_seconds
from bench.harness.timing import Timer, time_one, wall_seconds
from bench.records.outcome import FAILURES, failure
from bench.records.write import Section, Table
from model.config import DiTConfig
from model.csg.sampler import SegmentPlan, Window, sample_latents
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT
from model.errors import InputError
from model.machine.host import release
from model.pipeline.encoders import empty_text
from model.sizes import size_multiple, stage_one_size
from model.weights.load import random_weights
from swifti2v_kernels.common.shapes import WINDOWS

TWO_STAGE = "two stages, CSG"
END_TO_END = f"end-to-end, {BASELINE_STEPS} steps, guidance"
END_TO_END_FEW = "end-to-end, {} steps"
FLASH_2 = f"{END_TO_END}, FlashAttention-2"
#: The paper's figures for 2560x1408, 81 frames, on an H800.
PAPER_SECONDS, PAPER_BASELINE_SECONDS = 111.0, 22_400.0
#: Queries of the FlashAttention-2 call that is timed: those of a block at 2560x1408.
FLASH_QUERIES = WINDOWS["CSG window 2560x1408, 1.3B"].block_len
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
    #: Is told what is measured now.
    progress: Callable[[str], object] = field(default=lambda text: None)
    _known: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        identity = ("model", "size", "method")
        self.stages = self.section.table(
            "stages", "time by stage, one clip", identity=(*identity, "stage"),
            metrics=("seconds", "share", "peak_bytes"),
            note="Device time. Peak memory: all that is allocated in the stage.",
        )  # fmt: skip
        self.clips = self.section.table(
            "clips", "end-to-end against two stages with CSG, one clip", identity=identity,
            metrics=("total_seconds", "speedup", "attention_seconds", "linear_seconds", "other_seconds", "peak_bytes",
                     "tokens"),
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

    def run(self, setups: Sequence[Setup], check: Setup, ablated: Setup | None, advance: Callable[[], object]) -> None:
        """Measures every model at every size, ``check`` whole against its extrapolation, the ablations of ``ablated``.

        A run that is cut short has ratios and verdicts of what there is.

        The largest size comes first; of it CSG by the smallest model and end-to-end by the largest, since these are
        what the paper compares, and then the check.
        """
        tasks: list[Callable[[], None]] = []
        for size in dict.fromkeys(setup.size for setup in sorted(setups, key=lambda setup: -setup.width)):
            found = sorted((s for s in setups if s.size == size), key=lambda setup: setup.dit.dim)
            tasks += [functools.partial(self._clip, TWO_STAGE, found[0])]
            tasks += [functools.partial(self._clip, END_TO_END, setup) for setup in (found[-1], *found[:-1])]
            tasks += [functools.partial(self._clip, TWO_STAGE, setup) for setup in found[1:]]
        tasks.insert(2, functools.partial(self.validate, check))
        if ablated is not None:
            tasks.append(functools.partial(self.ablation, ablated))
        try:
            for task in tasks:
                task()
                advance()
        finally:
            self._finish()

    def _clip(self, method: str, setup: Setup) -> None:
        measure = self._two_stage if method == TWO_STAGE else self._end_to_end
        key = {"model": setup.model, "size": setup.size, "method": method}
        self._attempt(self.clips, key, lambda: measure(setup))

    def _two_stage(self, setup: Setup) -> None:
        key = {"model": setup.model, "size": setup.size, "method": TWO_STAGE}
        self.progress(f"{setup.name}: Stage I")
        stride = setup.vae.spatial_stride
        width, height = stage_one_size(setup.width, setup.height, size_multiple(setup.vae, setup.stage_one))
        low = self._whole_window(setup, setup.stage_one, (height // stride, width // stride), self.layers, False)
        self.progress(f"{setup.name}: Stage II")
        total, times, note = self._segments(setup, SegmentPlan(setup.num_blocks))
        largest = max((found for _, found in times), key=lambda found: found.tokens)
        self.progress(f"{setup.name}: VAE")
        reference, decode, vae_note = self._around(setup)
        found = {
            "Stage I": (setup.steps * low.step_seconds, low.peak_bytes, f"{low.note}, 1 of {setup.steps} steps"),
            "reference": (*reference, vae_note),
            "Stage II": (total, largest.peak_bytes, note),
            "decode": (*decode, vae_note),
        }
        whole = sum(seconds for seconds, _, _ in found.values())
        for stage, (seconds, peak, basis) in found.items():
            row = key | {"stage": stage, "seconds": seconds, "share": seconds / whole, "peak_bytes": peak}
            self.stages.add(row | {"basis": "extrapolated", "basis_note": basis})
        row = key | {"total_seconds": whole, "tokens": largest.tokens, "basis": "extrapolated", "basis_note": note}
        row["peak_bytes"] = max((peak for _, peak, _ in found.values() if peak), default=None)
        # Stage II by attention, linear and other, of all windows.
        weights = [count * window.step_seconds for count, window in times]
        for part in largest.shares:
            of = sum(w * window.shares[part] for w, (_, window) in zip(weights, times, strict=True))
            row[f"{part}_seconds"] = total * of / sum(weights)
        self.clips.add(row)

    def _around(self, setup: Setup) -> tuple[tuple[float, int | None], tuple[float, int | None], str]:
        """Returns reference, decode and a note; models whose VAE works in the same way share them."""
        plans = plan_vaes(setup, self.device, self.dtype)
        key = (setup.size, setup.num_frames, plans)
        if key not in self._known:
            clock = VAEClock(setup, plans, self.device)
            self._known[key] = clock.extrapolated(clock.reference), clock.extrapolated(clock.decode), clock.note
            del clock
            release(self.device)
        return self._known[key]

    def _end_to_end(self, setup: Setup) -> None:
        self.progress(f"{setup.name}: end-to-end")
        # The step of a large window takes long, and its layers are alike: two of them.
        found = self._whole_window(setup, setup.dit, setup.latent_size, (1, 2), True)
        key = {"model": setup.model, "size": setup.size}
        forwards = {END_TO_END: 2 * BASELINE_STEPS, END_TO_END_FEW.format(setup.steps): setup.steps}
        for method, count in forwards.items():
            total = count * found.step_seconds
            row = key | {"method": method, "total_seconds": total, "peak_bytes": found.peak_bytes}
            row |= {"tokens": found.tokens, "basis": "extrapolated"}
            row |= {f"{part}_seconds": share * total for part, share in found.shares.items()}
            self.clips.add(row | {"basis_note": f"{found.note}, 1 of {count} forwards"})
        if self.device.type == "cuda" and found.shares:
            flash = functools.partial(self._flash_two, setup, found)
            self._attempt(self.clips, key | {"method": FLASH_2}, flash, begun=True)

    def _flash_two(self, setup: Setup, found: WindowTime) -> None:
        """Adds the baseline with torch's FlashAttention-2, timed on a part of the queries with all of the keys."""
        queries = min(FLASH_QUERIES, found.tokens)
        q, k, v = (
            torch.randn(1, setup.dit.num_heads, n, setup.dit.head_dim, device=self.device, dtype=self.dtype)
            for n in (queries, found.tokens, found.tokens)
        )

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

    def ablation(self, setup: Setup, chosen: Sequence[Variant] | None = None) -> None:
        """Measures Stage II with the clip cut in other ways."""

        def measure(variant: Variant, key: dict[str, str]) -> None:
            total, times, note = self._segments(setup, variant.plan, variant.mode, split=False)
            largest = max((found for _, found in times), key=lambda found: found.tokens)
            row = key | {"stage_two_seconds": total, "tokens": largest.tokens, "peak_bytes": largest.peak_bytes}
            self.ablations.add(row | {"basis": "extrapolated", "basis_note": note})

        for variant in chosen or variants(setup.num_blocks):
            key = {"model": setup.model, "size": setup.size, "variant": variant.name}
            self.progress(f"{setup.name}: {variant.name}")
            self._attempt(self.ablations, key, functools.partial(measure, variant, key))
        first = self.ablations.rows[0]
        for row in self.ablations.rows:
            if first["status"] == row["status"] == "ok":
                row["ratio"] = row["stage_two_seconds"] / first["stage_two_seconds"]
        self.ablations.save()

    def validate(self, setup: Setup) -> None:
        """Measures a clip whole, and what few layers, steps and latent frames say of it."""

        def compared(key: dict[str, str], measure: Callable[[Setup], tuple[float, float, str]]) -> None:
            extrapolated, whole, note = measure(setup)
            row = key | {"seconds": extrapolated, "whole_seconds": whole, "basis": "extrapolated", "basis_note": note}
            self.validation.add(row | {"difference": abs(extrapolated / whole - 1)})

        for what, measure in (("Stage II, CSG", self._whole_stage_two), ("decode", self._whole_decode)):
            self.progress(f"{setup.name}: {what}, whole")
            key = {"model": setup.model, "size": setup.size, "what": what}
            self._attempt(self.validation, key, functools.partial(compared, key, measure))

    def _whole_stage_two(self, setup: Setup) -> tuple[float, float, str]:
        plan = SegmentPlan(setup.num_blocks)
        extrapolated, times, _ = self._segments(setup, plan, split=False)
        dit = random_weights(WanDiT, setup.dit, 0, dtype=self.dtype, device=self.device)
        size = (setup.dit.out_channels, setup.num_blocks, *setup.latent_size)
        text, reference = empty_text(setup.dit.text_dim).to(self.device), torch.randn(1, *size, device=self.device)
        sigmas = flow_sigmas(setup.steps, 5.0)

        def whole() -> None:
            for segment in sample_latents(dit, reference.clone(), text, plan=plan, sigmas=sigmas, seed=0):
                del segment

        whole()  # compiles
        return extrapolated, wall_seconds(whole, self.device), f"{times[0][1].note}, 1 of {setup.steps} steps"

    def _whole_decode(self, setup: Setup) -> tuple[float, float, str]:
        clock = VAEClock(setup, plan_vaes(setup, self.device, self.dtype), self.device)
        extrapolated, _ = clock.extrapolated(clock.decode)
        return extrapolated, clock.seconds(clock.decode, setup.num_blocks), clock.note

    def _whole_window(
        self, setup: Setup, config: DiTConfig, latent_size: tuple[int, int], layers: tuple[int, int], split: bool
    ) -> WindowTime:
        """Measures one step of a DiT on all blocks."""
        clock = WindowClock(config, latent_size, setup.num_blocks, self.device, self.dtype, layers)
        blocks = tuple(range(setup.num_blocks))
        found = clock.measure(Window(blocks[:1], blocks[1:]), split=split)
        del clock
        release(self.device)
        return found

    def _segments(
        self, setup: Setup, plan: SegmentPlan, mode: str = "bidirectional", split: bool = True
    ) -> tuple[float, list[tuple[int, WindowTime]], str]:
        """Returns the seconds of Stage II, the kinds of its windows, and a note."""
        clock = WindowClock(setup.dit, setup.latent_size, setup.num_blocks, self.device, self.dtype, self.layers)
        total, times = plan_seconds(clock, plan, setup.steps, mode, split)
        del clock
        release(self.device)
        return total, times, f"{times[0][1].note}, 1 of {setup.steps} steps, {len(times)} of {len(plan)} windows"

    def _attempt(self, table: Table, key: dict[str, Any], measure: Callable[[], None], begun: bool = False) -> None:
        """Calls ``measure``, unless the time is over and it is not a part of what was begun.

        Adds a row that says why nothing was measured.
        """
        if not begun and self.deadline is not None and time.monotonic() > self.deadline:
            table.add(key | {"status": "not reached", "reason": "the time given was over"})
            return
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
            if (row["model"], row["size"]) in base:
                row["speedup"] = base[row["model"], row["size"]] / row["total_seconds"]
        paper = {"model": "SwiftI2V (paper, H800)", "size": "2K", "basis": "reported", "basis_note": "arXiv 2605.06356"}
        self.clips.add(paper | {"method": TWO_STAGE, "total_seconds": PAPER_SECONDS,
                                "speedup": PAPER_BASELINE_SECONDS / PAPER_SECONDS})  # fmt: skip
        self.clips.add(paper | {"method": "CineScale, end-to-end", "total_seconds": PAPER_BASELINE_SECONDS})
        self.section.verdicts(verdicts(rows, self.validation.rows))


def verdicts(clips: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the ratios of the largest model end-to-end over smaller ones in two stages, and how scaling holds."""
    found: list[dict[str, Any]] = []
    at = {(r["model"], r["size"], r["method"]): r["total_seconds"] for r in clips}
    for size in dict.fromkeys(row["size"] for row in clips):
        for method in (END_TO_END, FLASH_2):
            for model in ("1.3b", "5b"):
                base, ours = at.get(("14b", size, method)), at.get((model, size, TWO_STAGE))
                if base and ours:
                    ratio, wanted = base / ours, 404.0 if size == "2K" else None
                    found.append({"what": f"14b {method} over {model} {TWO_STAGE}", "shape": size, "unit": "x",
                                  "value": ratio, "wanted": wanted, "met": None if wanted is None else ratio >= wanted,
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
