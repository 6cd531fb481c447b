"""A whole clip made under a meter: on a card, held to a limit or not; on a CPU, if it is small; or on tensors without
memory at the real size, where nothing is computed and bytes are counted.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.harness.environment import energy_joules, process_memory
from bench.harness.timing import limited
from bench.memory.course import Course
from bench.memory.meter import make_meter
from bench.records.metrics import column_scale
from bench.records.outcome import failure
from model.cli.request import request_for
from model.csg.sampler import plan_segments
from model.csg.schedule import flow_sigmas
from model.machine.cards import chosen_gpu, device_options
from model.machine.host import release
from model.machine.measure import full_memory
from model.memory.plan import plan_memory
from model.memory.report import MemoryPlan
from model.memory.request import MemoryRequest
from model.pipeline.clip import ClipJob, make_condition, make_frames
from model.pipeline.components import Components
from model.pipeline.encoders import empty_text
from model.resume.clip import as_planned
from model.sizes import check_frames
from swifti2v_kernels import pretend_gpu


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
    dtype: torch.dtype = torch.bfloat16
    limit: int | None = None
    ram: int | None = None
    capability: int = 90

    @property
    def name(self) -> str:
        """The clip and its limit in words, for titles and messages."""
        limit = "" if self.limit is None else f", within {self.limit_told}"
        return f"{self.preset}, {self.width}x{self.height}, {self.num_frames} frames{limit}"

    @property
    def limit_told(self) -> str:
        """The limit in words: ``24 GB``, ``500 MB`` or ``none``."""
        if self.limit is None:
            return "none"
        scale, unit = column_scale([self.limit], "bytes")
        return f"{self.limit / scale:g} {unit}"


@dataclass
class ClipRun:
    """The findings of a run, ``row`` with its status; a failed run has those until it failed."""

    course: Course
    row: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    plan: MemoryPlan | None = None
    interrupted: bool = False

    def stage_rows(self) -> list[dict[str, Any]]:
        """Returns rows with peak and seconds of each stage."""
        peaks = self.course.peaks()
        return [{"stage": name, "peak_bytes": peak, "seconds": self.seconds.get(name)} for name, peak in peaks.items()]


def run_clip(setup: ClipSetup, device: torch.device) -> ClipRun:
    """Makes a clip and returns what its memory did.

    Args:
        setup: the clip and its limits.
        device: ``cuda``; ``cpu`` for small clips; ``meta`` to count bytes without computing.

    Raises:
        InputError: a size does not fit, or no plan does.
    """
    meter, counted = make_meter(device), device.type == "meta"
    components = Components.from_preset(setup.preset, 0, setup.dtype, device)
    run = ClipRun(meter.course, {"status": "ok", "frames_made": 0, "total_seconds": None})
    release(device)
    # Tensors without memory take the operators of a GPU.
    with limited(device, setup.limit), pretend_gpu(setup.capability) if counted else nullcontext():
        energy, start = energy_joules(device), time.perf_counter()
        try:
            run.plan = plan = plan_memory(_request(setup, components, device))
            job = as_planned(_job(setup, components, device, plan), plan)
            with meter.watch(), torch.no_grad():
                for part in make_frames(components, job, make_condition(components, job, meter), meter):
                    run.row["frames_made"] += part.shape[0]
                    del part  # frames are dropped as they come
        except (RuntimeError, MemoryError) as error:
            if full_memory(error) is None:
                raise
            run.row |= failure(error)
        except KeyboardInterrupt:
            # The findings so far are worth having; the command reports them and then stops.
            run.row |= {"status": "failed", "reason": "interrupted"}
            run.interrupted = True
        if not counted:
            run.seconds, run.row["total_seconds"] = meter.timer.seconds, time.perf_counter() - start
        if device.type == "cuda":
            run.row |= {"reserved_bytes": torch.cuda.max_memory_reserved(), "process_bytes": process_memory(device)}
            after = energy_joules(device)
            run.row["energy_joules"] = None if energy is None or after is None else after - energy
    release(device)
    return run


def _request(setup: ClipSetup, components: Components, device: torch.device) -> MemoryRequest:
    """Returns the request of a plan for the limit, else for the card that runs it; a CPU has no limit of its own."""
    own = device_options(device)
    memory = setup.limit or own["vram"]
    capability = setup.capability if device.type == "meta" else own["capability"]
    num_blocks = check_frames(setup.num_frames, components.vae_config.temporal_stride)
    return request_for(
        components, size=(setup.width, setup.height), num_frames=setup.num_frames, plan=plan_segments(num_blocks),
        gpu=chosen_gpu(None, memory or 0), capability=capability, vram=memory, ram=setup.ram, dtype=setup.dtype,
        steps=setup.steps, stage_one_steps=setup.steps,
    )  # fmt: skip


def _job(setup: ClipSetup, components: Components, device: torch.device, plan: MemoryPlan) -> ClipJob:
    sigmas = flow_sigmas(setup.steps, 5.0)
    return ClipJob(
        _picture(*plan.request.size), _picture(*plan.request.motion_size),
        empty_text(components.stage_two_config.text_dim).to(device), plan.request.plan, sigmas, sigmas,
        plan.vae_plans.tiles,
    )  # fmt: skip


def _picture(width: int, height: int) -> Tensor:
    """Returns a picture ``[1, 3, 1, H, W]`` of smooth slopes, since a photograph's content does not matter here."""
    rows, columns = torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width)
    return torch.stack([rows * columns, rows + 0 * columns, 0 * rows + columns])[None, :, None].contiguous()
