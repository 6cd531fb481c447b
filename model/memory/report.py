"""A memory plan: what was decided, what that takes, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from model.config import DiTConfig
from model.memory.request import HOST_USABLE, MemoryRequest
from model.memory.stage_time import StageTime
from model.memory.vae_places import USABLE, PipelinePlans
from model.memory.vae_plan import PlannedVAE
from model.streaming.placement import PlacedBytes, Placement

#: Of :meth:`MemoryPlan.to_json`.
SCHEMA_VERSION = 1
NOT_PREDICTED = "without loading, encoders of text and image, and the file"


@dataclass(frozen=True)
class Phase:
    """One phase, predicted.

    ``held`` has what is on the device at its worst moment by name, ``device`` their sum. ``host`` is the process's
    memory. ``seconds`` is None where none are predicted, ``limit`` a sentence about what they and the peak are made of.
    """

    name: str
    held: Mapping[str, int]
    host: int
    seconds: float | None
    limit: str

    @property
    def device(self) -> int:
        """Bytes at its worst moment."""
        return sum(self.held.values())


@dataclass(frozen=True)
class StagePlan:
    """A stage's DiT: where its blocks are, what that takes, and the seconds of all its passes."""

    config: DiTConfig
    placement: Placement
    placed: PlacedBytes
    time: StageTime


