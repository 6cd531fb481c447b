"""One whole clip under a meter: on a card, held to a limit or not; on a CPU, small; or on tensors without memory at the
real size, where nothing is computed and bytes are counted.
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

from bench.environment import energy_joules, process_memory
from bench.memory.course import Course
from bench.memory.meter import CountingMeter, Meter, make_meter
from bench.outcome import failure
from bench.timing import limited
from model.clip import ClipJob, make_condition, make_frames, release
from model.components import Components
from model.config import DiTConfig, VAEConfig, get_preset
from model.csg import plan_for, plan_segments
from model.dit import WanDiT
from model.encoders import empty_text
from model.measure import is_out_of_memory
from model.media import VideoWriter
from model.pipeline import check_frames, check_size, size_multiple, stage_one_size
from model.pipeline_plan import Card, plan_components
from model.scheduler import flow_sigmas
from model.vae import WanVAE
from model.weights import dit_parameter_dtype
from swifti2v_kernels import pretend_gpu

META = torch.device("meta")


@dataclass(frozen=True)
class ClipSetup:
    """What is made, and for which card its plans are; ``card`` None: for the device itself."""

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
    capability: int = 90
    seed: int = 0
    out: Path | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.preset}, {self.width}x{self.height}, {self.num_frames} frames"


@dataclass
class ClipRun:
    """What a run has shown. ``status`` and ``reason`` as in rows; of a run that failed there is what came before."""

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
    plans: str = ""
    interrupted: bool = False


def run_clip(setup: ClipSetup, device: torch.device) -> ClipRun:
    """Makes the clip.

    Args:
        setup: what.
        device: ``cuda``; ``cpu`` for small ones; ``meta`` to count.

    Raises:
        InputError: a size does not fit, or no plan does.
    """
    meter = make_meter(device)
    components = _components(setup, device, meter)
    run = ClipRun(setup, meter.course)
    card = Card(setup.capability, setup.limit) if setup.limit is not None and device.type != "cpu" else None
    release(device)
    with limited(device, setup.limit), _as_gpu(setup, device):
        energy, start = energy_joules(device), time.perf_counter()
        try:
            job = _job(setup, components, device, card, meter)
            run.plans = str(job.vae_plans)
            with meter.watch(), torch.no_grad():
                run.frames = _make(setup, components, job, meter)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            run.status, run.reason = failure(error).values()
        except KeyboardInterrupt:
            # What there is so far is worth having; the command reports it and then stops.
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
    """All frames, dropped or written as they come; how many."""
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


def _components(setup: ClipSetup, device: torch.device, meter: Meter) -> Components:
    if not isinstance(meter, CountingMeter) or device.type != "meta":
        return Components.from_preset(setup.preset, setup.seed, setup.dtype, device)
    preset = get_preset(setup.preset)
    return Components(
        stage_one_config=preset.stage_one,
        stage_two_config=preset.stage_two,
        vae_config=preset.vae,
        stage_one_vae_config=preset.vae,
        stage_one=lambda: _meta_dit(preset.stage_one, setup.dtype, meter),
        low_noise=None,
        stage_two=lambda: _meta_dit(preset.stage_two, setup.dtype, meter),
        vae=lambda: _meta_vae(preset.vae, setup.dtype),
        stage_one_vae=None,
        weights=None,
    )


def _meta_dit(config: DiTConfig, dtype: torch.dtype, meter: CountingMeter) -> WanDiT:
    """In the dtypes that loading gives, which makes each weight once and in its own."""
    with META, meter.memory.paused():
        model = WanDiT(config)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        fresh = torch.empty(parameter.shape, dtype=dit_parameter_dtype(name, dtype), device=META)
        module._parameters[leaf] = torch.nn.Parameter(fresh, requires_grad=False)
    return model


def _meta_vae(config: VAEConfig, dtype: torch.dtype) -> WanVAE:
    with META:
        return WanVAE(config).requires_grad_(False).to_dtypes(decode=dtype).order_weights()


def _job(setup: ClipSetup, components: Components, device: torch.device, card: Card | None, meter: Meter) -> ClipJob:
    size = setup.width, setup.height
    check_size(*size, size_multiple(components.vae_config, components.stage_two_config))
    num_blocks = check_frames(setup.num_frames, components.vae_config.temporal_stride)
    plan = plan_for(setup.mode, plan_segments(num_blocks, setup.blocks))
    low_size = stage_one_size(*size, size_multiple(components.stage_one_vae_config, components.stage_one_config))
    plans = plan_components(
        components, size, low_size, window_blocks=max(len(window.blocks) for window in plan),
        blocks_per_segment=setup.blocks, memory="auto", dtype=setup.dtype, device=device, card=card,
    )  # fmt: skip
    host = meter.host if isinstance(meter, CountingMeter) and device.type == "meta" else None
    return ClipJob(
        _picture(*size), _picture(*low_size), empty_text(components.stage_two_config.text_dim).to(device),
        plan, flow_sigmas(setup.stage_one_steps, 5.0), flow_sigmas(setup.steps, 5.0), plans,
        seed=setup.seed, mode=setup.mode, host=host,
    )  # fmt: skip


def _picture(width: int, height: int) -> Tensor:
    """A slope of light: the photograph's content does not matter here."""
    rows, columns = torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width)
    return torch.stack([rows * columns, rows + 0 * columns, 0 * rows + columns])[None, :, None].contiguous()


@contextmanager
def _as_gpu(setup: ClipSetup, device: torch.device) -> Iterator[None]:
    """Tensors without memory take the operators of a GPU."""
    with pretend_gpu(setup.capability) if device.type == "meta" else nullcontext():
        yield


def stage_rows(run: ClipRun) -> list[dict[str, Any]]:
    """Peak and seconds of each stage, of segments together."""
    peaks: dict[str, int] = {}
    for mark, peak in run.course.peaks().items():
        stage = "Stage II" if mark.startswith("Stage II") else mark
        peaks[stage] = max(peaks.get(stage, 0), peak)
    return [{"stage": stage, "peak_bytes": peak, "seconds": run.seconds.get(stage)} for stage, peak in peaks.items()]
