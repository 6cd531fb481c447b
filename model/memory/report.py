"""A memory plan: its decisions, what they take, and the plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model.config import DiTConfig
from model.machine.measure import format_bytes
from model.memory.estimate import Estimate
from model.memory.request import HOST_USABLE, MemoryRequest
from model.memory.vae_places import USABLE, PipelinePlans
from model.memory.vae_plan import PlannedVAE
from model.streaming.placement import PlacedBytes, Placement

#: The version of what :meth:`MemoryPlan.to_json` returns.
SCHEMA_VERSION = 3
NOT_PREDICTED = "without loading, encoders of text and image, and the file"


@dataclass(frozen=True)
class Phase:
    """A phase of a plan, predicted.

    ``held`` has the bytes on the device at the worst moment, by name, and ``device`` their sum. ``host`` is the
    process's memory, ``copied`` the bytes of all copies between the two, and ``limit`` says what the peak is made of.
    """

    name: str
    held: Mapping[str, int]
    host: int
    copied: int
    limit: str

    @property
    def device(self) -> int:
        """The bytes on the device at the worst moment."""
        return sum(self.held.values())


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage's DiT: where its layers are, and what that takes."""

    config: DiTConfig
    placement: Placement
    placed: PlacedBytes


@dataclass(frozen=True)
class MemoryPlan:
    """A memory plan; ``print`` it for a table. All its numbers are predicted."""

    request: MemoryRequest
    stage_one: StagePlan
    stage_two: StagePlan
    vae_plans: PipelinePlans
    text_on_device: bool
    phases: tuple[Phase, ...]
    estimate: Estimate
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The bytes on the device in the phase that takes most."""
        return max(phase.device for phase in self.phases)

    @property
    def host_peak(self) -> int:
        """The bytes of the process in host memory in the phase that takes most."""
        return max(phase.host for phase in self.phases)

    @property
    def seconds(self) -> float:
        """The seconds on the card of the request, without loading, text and image encoders, and file."""
        return self.estimate.seconds

    @property
    def vae_waits(self) -> bool:
        """True if the VAEs leave the device for Stage I, because with them its peak would be that of the run."""
        vaes = sum(size for name, size in self.phase("condition").held.items() if name.endswith("weights"))
        return self.phase("Stage I").device + vaes > self.peak

    @property
    def limiting(self) -> Phase:
        """The phase that takes most of the device."""
        return max(self.phases, key=lambda phase: phase.device)

    def phase(self, name: str) -> Phase:
        """Returns the phase called ``name``."""
        return next(phase for phase in self.phases if phase.name == name)

    def __str__(self) -> str:
        return _text(self)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data: bytes, the estimated seconds, and everything that was decided."""
        return _data(self)


def describe_placement(config: DiTConfig, placement: Placement) -> str:
    """Returns a placement in words: ``18 of 40 layers on the device, 22 from pinned host memory; as they are``."""
    homes = placement.homes(config.num_layers)
    count = {home: homes.count(home) for home in ("device", "host", "file")}
    parts = [f"{count['device']} of {config.num_layers} layers on the device"]
    parts += [f"{count['host']} from pinned host memory"] * bool(count["host"])
    parts += [f"{count['file']} from files"] * bool(count["file"])
    where = (
        f"all {config.num_layers} layers on the device" if count["device"] == config.num_layers else ", ".join(parts)
    )
    form = {
        "none": "as they are",
        "file": "in 8 bits where the checkpoint has them so",
        "float8": "in float8, which changes numbers",
        "int8": "in int8, which changes numbers",
    }[placement.quantize]
    return f"{where}; {form}{', matmuls in 8 bits' if placement.matmul == '8bit' else ''}"


def _text(plan: MemoryPlan) -> str:
    request = plan.request
    (width, height), (low_width, low_height) = request.size, request.motion_size
    card = host = ""
    if request.vram is not None:
        card = f" of {format_bytes(request.usable or 0)} ({USABLE:.0%} of {format_bytes(request.vram)})"
    if request.ram is not None:
        host = f" of {format_bytes(request.usable_host or 0)} ({HOST_USABLE:.0%} of {format_bytes(request.ram)})"
    lines = [
        f"memory plan: {width}x{height}, {request.num_frames} frames, Stage I at {low_width}x{low_height}",
        f"  predicted peak         {format_bytes(plan.peak)}{card}, in {plan.limiting.name}",
        f"  predicted host memory  {format_bytes(plan.host_peak)}{host}",
        f"  predicted time         {_time(plan)}",
        f"  Stage I   {describe_placement(plan.stage_one.config, plan.stage_one.placement)}",
        f"  Stage II  {describe_placement(plan.stage_two.config, plan.stage_two.placement)}",
        f"  {plan.vae_plans}",
    ]
    if request.text_encoder_bytes:
        lines.append(f"  text encoder on the {'device' if plan.text_on_device else 'CPU'}")
    lines.append(f"  {'phase':<10}{'device':>9}{'host':>9}{'copies':>9}  what limits it (all predicted)")
    for phase in plan.phases:
        copies = f"{plan.estimate.ratio(phase.name):.2f}" if plan.estimate.copies.get(phase.name) else "-"
        sizes = f"{format_bytes(phase.device):>9}{format_bytes(phase.host):>9}"
        lines.append(f"  {phase.name:<10}{sizes}{copies:>9}  {phase.limit}")
    lines.append("  copies: their time over that of the phase's work; work hides those of layers, up to 1")
    return "\n".join([*lines, *(f"  note: {note}" for note in plan.notes)])


def _time(plan: MemoryPlan) -> str:
    if plan.request.capability is None:
        return "none: seconds are predicted for GPUs"
    return f"{about(plan.seconds)} on {an(plan.request.gpu.name)}, predicted; {NOT_PREDICTED}"


def about(seconds: float) -> str:
    """Returns ``about 13 minutes``: seconds as rough as an estimate is."""
    for size, unit in ((3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit}s"
    return f"about {max(seconds, 1):.0f} seconds" if seconds >= 1.5 else "about a second"


def an(card: str) -> str:
    """Returns the name of a card with its article."""
    return f"{'an' if card[0] in 'AHLR' else 'a'} {card}"


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
        "stage_one": _stage_data(plan.stage_one, plan.estimate.ratio("Stage I")),
        "stage_two": _stage_data(plan.stage_two, plan.estimate.ratio("Stage II")),
        "vae": {place: vae_data(planned) for place, planned in vars(plan.vae_plans).items()},
        "phases": [
            {
                "name": phase.name,
                "device_bytes": phase.device,
                "held_bytes": dict(phase.held),
                "host_bytes": phase.host,
                "copied_bytes": phase.copied,
                "limit": phase.limit,
            }
            for phase in plan.phases
        ],
        "notes": list(plan.notes),
    }


def vae_data(planned: PlannedVAE) -> dict[str, Any]:
    """Returns a plan of the VAE as plain data."""
    dtype = str(planned.request.dtype).removeprefix("torch.")
    return asdict(planned.plan) | {"dtype": dtype, "peak_bytes": planned.peak.total}


def _stage_data(stage: StagePlan, ratio: float) -> dict[str, Any]:
    homes = stage.placement.homes(stage.config.num_layers)
    return {
        "placement": asdict(stage.placement),
        "layers": {home: homes.count(home) for home in ("device", "host", "file")},
        "bytes": asdict(stage.placed) | {"device": stage.placed.device, "host": stage.placed.host},
        "copies_to_work": ratio,
    }