@dataclass(frozen=True)
class MemoryPlan:
    """A plan; ``print`` it for a table. All its numbers are predicted."""

    request: MemoryRequest
    stage_one: StagePlan
    stage_two: StagePlan
    vae_plans: PipelinePlans
    text_on_device: bool
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes on the device in the phase that takes most."""
        return max(phase.device for phase in self.phases)

    @property
    def host_peak(self) -> int:
        """Bytes of the process in host memory in the phase that takes most."""
        return max(phase.host for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Of all phases, on the card of the request; without loading, encoders of text and image, and the file."""
        return sum(phase.seconds or 0.0 for phase in self.phases)

    @property
    def vae_waits(self) -> bool:
        """Whether the VAEs leave the device for Stage I: where they would make its peak that of the run."""
        vaes = sum(size for name, size in self.phase("condition").held.items() if name.endswith("weights"))
        return self.phase("Stage I").device + vaes > self.peak

    @property
    def limiting(self) -> Phase:
        """The phase that takes most of the device."""
        return max(self.phases, key=lambda phase: phase.device)

    def phase(self, name: str) -> Phase:
        """The phase called ``name``."""
        return next(phase for phase in self.phases if phase.name == name)

    def __str__(self) -> str:
        return _text(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data: bytes, seconds, and everything that was decided."""
        return _data(self)


def gigabytes(count: float) -> str:
    """``21.1 GB``, ``0.35 GB``, ``4.1 MB``: of 10^9 or 10^6 bytes, as cards are sold."""
    if 0 < count < 1e8:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else f"{count / 1e9:.2f} GB"


def enough_gigabytes(count: float) -> str:
    """:func:`gigabytes`, rounded up: a size that does when it is given."""
    unit = 1e5 if count < 1e8 else 1e8 if count >= 1e10 else 1e7
    return gigabytes(math.ceil(count / unit) * unit)


def describe_placement(config: DiTConfig, placement: Placement) -> str:
    """``all 30 blocks on the device``, ``18 of 40 blocks on the device, 22 from pinned host memory; ...``."""
    homes = placement.homes(config.num_layers)
    count = {home: homes.count(home) for home in ("device", "host", "file")}
    parts = [f"{count['device']} of {config.num_layers} blocks on the device"]
    parts += [f"{count['host']} from pinned host memory"] * bool(count["host"])
    parts += [f"{count['file']} from files"] * bool(count["file"])
    where = (
        f"all {config.num_layers} blocks on the device" if count["device"] == config.num_layers else ", ".join(parts)
    )
    form = {
        "plain": "as they are",
        "file": "in 8 bits where the checkpoint has them so",
        "float8": "in float8, which changes numbers",
        "int8": "in int8, which changes numbers",
    }[placement.storage]
    return f"{where}; {form}{', products in 8 bits' if placement.products == '8bit' else ''}"


def _text(plan: MemoryPlan) -> str:
    request = plan.request
    (width, height), (low_width, low_height) = request.size, request.motion_size
    card = host = ""
    if request.vram is not None:
        card = f" of {gigabytes(request.usable or 0)} ({USABLE:.0%} of {gigabytes(request.vram)})"
    if request.ram is not None:
        host = f" of {gigabytes(request.usable_host or 0)} ({HOST_USABLE:.0%} of {gigabytes(request.ram)})"
    lines = [
        f"memory plan: {width}x{height}, {request.num_frames} frames, Stage I at {low_width}x{low_height}",
        f"  predicted peak         {gigabytes(plan.peak)}{card}, in {plan.limiting.name}",
        f"  predicted host memory  {gigabytes(plan.host_peak)}{host}",
        f"  predicted time         {_time(plan)}",
        f"  Stage I   {describe_placement(plan.stage_one.config, plan.stage_one.placement)}",
        f"  Stage II  {describe_placement(plan.stage_two.config, plan.stage_two.placement)}",
        f"  {_without_limits(plan.vae_plans)}",
    ]
    if request.text_encoder_bytes:
        lines.append(f"  text encoder on the {'device' if plan.text_on_device else 'CPU'}")
    lines.append(f"  {'phase':<10}{'device':>9}{'host':>9}{'seconds':>9}  what limits it (all predicted)")
    for phase in plan.phases:
        seconds = "-" if phase.seconds is None or request.capability is None else f"{phase.seconds:.1f}"
        sizes = f"{gigabytes(phase.device):>9}{gigabytes(phase.host):>9}"
        lines.append(f"  {phase.name:<10}{sizes}{seconds:>9}  {phase.limit}")
    return "\n".join([*lines, *(f"  note: {note}" for note in plan.notes)])


def _without_limits(plans: PipelinePlans) -> PipelinePlans:
    """Which then say nothing of their peaks; the table has these."""
    return PipelinePlans(*(replace(planned, limit=None) for planned in vars(plans).values()))


def _time(plan: MemoryPlan) -> str:
    if plan.request.capability is None:
        return "none: seconds are predicted for GPUs"
    return f"{plan.seconds:.1f} s, predicted for {plan.request.gpu.name}; {NOT_PREDICTED}"


def _data(plan: MemoryPlan) -> dict[str, Any]:
    request = plan.request
    return {
        "schema": SCHEMA_VERSION,
        "basis": "predicted",
        "gpu": request.gpu.name,
        "width": request.size[0],
        "height": request.size[1],
        "frames": request.num_frames,
        "mode": request.mode,
        "vram_bytes": request.vram,
        "usable_bytes": request.usable,
        "ram_bytes": request.ram,
        "usable_host_bytes": request.usable_host,
        "peak_bytes": plan.peak,
        "host_peak_bytes": plan.host_peak,
        "seconds": plan.seconds,
        "limiting": plan.limiting.name,
        "text_on_device": plan.text_on_device,
        "stage_one": _stage_data(plan.stage_one),
        "stage_two": _stage_data(plan.stage_two),
        "vae": {place: vae_data(planned) for place, planned in vars(plan.vae_plans).items()},
        "phases": [
            {
                "name": phase.name,
                "device_bytes": phase.device,
                "held_bytes": dict(phase.held),
                "host_bytes": phase.host,
                "seconds": phase.seconds,
                "limit": phase.limit,
            }
            for phase in plan.phases
        ],
        "notes": list(plan.notes),
    }


def vae_data(planned: PlannedVAE) -> dict[str, Any]:
    """A plan of the VAE as plain data."""
    dtype = str(planned.request.dtype).removeprefix("torch.")
    return asdict(planned.plan) | {"dtype": dtype, "peak_bytes": planned.peak.total}


def _stage_data(stage: StagePlan) -> dict[str, Any]:
    time, homes = stage.time, stage.placement.homes(stage.config.num_layers)
    return {
        "placement": asdict(stage.placement),
        "blocks": {home: homes.count(home) for home in ("device", "host", "file")},
        "bytes": asdict(stage.placed) | {"device": stage.placed.device, "host": stage.placed.host},
        "step": asdict(time.step) | {"total": time.step.total},
        **{f"{name}_seconds": getattr(time, name) for name in ("compute", "copy", "read", "exposed")},
        "seconds": time.total,
    }
