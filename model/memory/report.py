"""A memory plan: its decisions, what they take, and the plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from model.machine.measure import format_bytes, format_seconds
from model.memory.dit_bytes import StageChoice
from model.memory.estimate import Estimate
from model.memory.request import HOST_USABLE, USABLE, MemoryRequest
from model.memory.vae_plan import PlannedVAE
from model.vae.tiles import VAEPlans

#: The version of what :meth:`MemoryPlan.to_json` returns.
SCHEMA_VERSION = 3
NOT_PREDICTED = "without loading, encoders of text and image, and the file"


@dataclass(frozen=True)
class Phase:
    """A phase of a plan, predicted.

    ``held`` has the bytes on the device at the worst moment, by name, and ``device`` their sum. ``host`` is the
    process's memory, ``copied`` the bytes of all copies between the two, and ``note`` what is to be said of it.
    """

    name: str
    held: Mapping[str, int]
    host: int
    copied: int
    note: str = ""

    @property
    def device(self) -> int:
        """The bytes on the device at the worst moment."""
        return sum(self.held.values())

    @property
    def limit(self) -> str:
        """The largest part of the peak, in words."""
        most = max(self.held, key=lambda name: self.held[name], default="")
        return self.note or f"most memory: {most}, {format_bytes(self.held[most])}"

    def to_json(self) -> dict[str, Any]:
        """Returns the phase as plain data."""
        sizes = {"device": self.device, "held": dict(self.held), "host": self.host, "copied": self.copied}
        return {"name": self.name, "limit": self.limit} | {f"{name}_bytes": size for name, size in sizes.items()}


class PipelinePlans(NamedTuple):
    """The plans of the VAE in its four places in a clip.

    They are: the photograph and grey frames at Stage I's size, encoded; Stage I's result, decoded at its size; the
    motion at the target size, encoded; and the clip, decoded while Stage II makes it.
    """

    condition: PlannedVAE
    motion: PlannedVAE
    reference: PlannedVAE
    decode: PlannedVAE

    @property
    def encode_dtype(self) -> torch.dtype:
        """The dtype that the reference is encoded in: float32, unless that does not fit."""
        return self.reference.request.dtype

    @property
    def tiles(self) -> VAEPlans:
        """The tiles of all four places, as the pipeline takes them."""
        return VAEPlans(*(planned.plan for planned in self), self.encode_dtype)

    def to_json(self) -> dict[str, Any]:
        """Returns the decisions and the peak of each place as plain data."""
        return {
            place: asdict(used.plan) | {"dtype": used.request.dtype_name, "peak_bytes": used.peak.total}
            for place, used in self._asdict().items()
        }

    def __str__(self) -> str:
        parts = []
        for name, planned in (("reference", self.reference), ("decode", self.decode)):
            plan, request = planned.plan, planned.request
            tiles = "untiled" if plan.tiles == 1 else f"{plan.rows} x {plan.columns} exact tiles"
            host = ", tiles wait in host memory" if plan.park else ""
            parts.append(f"{name} {request.dtype_name}, {tiles}{host}")
        return f"VAE: {'; '.join(parts)}"


@dataclass(frozen=True)
class MemoryPlan:
    """A memory plan; ``print`` it for a table. All its numbers are predicted."""

    request: MemoryRequest
    stage_one: StageChoice
    stage_two: StageChoice
    vae_plans: PipelinePlans
    text_on_device: bool
    phases: tuple[Phase, ...]
    estimate: Estimate
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The bytes on the device in the phase that takes most."""
        return self.limiting.device

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
        return "\n".join(_lines(self))

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data: bytes, the estimated seconds, and everything that was decided."""
        request = self.request
        data = {"schema": SCHEMA_VERSION, "basis": "predicted", "gpu": request.gpu.name, "mode": request.mode}
        data |= {"width": request.size[0], "height": request.size[1], "frames": request.num_frames}
        data |= {f"{name}_bytes": getattr(request, name) for name in ("vram", "usable", "ram", "usable_host")}
        data |= {"peak_bytes": self.peak, "host_peak_bytes": self.host_peak, "seconds": self.seconds}
        data |= {"limiting": self.limiting.name, "text_on_device": self.text_on_device}
        for name, stage, phase in (("one", self.stage_one, "Stage I"), ("two", self.stage_two, "Stage II")):
            data[f"stage_{name}"] = {
                "placement": asdict(stage.placement),
                "layers": stage.layers,
                "bytes": asdict(stage.placed) | {"device": stage.placed.device, "host": stage.placed.host},
                "copies_to_work": self.estimate.ratio(phase),
            }
        phases = [phase.to_json() for phase in self.phases]
        return data | {"vae": self.vae_plans.to_json(), "phases": phases, "notes": list(self.notes)}


def describe_placement(stage: StageChoice) -> str:
    """Returns a placement in words: ``18 of 40 layers on the device, 22 from pinned host memory; as they are``."""
    layers, placement, number = stage.layers, stage.placement, stage.config.num_layers
    share = "all" if layers["device"] == number else f"{layers['device']} of"
    where = f"{share} {number} layers on the device"
    where += f", {layers['host']} from pinned host memory" if layers["host"] else ""
    where += f", {layers['file']} from files" if layers["file"] else ""
    form = {
        "none": "as they are",
        "file": "in 8 bits where the checkpoint has them so",
        "float8": "in float8, which changes numbers",
        "int8": "in int8, which changes numbers",
    }[placement.quantize]
    return f"{where}; {form}{', matmuls in 8 bits' if placement.matmul == '8bit' else ''}"


def _lines(plan: MemoryPlan) -> Iterator[str]:
    request = plan.request
    (width, height), (low_width, low_height) = request.size, request.motion_size
    yield f"memory plan: {width}x{height}, {request.num_frames} frames, Stage I at {low_width}x{low_height}"
    card = host = ""
    if request.vram is not None:
        card = f" of {format_bytes(request.usable)} ({USABLE:.0%} of {format_bytes(request.vram)})"
    if request.ram is not None:
        host = f" of {format_bytes(request.usable_host)} ({HOST_USABLE:.0%} of {format_bytes(request.ram)})"
    yield f"  predicted peak         {format_bytes(plan.peak)}{card}, in {plan.limiting.name}"
    yield f"  predicted host memory  {format_bytes(plan.host_peak)}{host}"
    time = "none: seconds are predicted for GPUs"
    if request.capability is not None:
        article = "an" if request.gpu.name[0] in "AHLR" else "a"
        time = f"{format_seconds(plan.seconds)} on {article} {request.gpu.name}, predicted; {NOT_PREDICTED}"
    yield f"  predicted time         {time}"
    yield f"  Stage I   {describe_placement(plan.stage_one)}"
    yield f"  Stage II  {describe_placement(plan.stage_two)}"
    yield f"  {plan.vae_plans}"
    if request.text_encoder_bytes:
        yield f"  text encoder on the {'device' if plan.text_on_device else 'CPU'}"
    yield f"  {'phase':<10}{'device':>9}{'host':>9}{'copies':>9}  what limits it (all predicted)"
    for phase in plan.phases:
        copies = f"{plan.estimate.ratio(phase.name):.2f}" if plan.estimate.copies.get(phase.name) else "-"
        sizes = f"{format_bytes(phase.device):>9}{format_bytes(phase.host):>9}"
        yield f"  {phase.name:<10}{sizes}{copies:>9}  {phase.limit}"
    yield "  copies: their time over that of the phase's work; work hides those of layers, up to 1"
    yield from (f"  note: {note}" for note in plan.notes)
