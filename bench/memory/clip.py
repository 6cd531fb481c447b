"""A whole clip made under a meter: on a card, held to a limit or not; on a CPU, if it is small; or on tensors without
memory at the real size, where nothing is computed and bytes are counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.environment import energy_joules, process_memory
from bench.harness.timing import limited
from bench.memory.course import Course
from bench.memory.meter import CountingMeter, Meter, make_meter
from bench.records.metrics import byte_scale
from bench.records.outcome import failure
from model.cli.request import request_for
from model.config import get_preset
from model.csg.sampler import plan_segments
from model.csg.schedule import flow_sigmas
from model.io.media import VideoWriter
from model.machine.host import release
from model.machine.measure import is_out_of_memory
from model.memory.cards import chosen_gpu
from model.memory.plan import plan_memory
from model.memory.report import MemoryPlan
from model.memory.request import MemoryRequest
from model.memory.vae_places import Card
from model.pipeline.clip import ClipJob, make_condition, make_frames
from model.pipeline.components import Components
from model.pipeline.encoders import empty_text
from model.resume.clip import as_planned
from model.sizes import check_frames
from swifti2v_kernels import pretend_gpu

META = torch.device("meta")


@dataclass(frozen=True)
class ClipSetup:
    """The clip that is made, and the memory that it may take.

    ``limit`` and ``ram`` are bytes of the card and of the machine; None stands for the card's own and for no limit.
    """

    preset: str
    width: int
    height: int
    num_frames: int
    steps: int = 4
    stage_one_steps: int = 4
    blocks: int = 3
    mode: str = "bidirectional"
    dtype: torch.dtype = torch.bfloat16
    limit: int | None = None
    ram: int | None = None
    quantize: str = "auto"
    matmul: str = "plain"
    capability: int = 90
    seed: int = 0
    out: Path | None = None

    @property
    def name(self) -> str:
        """The clip in words, for titles and messages."""
        return f"{self.preset}, {self.width}x{self.height}, {self.num_frames} frames"

    @property
    def limit_told(self) -> str:
        """The limit in words: ``24 GB``, ``500 MB`` or ``none``."""
        if self.limit is None:
            return "none"
        scale, unit = byte_scale([self.limit])
        return f"{self.limit / scale:g} {unit}"


@dataclass
class ClipRun:
    """The findings of a run, with ``status`` and ``reason`` as in rows; a failed run has those until it failed."""

    setup: ClipSetup
    course: Course
    seconds: dict[str, float] = field(default_factory=dict)
    total_seconds: float | None = None
    frames: int = 0
    status: str = "ok"
    reason: str = ""
    reserved: int | None = None
    process: int | None = None
    energy: float | None = None
    plan: MemoryPlan | None = None
    interrupted: bool = False


def run_clip(setup: ClipSetup, device: torch.device) -> ClipRun:
    """Makes a clip and returns what its memory did.

    Args:
        setup: the clip and its limits.
        device: ``cuda``; ``cpu`` for small clips; ``meta`` to count bytes without computing.

    Raises:
        InputError: a size does not fit, or no plan does.
    """
    meter = make_meter(device)
    components = Components.from_preset(setup.preset, setup.seed, setup.dtype, device)
    run = ClipRun(setup, meter.course)
    release(device)
    with limited(device, setup.limit), _as_gpu(setup, device):
        energy, start = energy_joules(device), time.perf_counter()
        try:
            run.plan = plan = plan_memory(_request(setup, components, device))
            placed, job = as_planned(components, _job(setup, components, device, plan, meter), plan)
            with meter.watch(), torch.no_grad():
                run.frames = _make(setup, placed, job, meter)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            run.status, run.reason = failure(error).values()
        except KeyboardInterrupt:
            # The findings so far are worth having; the command reports them and then stops.
            run.status, run.reason, run.interrupted = "failed", "interrupted", True
        if device.type != "meta":
            run.seconds = meter.timer.seconds
            run.total_seconds = time.perf_counter() - start
        if device.type == "cuda":
            run.reserved, run.process = torch.cuda.max_memory_reserved(), process_memory(device)
            after = energy_joules(device)
            run.energy = None if energy is None or after is None else after - energy
    release(device)
    return run


def _make(setup: ClipSetup, components: Components, job: ClipJob, meter: Meter) -> int:
    """Makes all frames, which are dropped or written as they come, and returns how many they are."""
    count = 0
    condition = make_condition(components, job, meter)
    frames = make_frames(components, job, condition, meter)
    if setup.out is None:
        for part in frames:
            count += part.shape[0]
            del part
        return count
    with VideoWriter(setup.out, setup.width, setup.height, get_preset(setup.preset).fps) as writer:
        for part in frames:
            with meter.timer.stage("file"):
                writer.write(part)
        return writer.num_frames


def _request(setup: ClipSetup, components: Components, device: torch.device) -> MemoryRequest:
    """Returns the request of a plan for the limit, else for the card that runs it; a CPU has no limit of its own."""
    card = Card.of(device)
    memory = setup.limit or (None if card is None else card.memory)
    capability = setup.capability if device.type == "meta" else None if card is None else card.capability
    gpu = chosen_gpu(None, memory or 0)
    num_blocks = check_frames(setup.num_frames, components.vae_config.temporal_stride)
    return request_for(
        components, size=(setup.width, setup.height), num_frames=setup.num_frames,
        plan=plan_segments(num_blocks, setup.blocks), mode=setup.mode, gpu=gpu,
        capability=capability, vram=memory, ram=setup.ram, dtype=setup.dtype,
        steps=setup.steps, stage_one_steps=setup.stage_one_steps, quantize=setup.quantize, matmul=setup.matmul,
    )  # fmt: skip


def _job(setup: ClipSetup, components: Components, device: torch.device, plan: MemoryPlan, meter: Meter) -> ClipJob:
    request = plan.request
    host = meter.host if isinstance(meter, CountingMeter) and device.type == "meta" else None
    return ClipJob(
        _picture(*request.size), _picture(*request.motion_size),
        empty_text(components.stage_two_config.text_dim).to(device), request.plan,
        flow_sigmas(setup.stage_one_steps, 5.0), flow_sigmas(setup.steps, 5.0), plan.vae_plans.tiles,
        seed=setup.seed, mode=setup.mode, host=host,
    )  # fmt: skip


def _picture(width: int, height: int) -> Tensor:
    """Returns a picture ``[1, 3, 1, H, W]`` of smooth slopes, since a photograph's content does not matter here."""
    rows, columns = torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width)
    return torch.stack([rows * columns, rows + 0 * columns, 0 * rows + columns])[None, :, None].contiguous()


@contextmanager
def _as_gpu(setup: ClipSetup, device: torch.device) -> Iterator[None]:
    """Makes tensors without memory take the operators of a GPU while the body runs."""
    with pretend_gpu(setup.capability) if device.type == "meta" else nullcontext():
        yield


def stage_rows(run: ClipRun) -> list[dict[str, Any]]:
    """Returns rows with peak and seconds of each stage; the segments of Stage II are one row."""
    peaks: dict[str, int] = {}
    for mark, peak in run.course.peaks().items():
        stage = "Stage II" if mark.startswith("Stage II") else mark
        peaks[stage] = max(peaks.get(stage, 0), peak)
    return [{"stage": stage, "peak_bytes": peak, "seconds": run.seconds.get(stage)} for stage, peak in peaks.items()]
